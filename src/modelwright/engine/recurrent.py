"""Steps of models whose layers carry a state from token to token: Mamba, RWKV, recurrent nets, and their hybrids.

Each running request keeps one state a layer, of fixed size; the attention layers of a hybrid use the paged cache as
ever. A preempted request drops its state and is computed again, and no prefix is shared, because a state is that of
one position alone.

Reading many tokens at once and one by one round differently, so there is one canonical way, whatever the chunks: the
state at a multiple of `SEGMENT` comes from reading the segment before it at once, from the state at its beginning; the
tokens behind the last such place, and every token behind which the next is drawn, are read one by one, requests
together. A request that passes a multiple while it decodes reads that segment again: one token in `SEGMENT` costs one
segment. So what is drawn does not depend on chunking, neighbours or preemption, where products do not depend on the
number of rows (`modelwright.engine.runner`); log-probabilities of prompts do, by rounding, where a chunk ends inside
a segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.engine.kv_store import PlainStore, make_store
from modelwright.engine.runner import SMALL_PRODUCT, PagedState, Planner, smallest_product
from modelwright.engine.scheduler import Chunk
from modelwright.models.decoder import LayerCache
from modelwright.nn.attention import NO_RULE, AttentionRule

SEGMENT = 32
Memory = dict[int, dict[str, Tensor]]  # layer -> name -> (1, ...)


@dataclass
class Past:
    """The states of one request."""

    position: int = 0  # tokens read
    memory: Memory = field(default_factory=dict)
    segment_position: int = 0  # the last multiple of SEGMENT that was reached by reading whole segments
    segment_memory: Memory = field(default_factory=dict)


def is_recurrent(layout: Sequence[LayerCache]) -> bool:
    """Tell whether a layer keeps a state of fixed size."""
    return any(cache.fixed_size for cache in layout)


def refuse_recurrent(model: nn.Module, asked: dict[str, Any]) -> None:
    """Refuse what a recurrent state cannot do.

    Raises:
        ConfigError: One of the settings asked for needs keys and values of every layer.
    """
    for name, (value, why) in asked.items():
        if value:
            raise ConfigError(
                f"{name} is set, and a {type(model).__name__} keeps a recurrent state: {why}. Leave it out."
            )


class RecurrentState:
    """What the layers see during one call: the memories of the rows at hand, and pages for attention."""

    def __init__(self, memory: Memory, pages: PagedState | None, num_real: int):
        self._memory, self._pages, self._num_real = memory, pages, num_real

    def memory(self, layer_index: int) -> dict[str, Tensor]:
        """Return what a layer keeps for itself, to read and to change; empty before the first token."""
        return self._memory.setdefault(layer_index, {})

    def advance(self, num_tokens: int) -> None:
        """Do nothing: the runner counts the tokens of each request."""

    def attend(
        self,
        layer_index: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        *,
        bias: Tensor | None = None,
        rule: AttentionRule = NO_RULE,
    ) -> Tensor:
        """Attend over the pages, as `PagedState` does, with (B, 1, ...) taken as (1, B, ...)."""
        assert self._pages is not None
        q_row, k_row, v_row = (x.reshape(1, -1, *x.shape[2:])[:, : self._num_real] for x in (q, k, v))
        out = self._pages.attend(layer_index, q_row, k_row, v_row, scale, bias=bias, rule=rule)
        missing = q.shape[0] * q.shape[1] - self._num_real
        if missing:
            out = torch.cat((out, out.new_zeros(1, missing, *out.shape[2:])), dim=1)
        return out.reshape(*q.shape[:2], *out.shape[2:])


class RecurrentRunner:
    """Computes steps as `modelwright.engine.runner.Runner` does, for models with recurrent layers."""

    def __init__(self, model: nn.Module, *, num_blocks: int, block_size: int, kv_dtype: str | None = None):
        parameter = next(p for p in model.parameters() if p.is_floating_point())
        self.model: Any = model
        self.dtype, self.device = parameter.dtype, parameter.device
        layout = model.cache_layout()  # type: ignore[operator]
        self.has_attention = any(cache.num_kv_heads for cache in layout)
        self.stores = [
            make_store(num_blocks * block_size, c, self.dtype, self.device, kv_dtype)
            if c.num_kv_heads
            else PlainStore(0, c, self.dtype, self.device)
            for c in layout
        ]
        for store in self.stores:
            store.pool[:block_size] = 0  # the null block
        self.planner = Planner(block_size, 0, self.device)
        self.min_rows = SMALL_PRODUCT // smallest_product(model) + 1

    @property
    def pools(self) -> list[Tensor]:
        """The memory of each layer's keys and values; empty for recurrent layers."""
        return [store.pool for store in self.stores]

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute a step's tokens and keep the states behind them.

        Returns:
            (R, V) logits: of each chunk in order, as many rows as it wants (`Chunk.num_rows`), its last ones.
        """
        rows = [self._read_segments(chunk) for chunk in chunks]  # of each chunk: position -> (D,)
        # A chunk that wants no output leaves its last tokens to the next one, which reads whole segments again.
        open_chunks = [i for i, c in enumerate(chunks) if c.num_rows and c.request.memory.position < c.end]
        while open_chunks:
            # At its first token a layer's memory is empty, so those requests are a batch of their own.
            first = [i for i in open_chunks if chunks[i].request.memory.position == 0]
            later = [i for i in open_chunks if chunks[i].request.memory.position > 0]
            for together in (first, later):
                if together:
                    hidden = self._read_one([chunks[i] for i in together])
                    for i, row in zip(together, hidden, strict=True):
                        rows[i][chunks[i].request.memory.position - 1] = row
            open_chunks = [i for i in open_chunks if chunks[i].request.memory.position < chunks[i].end]
        wanted = [rows[i][p] for i, c in enumerate(chunks) for p in range(c.end - c.num_rows, c.end)]
        if not wanted:
            return torch.empty(0, self.model.config.vocab_size, device=self.device)
        padded = [*wanted, *[wanted[0]] * (self.min_rows - len(wanted))]
        return self.model.lm_head(torch.stack(padded)[None])[0, : len(wanted)]  # (R, V)

    def _read_segments(self, chunk: Chunk) -> dict[int, Tensor]:
        """Read the whole segments before the chunk's last token; return the outputs, by position."""
        request = chunk.request
        if chunk.start == 0 or request.memory is None:
            request.memory = Past()
        past: Past = request.memory
        rows: dict[int, Tensor] = {}
        while past.segment_position + SEGMENT < chunk.end:
            start = past.segment_position
            memory = {layer: dict(kept) for layer, kept in past.segment_memory.items()}
            ids = torch.tensor([request.token_ids[start : start + SEGMENT]], device=self.device)
            pages = self._pages([Chunk(request, start, SEGMENT)])
            positions = torch.arange(start, start + SEGMENT, device=self.device)[None]
            state = RecurrentState(memory, pages, SEGMENT)
            hidden = self.model.hidden(ids, positions=positions, state=state)[0]  # (SEGMENT, D)
            past.segment_position, past.segment_memory = start + SEGMENT, memory
            if past.position < start + SEGMENT:
                past.position = start + SEGMENT
            # States that go on one by one from here start over from the one read at once.
            past.memory = {layer: dict(kept) for layer, kept in memory.items()}
            assert past.position <= start + SEGMENT, "a segment is read before the next token"
            rows.update({start + i: row for i, row in enumerate(hidden)})
        return rows

    def _read_one(self, chunks: Sequence[Chunk]) -> Tensor:
        """Read the next token of each request; return the outputs (B, D)."""
        pasts: list[Past] = [chunk.request.memory for chunk in chunks]
        padding = [0] * max(0, self.min_rows - len(chunks))
        order = [*range(len(chunks)), *padding]
        ids = torch.tensor([[chunks[i].request.token_ids[pasts[i].position]] for i in order], device=self.device)
        positions = torch.tensor([[pasts[i].position] for i in order], device=self.device)
        memory: Memory = {
            layer: {name: torch.cat([pasts[i].memory[layer][name] for i in order]) for name in kept}
            for layer, kept in pasts[0].memory.items()
        }
        pages = self._pages([Chunk(c.request, p.position, 1) for c, p in zip(chunks, pasts, strict=True)])
        state = RecurrentState(memory, pages, len(chunks))
        hidden = self.model.hidden(ids, positions=positions, state=state)[:, 0]
        for i, past in enumerate(pasts):
            past.position += 1
            past.memory = {
                layer: {name: x[i : i + 1].clone() for name, x in kept.items()} for layer, kept in memory.items()
            }
        return hidden[: len(chunks)]

    def _pages(self, chunks: Sequence[Chunk]) -> PagedState | None:
        return PagedState(self.stores, self.planner.plan(chunks)) if self.has_attention else None
