"""Computing one step: all scheduled tokens of all requests in one forward pass over a paged key-value cache.

The scheduled tokens stand in one row (1, T). Everything but attention treats tokens one by one; attention comes back
to `PagedState.attend`, which stores the new keys and values in the requests' blocks and lets each query look at its
own request's.

Attention is computed in a canonical shape, so that the bits of an output depend on the absolute position and on the
tokens before it alone, never on how a prompt was cut into chunks, on a prefix hit, or on the neighbours: queries in
tiles of `QUERY_TILE` rows that begin at multiples of it (missing rows are filled and thrown away) against the keys from
0 to the next multiple of `KEY_TILE` (later keys are masked), see `modelwright.nn.tiles`; a token alone takes fewer rows
where they give the same bits. Linear layers and norms work
row by row in bf16 on CPUs, where this makes outputs bitwise reproducible; in fp32 the matrix kernels differ with the
number of rows, by about 1e-6. Missing keys come from the null block, which is always zero: whatever a freed block holds
cannot reach an output.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.engine.kv_store import KVStore, make_store, slot_bytes
from modelwright.engine.scheduler import Chunk
from modelwright.models.decoder import LayerCache
from modelwright.nn.attention import NO_RULE, Attention, AttentionRule
from modelwright.nn.linear import linears
from modelwright.nn.tiles import KEY_TILE, QUERY_TILE, attend_rows, decode_rows, tile_mask

# Up to this many multiply-adds, torch computes a bf16 product outside oneDNN (mkldnn_gemm_min_size) and rounds
# otherwise. Tiny models reach it with one or two rows, so their steps are padded beyond it.
SMALL_PRODUCT = 16**3


class Span(Protocol):
    """What has to be known of a request's tokens in a step: a `modelwright.engine.scheduler.Chunk`, for instance."""

    @property
    def start(self) -> int:
        """The first position."""
        ...

    @property
    def computed_end(self) -> int:
        """One past the last position."""
        ...

    @property
    def token_ids(self) -> list[int]:
        """The tokens at these positions."""
        ...

    @property
    def block_table(self) -> list[int]:
        """The blocks of the sequence."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows of logits that are wanted: the last ones."""
        ...


@dataclass(frozen=True)
class TileGroup:
    """Query tiles that look at the same number of keys.

    `rows` (B, QUERY_TILE) are indices into the step's tokens; `positions` (B, QUERY_TILE) stand in the sequence;
    `masks` are kept for the layers to come, by window.
    """

    rows: Tensor
    positions: Tensor
    num_keys: int  # S
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, group_size: int, dtype: torch.dtype) -> Tensor:
        """Return what is added to the scores of layers with this window: (B, 1, QUERY_TILE * G, S)."""
        if window not in self.masks:
            distance = self.positions[..., None] - torch.arange(self.num_keys, device=self.positions.device)
            self.masks[window] = tile_mask(distance, window, group_size, dtype)
        return self.masks[window]


@dataclass(frozen=True)
class Gather:
    """Keys and values fetched together: `slots` (U, S), and the tiles that use them (U is B, or 1 for all)."""

    slots: Tensor
    groups: tuple[TileGroup, ...]


@dataclass(frozen=True)
class StepPlan:
    """Where each token of a step is stored and what it looks at; made once and used by every layer."""

    input_ids: Tensor  # (1, T); T counts the padding too
    positions: Tensor  # (1, T)
    slots: Tensor  # (T without padding,) where the new keys and values go
    gathers: tuple[Gather, ...]
    restore: Tensor  # (T,) where each token's result stands among the tiles' rows
    last_rows: Tensor  # (R or more,) the tokens after which logits are wanted, then padding


