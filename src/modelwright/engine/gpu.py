"""Steps on a GPU: attention by Triton over block tables, and decode steps replayed as CUDA graphs.

The same model modules run as in `modelwright.engine.runner`; two things differ. Attention reads keys and values where
they lie (`modelwright.nn.paged`) and does not gather them, with one row's result the same in any company. Steps that
only decode are recorded and replayed (`modelwright.engine.graphs`), since at one user a thousand launches take longer
than reading the weights. `refusal` says which engines are computed by PyTorch's operations as ever.

On a CPU the same runner works with the kernels' plain twins, which is how it is tested: nothing here has been run on a
GPU yet. Matrix products are cuBLAS's, whose rounding depends on the number of rows: the promise of equal bits is for
CPUs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelwright.base.logs import get_logger
from modelwright.engine.graphs import CudaRecorder, DecodeGraphs, Limits, PagePlan, Replay
from modelwright.engine.kv_store import PlainStore
from modelwright.engine.runner import PagedState, Runner, Span, refuse_bias
from modelwright.engine.scheduler import Chunk
from modelwright.models.decoder import LayerCache
from modelwright.nn.attention import NO_RULE, AttentionRule
from modelwright.nn.paged import PART, Cache, Pages, TileGroup, attend_pages, tile_span, write_pages
from modelwright.nn.rope import RotaryTable

log = get_logger(__name__)
# Chunks of more tokens are walked over by one program a tile: so many tiles keep a GPU busy, and their parts, kept
# apart, would be read and written more than the keys.
MAX_SPLIT_TOKENS = 64
OLDEST = (8, 0)  # compute capability with bfloat16 products: Ampere


class PagesState(PagedState):
    """What the attention layers see of the cache during one step."""

    def __init__(self, stores: Sequence[Any], pages: Pages, block_size: int):
        self.stores, self.pages, self.block_size = stores, pages, block_size

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
        """Store a layer's new keys and values and return what the queries see; as `PagedState.attend`."""
        refuse_bias(bias)
        store: Any = self.stores[layer_index]
        cache = Cache(store.pool, self.block_size, store.cache.key_dim)
        write_pages(cache, k[0], v[0], self.pages.slots)
        return attend_pages(q[0], cache, self.pages, scale=scale, rule=rule)[None]