class PagedState:
    """What the attention layers see of the cache during one step."""

    def __init__(self, stores: Sequence[KVStore], plan: StepPlan):
        self.stores = stores  # of each layer
        self.plan = plan

    def memory(self, layer_index: int) -> dict[str, Tensor]:
        """Refuse: a layer that keeps a state of its own cannot be paged.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"Layer {layer_index} keeps a recurrent state or cross-attention, which the engine does not page. "
            "Decode this model step by step with model.new_state(batch_size)."
        )

    def advance(self, num_tokens: int) -> None:
        """Do nothing: the scheduler counts the tokens of each request."""

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
        """Store a layer's new keys and values and return what the queries see.

        Args:
            layer_index: Which layer's part of the pool.
            q: (1, T, N, H), rotated already, as are the keys.
            k: (1, T, K, H).
            v: (1, T, K, H).
            scale: Multiplies the scores.
            bias: Not taken.
            rule: Window, soft-cap and sinks of the family.

        Returns:
            (1, T, N, H).

        Raises:
            ConfigError: The layer adds a bias to its scores.
        """
        refuse_bias(bias)
        store = self.stores[layer_index]
        num_real = self.plan.slots.shape[0]
        store.write(self.plan.slots, k[0, :num_real], v[0, :num_real])
        results = []
        for gather in self.plan.gathers:
            keys, values = store.read(gather.slots, q.dtype)  # (U, K, S, H)
            for group in gather.groups:
                rows = q[0].index_select(0, group.rows.flatten())  # (B*4, N, H)
                mask = group.mask(rule.window, q.shape[2] // keys.shape[1], q.dtype)
                near = [x[:, :, : group.num_keys].expand(len(group.rows), -1, -1, -1) for x in (keys, values)]
                results.append(attend_rows(rows, near[0], near[1], mask, scale, rule))
        rows = results[0] if len(results) == 1 else torch.cat(results)  # (tile rows, N, Hv)
        return rows.index_select(0, self.plan.restore)[None]


class Planner:
    """Lays out a step: from chunks of requests to the index tensors of a `StepPlan`."""

    def __init__(self, block_size: int, min_rows: int, device: torch.device, decode_rows: int = QUERY_TILE):
        self.block_size = block_size
        self.decode_rows = decode_rows  # of a token alone
        self.min_rows = min_rows  # a step is padded to so many tokens at least
        self.device = device

    def plan(self, chunks: Sequence[Span]) -> StepPlan:
        """Return the layout of one step."""
        ids: list[int] = []
        positions, slots = [], []
        last_rows: list[int] = []
        gathers: list[tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray, int]]]] = []
        alone: dict[tuple[int, int], int] = {}  # rows and keys -> index of the gather that requests of one tile share
        for chunk in chunks:
            rows, tile_positions, num_keys = _tile(chunk, len(ids), self.decode_rows)
            table = self._slot_table(chunk, int(num_keys[-1]))
            if len(num_keys) == 1:
                at = alone.setdefault((rows.shape[1], int(num_keys[0])), len(gathers))
                if at == len(gathers):
                    gathers.append(([], []))
            else:
                at = len(gathers)
                gathers.append(([], []))
            gathers[at][0].append(table)
            for size in np.unique(num_keys):
                chosen = num_keys == size
                gathers[at][1].append((rows[chosen], tile_positions[chosen], int(size)))
            ids += chunk.token_ids
            positions.append(np.arange(chunk.start, chunk.computed_end))
            slots.append(table[chunk.start : chunk.computed_end])
            last_rows += range(len(ids) - chunk.num_rows, len(ids))
        num_missing = few_sizes(max(self.min_rows, len(ids))) - len(ids)
        made, restore = [], np.zeros(len(ids) + num_missing, dtype=np.int64)
        num_rows = 0
        for tables, parts in gathers:
            if len(tables) > 1:  # single tiles with the same number of keys: one batch
                parts = [(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), parts[0][2])]
            for rows, _, _ in parts:
                flat = rows.ravel()
                real = flat >= 0
                restore[flat[real]] = num_rows + np.flatnonzero(real)
                num_rows += len(flat)
            made.append(Gather(self._tensor(np.stack(tables)), tuple(self._group(*part) for part in parts)))
        last_rows += [0] * (few_sizes(max(self.min_rows, len(last_rows))) - len(last_rows))
        return StepPlan(
            input_ids=torch.tensor(ids + [0] * num_missing, device=self.device)[None],
            positions=self._tensor(np.concatenate([*positions, np.zeros(num_missing, dtype=np.int64)]))[None],
            slots=self._tensor(np.concatenate(slots)),
            gathers=tuple(made),
            restore=self._tensor(restore),
            last_rows=torch.tensor(last_rows, dtype=torch.long, device=self.device),
        )

    def _slot_table(self, chunk: Span, num_keys: int) -> np.ndarray:
        """Return the slots of positions 0 to `num_keys`; those past the chunk's end are the null block's."""
        table = np.zeros(num_keys, dtype=np.int64)
        blocks = np.asarray(chunk.block_table, dtype=np.int64)
        slots = (blocks[:, None] * self.block_size + np.arange(self.block_size)).ravel()
        table[: chunk.computed_end] = slots[: chunk.computed_end]
        return table

    def _group(self, rows: np.ndarray, positions: np.ndarray, num_keys: int) -> TileGroup:
        # A missing row takes any token's query; its result is never read.
        rows = np.where(rows < 0, rows.max(), rows)
        return TileGroup(self._tensor(rows), self._tensor(positions), num_keys)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


def few_sizes(num: int) -> int:
    """Return the next of eight sizes an octave, at most an eighth above ``num``.

    oneDNN makes and keeps a kernel for every shape that it meets; steps of any number of tokens would make thousands.

    >>> [few_sizes(num) for num in (1, 15, 17, 100, 1025)]
    [1, 15, 18, 104, 1152]
    """
    unit = 1 << max(0, num.bit_length() - 4)
    return -(-num // unit) * unit


def _tile(chunk: Span, offset: int, decode_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut a chunk's positions into tiles.

    Returns:
        The tiles' rows in the step (-1 where a tile's position is not in the chunk), their positions, both
        (tiles, QUERY_TILE), or (1, decode_rows) for a token alone, and the number of keys each looks at (tiles,).
    """
    if chunk.computed_end - chunk.start == 1:
        rows = np.full((1, decode_rows), -1)
        rows[0, 0] = offset
        positions = chunk.start + np.arange(decode_rows)[None]
        return rows, positions, np.array([chunk.start // KEY_TILE + 1]) * KEY_TILE
    tiles = np.arange(chunk.start // QUERY_TILE, (chunk.computed_end - 1) // QUERY_TILE + 1)
    positions = tiles[:, None] * QUERY_TILE + np.arange(QUERY_TILE)
    is_real = (positions >= chunk.start) & (positions < chunk.computed_end)
    rows = np.where(is_real, positions - chunk.start + offset, -1)
    num_keys = -(-(tiles + 1) * QUERY_TILE // KEY_TILE) * KEY_TILE
    return rows, positions, num_keys


def refuse_bias(bias: Tensor | None) -> None:
    """Refuse a layer that adds a bias to its scores.

    Raises:
        ConfigError: It does.
    """
    if bias is not None:
        raise ConfigError("The engine does not add position biases to paged attention; use model.new_state.")


def refuse_unpaged(model: nn.Module, layout: Sequence[LayerCache]) -> None:
    """Refuse a model of which a layer keeps more than keys and values.

    Raises:
        ConfigError: A layer has a recurrent state.
    """
    recurrent = [i for i, cache in enumerate(layout) if cache.fixed_size]
    if recurrent:
        raise ConfigError(
            f"Layer {recurrent[0]} of this {type(model).__name__} keeps a recurrent state, which the engine does not "
            "page. Decode it step by step with model.new_state(batch_size)."
        )


def rows_alone(model: nn.Module, layout: Sequence[LayerCache]) -> int:
    """Return the query rows of a token alone, of which every layer makes the bits of a tile.

    Other classes of attention, soft-caps and sinks are computed by other products, and keep the tile.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    weight = next(p for p in model.parameters() if p.is_floating_point())
    is_plain = all(layer.options.softcap is None and layer.sinks is None for layer in layers)
    is_whole = len(layers) == sum(cache.num_kv_heads > 0 for cache in layout)
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or not (is_plain and is_whole and layers):
        return QUERY_TILE
    sizes = {(layer.q.out_features // layer.k.out_features, layer.head_dim) for layer in layers}
    return max(decode_rows(group_size, head_dim, head_dim) for group_size, head_dim in sizes)


def smallest_product(model: nn.Module) -> int:
    """Return the multiply-adds of one row in the smallest linear layer, dense or low-bit."""
    sizes: list[Any] = [(layer.in_features, layer.out_features) for _, layer in linears(model)]
    return min(num_ins * num_outs for num_ins, num_outs in sizes)


class Runner:
    """Holds the model and the memory of the paged cache, and computes steps."""

    def __init__(self, model: nn.Module, *, num_blocks: int, block_size: int, kv_dtype: str | None = None):
        parameter = next(p for p in model.parameters() if p.is_floating_point())
        self.model: Any = model
        self.dtype, self.device = parameter.dtype, parameter.device
        layout = model.cache_layout()  # type: ignore[operator]
        refuse_unpaged(model, layout)
        self.stores = [make_store(num_blocks * block_size, c, self.dtype, self.device, kv_dtype) for c in layout]
        for pool in self.pools:
            pool[:block_size] = 0  # the null block
        self.hidden_rows: Tensor | None = None  # (R, D) what the last step's logits were made from
        smallest = min(smallest_product(model), *(p.numel() for p in model.parameters() if p.dim() == 2))
        self.planner = Planner(block_size, SMALL_PRODUCT // smallest + 1, self.device, rows_alone(model, layout))

    @property
    def pools(self) -> list[Tensor]:
        """The memory of each layer: (slots, K, Hk + Hv), or (slots, K, bytes) where it is rounded."""
        return [store.pool for store in self.stores]

    @staticmethod
    def block_bytes(model: Any, dtype: torch.dtype, block_size: int, kv_dtype: str | None = None) -> int:
        """Return the memory of one block over all layers."""
        return block_size * sum(slot_bytes(c, dtype, kv_dtype) for c in model.cache_layout())

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute a step's tokens and store their keys and values.

        Returns:
            (R, V) logits: of each chunk in order, as many rows as it wants (`Chunk.num_rows`), its last ones.
        """
        plan, state = self._prepare(chunks)
        seen = self._embed(plan, chunks)
        hidden = self.model.hidden(plan.input_ids, positions=plan.positions, state=state, **seen)  # (1, T, D)
        num_wanted = sum(chunk.num_rows for chunk in chunks)
        last = hidden.index_select(1, plan.last_rows)  # (1, R or more, D)
        self.hidden_rows = last[0]
        return self.model.lm_head(last)[0, :num_wanted]  # (R, V)

    def _prepare(self, chunks: Sequence[Span]) -> tuple[Any, Any]:
        """Return a step's layout and what the layers see of the cache."""
        plan = self.planner.plan(chunks)
        return plan, PagedState(self.stores, plan)

    def _embed(self, plan: Any, chunks: Sequence[Chunk]) -> dict[str, Tensor]:
        """Return the embedded input where pictures stand in it; nothing where the model may embed it itself."""
        if not any(chunk.request.pictures for chunk in chunks):
            return {}
        embedded = self.model.embed_tokens(plan.input_ids, plan.positions).clone()  # (1, T, D)
        row = 0
        for chunk in chunks:
            for place, picture in chunk.request.pictures:
                start, end = max(place, chunk.start), min(place + len(picture.vectors), chunk.computed_end)
                if start < end:
                    at = row - chunk.start
                    embedded[0, at + start : at + end] = picture.vectors[start - place : end - place]
            row += len(chunk.token_ids)
        return {"embedded": embedded}