class PagePlanner:
    """Lays out a step as `Pages`: any mix of chunks."""

    def __init__(self, limits: Limits, span: int, device: torch.device):
        self.limits, self.span, self.device = limits, span, device

    def plan(self, chunks: Sequence[Span]) -> PagePlan:
        """Return the layout of one step."""
        size = self.limits.block_size
        ids: list[int] = []
        tables: list[int] = []
        last_rows: list[int] = []
        positions, slots = [], []
        few: list[np.ndarray] = []
        many: list[np.ndarray] = []
        num_work, longest = 0, 0
        for chunk in chunks:
            at = np.arange(chunk.start, chunk.computed_end)
            blocks = np.asarray(chunk.block_table, dtype=np.int64)
            tiles = _tiles(len(ids), chunk, self.span, len(tables))
            if len(at) <= MAX_SPLIT_TOKENS:
                parts = _num_parts(tiles)
                tiles[:, 4] = num_work + parts.cumsum() - parts
                num_work += int(parts.sum())
                few.append(tiles)
            else:
                many.append(tiles)
            positions.append(at)
            slots.append(blocks[at // size] * size + at % size)
            ids += chunk.token_ids
            tables += chunk.block_table
            last_rows += range(len(ids) - chunk.num_rows, len(ids))
            longest = max(longest, chunk.computed_end)
        missing = max(0, self.limits.min_rows - len(ids))
        last_rows += [0] * (self.limits.min_rows - len(last_rows))
        groups = [self._group(np.concatenate(x), x is few) for x in (few, many) if x]
        pages = Pages(
            slots=self._tensor(np.concatenate([*slots, np.full(missing, self.limits.scratch_slot)])),
            tables=self._tensor(np.array(tables)),
            groups=tuple(groups),
            num_keys=longest,
        )
        return PagePlan(
            input_ids=self._tensor(np.array(ids + [0] * missing))[None],
            positions=self._tensor(np.concatenate([*positions, np.zeros(missing, dtype=np.int64)]))[None],
            pages=pages,
            last_rows=self._tensor(np.array(last_rows, dtype=np.int64)),
        )

    def _group(self, tiles: np.ndarray, is_few: bool) -> TileGroup:
        parts = _num_parts(tiles)
        if not is_few or parts.max() == 1:
            return TileGroup(self._tensor(tiles), self.span)
        work = np.stack((np.repeat(np.arange(len(tiles)), parts), np.arange(parts.sum())), axis=1)
        work[:, 1] -= np.repeat(tiles[:, 4], parts)
        return TileGroup(self._tensor(tiles), self.span, self._tensor(work))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)


def _tiles(first_row: int, chunk: Span, span: int, table: int) -> np.ndarray:
    """Cut a chunk into tiles; the first piece of work is not known yet."""
    starts = np.arange(chunk.start, chunk.computed_end, span, dtype=np.int64)
    counts = np.minimum(span, chunk.computed_end - starts)
    same = np.full(len(starts), table)
    return np.stack((first_row + starts - chunk.start, counts, same, starts, np.zeros_like(starts)), axis=1)


def _num_parts(tiles: np.ndarray) -> np.ndarray:
    """Return the parts of keys that each tile looks at, all of those behind its window counted."""
    return -(-(tiles[:, 3] + tiles[:, 1]) // PART)


class GpuRunner(Runner):
    """Computes steps as `Runner` does, by paged attention and recorded decode steps.

    Args:
        model: One that `refusal` lets pass; on a CPU any that is not recurrent.
        num_blocks: Of the cache, the null block included; one more is made for what padding writes.
        block_size: Positions in a block.
        max_rows: Requests in one step at most.
        record: Makes a replay of work; None: CUDA graphs.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_blocks: int,
        block_size: int,
        max_rows: int = 32,
        record: Callable[[Callable[[], Any]], Replay] | None = None,
    ):
        super().__init__(model, num_blocks=num_blocks + 1, block_size=block_size)
        self.limits = Limits(
            min_rows=1 if self.device.type == "cuda" else self.planner.min_rows,
            max_rows=max_rows,
            max_keys=self.model.config.max_seq_len,
            block_size=block_size,
            scratch_slot=num_blocks * block_size,
        )
        num_heads = self.model.config.num_heads
        span = min(tile_span(num_heads // store.cache.num_kv_heads) for store in self._plain_stores())
        self.page_planner = PagePlanner(self.limits, span, self.device)
        self.graphs = DecodeGraphs(self._compute, self.limits, self.device, record or CudaRecorder(), self.model)
        self.graphs.why_not = _unrecorded(model)

    def _plain_stores(self) -> list[PlainStore]:
        return [store for store in self.stores if isinstance(store, PlainStore)]

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute a step's tokens and store their keys and values; as `Runner.run`.

        The result is good until the next step.
        """
        found = self.graphs.run(chunks)
        if found is None:
            return super().run(chunks)
        self.hidden_rows, logits = found
        return logits

    def _prepare(self, chunks: Sequence[Span]) -> tuple[PagePlan, PagesState]:
        plan = self.page_planner.plan(chunks)
        return plan, PagesState(self.stores, plan.pages, self.limits.block_size)

    def _compute(self, plan: PagePlan) -> tuple[Tensor, Tensor]:
        """Return the hidden rows (R, D) and the logits (R, V) of a step that decodes."""
        state = PagesState(self.stores, plan.pages, self.limits.block_size)
        hidden = self.model.hidden(plan.input_ids, positions=plan.positions, state=state)  # (1, T, D)
        return hidden[0], self.model.lm_head(hidden)[0]


def _unrecorded(model: nn.Module) -> str | None:
    """Return why a model's decode steps cannot be recorded, as far as it can be told before a trial."""
    for table in model.modules():
        if isinstance(table, RotaryTable) and table.scaling is not None and table.scaling.is_length_dependent:
            return f"the rotation ({table.scaling.kind}) depends on the length, which the host has to know"
    return None


def refusal(model: nn.Module, kv_dtype: str | None) -> str | None:
    """Return why an engine's steps are left to PyTorch's operations; None when they are not."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    if weight.device.type != "cuda":
        return f"its weights are on {weight.device}, not on an NVIDIA GPU"
    if torch.cuda.get_device_capability(weight.device) < OLDEST:
        return f"{torch.cuda.get_device_name(weight.device)} is older than Ampere"
    return unpaged(model, weight.dtype, kv_dtype)


def unpaged(model: nn.Module, dtype: torch.dtype, kv_dtype: str | None) -> str | None:
    """Return why a model's cache is not read by the kernel, whatever the device; None when it is."""
    if kv_dtype is not None:
        return f"its cache is not rounded, and kv_dtype is {kv_dtype!r}"
    layout: list[LayerCache] = model.cache_layout()  # type: ignore[operator]
    if any(cache.fixed_size for cache in layout):
        return f"a {type(model).__name__} keeps a recurrent state"
    num_heads = getattr(model.config, "num_heads", 0)
    if not num_heads or any(num_heads % cache.num_kv_heads for cache in layout):
        return f"a {type(model).__name__} does not tell its query heads"
    try:
        from modelwright.nn.kernels import paged_triton
    except ImportError:
        return "Triton is not installed (the extra 'gpu')"
    reasons = (paged_triton.refusal(cache.key_dim, cache.value_dim, dtype) for cache in layout)
    return next((reason for reason in reasons if reason is not None), None)


def make_runner(
    model: nn.Module,
    *,
    num_blocks: int,
    block_size: int,
    kv_dtype: str | None = None,
    kernels: str | None = None,
    max_rows: int = 32,
) -> Runner:
    """Return what computes a model's steps through its own modules: on a GPU by the kernels, else by PyTorch."""
    if kernels != "plain":
        why_not = refusal(model, kv_dtype)
        if why_not is None:
            return GpuRunner(model, num_blocks=num_blocks, block_size=block_size, max_rows=max_rows)
        if next(model.parameters()).is_cuda:
            log.info("steps are computed by PyTorch's operations: %s", why_not)
    return Runner(model, num_blocks=num_blocks, block_size=block_size, kv_dtype=kv_dtype)
