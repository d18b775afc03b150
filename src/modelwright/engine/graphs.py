"""Decode steps recorded once and replayed: no Python, no dispatch, one launch for a whole step on a GPU.

A recorded step reads fixed buffers: ids, positions, slots, tiles, work and block tables (`modelwright.nn.paged.Pages`).
`DecodeGraphs` fills them and replays. Sizes come in classes, two an octave for rows and factors of four for the parts
of keys; a step is padded to its class: the missing rows look at nothing and write to a scratch block that no request
has. Recording is lazy. The first step of a kind records the largest class, so that every later one has something to
replay and the memory of smaller ones fits into that of the largest; a closer class is recorded when it has been wanted
`PATIENCE` times. Results are copied to buffers outside of the recordings' common memory.

What cannot be recorded turns it off, with the reason (`why_not`): a trial run finds operations that wait for the device
(the routing of experts, rotations that depend on the length) before the device would. Steps with a chunk of a prompt,
drafts, adapters or a picture are computed as ever. `record` says how: `CudaRecorder`, or in tests a function that runs
the step again. Not done: recording steps that check drafts.
Source: CUDA graphs (NVIDIA 2019); the classes and the common memory as in vLLM's and nano-vllm's runners.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modelwright.base.logs import get_logger
from modelwright.engine.scheduler import Chunk
from modelwright.nn.paged import PART, Pages, TileGroup

log = get_logger(__name__)
PATIENCE = 8
WORK_STEP = 4
TILE_FIELDS = 5
aten = torch.ops.aten
WAITING = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten.is_nonzero, aten.equal),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive),
}
Replay = Callable[[], Any]


@dataclass(frozen=True)
class PagePlan:
    """The layout of one step over `Pages`."""

    input_ids: Tensor  # (1, T); T counts the padding too
    positions: Tensor  # (1, T)
    pages: Pages
    last_rows: Tensor  # (R,) the tokens after which logits are wanted


@dataclass(frozen=True)
class Limits:
    """What the buffers must hold."""

    min_rows: int  # a step is padded to so many at least
    max_rows: int  # a step of more is not recorded
    max_keys: int  # of a sequence
    block_size: int
    scratch_slot: int  # where padding is written

    @property
    def blocks_per_row(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_keys // self.block_size)


class WaitsError(RuntimeError):
    """An operation that cannot be recorded, because it waits for what the device has computed."""


class NoWaiting(TorchDispatchMode):
    """Refuses operations whose result decides on the host what is computed next."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or refuse it.

        Raises:
            WaitsError: It waits for the device.
        """
        packet = func.overloadpacket
        indices = args[1] if packet in (aten.index, aten.index_put, aten.index_put_) else ()
        is_masked = any(x is not None and x.dtype == torch.bool for x in indices)
        if packet in WAITING or is_masked:
            raise WaitsError(f"it waits for the device ({packet})")
        return func(*args, **(kwargs or {}))


class CudaRecorder:
    """Records work as a CUDA graph; all of them share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, work: Callable[[], Any]) -> Replay:
        """Run the work twice, so that kernels are compiled and libraries have their workspaces, and record it."""
        stream, present = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(present)
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        present.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may load an adapter or look at a picture meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        self._pool = self._pool or graph.pool()
        return graph.replay


def row_classes(min_rows: int, max_rows: int) -> list[int]:
    """Return the numbers of rows that steps are padded to.

    >>> row_classes(1, 20), row_classes(5, 40)
    ([1, 2, 3, 4, 6, 8, 12, 16, 20], [5, 6, 8, 12, 16, 24, 32, 40])
    """
    steps = {1 << n for n in range(20)} | {3 << n for n in range(19)}
    return sorted({min_rows, max(min_rows, max_rows)} | {n for n in steps if min_rows < n < max_rows})


class DecodeGraphs:
    """Replays decode steps.

    Args:
        compute: Computes a step: (hidden rows (R, D), logits (R, V)).
        limits: Of what is recorded.
        device: Where the buffers are.
        record: Makes a replay of work.
        weights: Of which the addresses are part of what is recorded.
    """

    def __init__(
        self,
        compute: Callable[[PagePlan], tuple[Tensor, Tensor]],
        limits: Limits,
        device: torch.device,
        record: Callable[[Callable[[], Any]], Replay],
        weights: nn.Module,
    ):
        self._compute, self.limits, self._record = compute, limits, record
        # Where the weights hang: a graph has their addresses in it, and would go on reading memory that is others'.
        self._places = [
            (kept, name)
            for module in weights.modules()
            for kept in (module._parameters, module._buffers)
            for name, tensor in kept.items()
            if tensor is not None
        ]
        self.why_not: str | None = None  # why nothing is recorded any more
        self.num_replays = 0
        self._rows = row_classes(limits.min_rows, limits.max_rows)
        self._max_parts = -(-limits.max_keys // PART)
        most = self._rows[-1]
        size = most * (3 + TILE_FIELDS + limits.blocks_per_row) + 2 * self._work_of(most, most * self._max_parts)
        self._host = np.zeros(size, dtype=np.int64)
        self._numbers = torch.zeros(size, dtype=torch.int64, device=device)  # every recording's buffers
        self._recorded: dict[tuple[int, int], Replay] = {}
        self._wanted: Counter[tuple[int, int]] = Counter()
        self._last = (0, 0)
        self._out: tuple[Tensor, Tensor] | None = None  # hidden and logits of the last replay
        self._addresses: list[int] = []

    def run(self, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor] | None:
        """Replay a step; (R, D) and (R, V), which the next replay overwrites. None: it has to be computed as ever."""
        if self.why_not is not None or len(chunks) > self._rows[-1] or not all(map(is_plain_decode, chunks)):
            return None
        self._check_weights()
        num_work = sum((chunk.start // PART) + 1 for chunk in chunks)
        chosen, is_new = self._choose(len(chunks), num_work)
        self._fill(chosen, chunks)
        if is_new and not self._try_to_record(chosen):
            return None
        assert self._out is not None
        self._recorded[chosen]()
        self._last = chosen
        self.num_replays += 1
        return self._out[0][: len(chunks)].clone(), self._out[1][: len(chunks)]

    @torch.inference_mode()
    def again(self) -> None:
        """Replay the last replayed step once more, for measuring."""
        self._recorded[self._last]()

    def _check_weights(self) -> None:
        """Drop what was recorded if a weight has another address than then."""
        addresses = [0 if (tensor := kept[name]) is None else tensor.data_ptr() for kept, name in self._places]
        if addresses != self._addresses:
            if self._recorded:
                log.info("weights were replaced: decode steps are recorded anew")
            self._recorded.clear()
            self._wanted.clear()
            self._addresses = addresses

    def _choose(self, num_rows: int, num_work: int) -> tuple[tuple[int, int], bool]:
        """Return the class (rows, work) to replay, and whether it has to be recorded first."""
        rows = next(size for size in self._rows if size >= num_rows)
        closest = (rows, self._work_of(rows, num_work))
        if closest in self._recorded:
            return closest, False
        fits = [found for found in self._recorded if found[0] >= num_rows and found[1] >= num_work]
        if not fits:
            most = self._rows[-1]
            return (most, self._work_of(most, num_work)), True
        self._wanted[closest] += 1
        return (closest, True) if self._wanted[closest] >= PATIENCE else (min(fits), False)

    def _work_of(self, rows: int, num_work: int) -> int:
        """Return the next of the sizes for pieces of work: as many as rows, four times as many, and so on."""
        size = rows
        while size < num_work:
            size *= WORK_STEP
        return min(size, max(rows, rows * self._max_parts))

    def _views(self, chosen: tuple[int, int], numbers: Any) -> list[Any]:
        """Cut a buffer into ids, positions, slots, tiles, work and tables of a class."""
        rows, work = chosen
        views, at = [], 0
        for shape in ((rows,), (rows,), (rows,), (rows, TILE_FIELDS), (work, 2)):
            views.append(numbers[at : at + int(np.prod(shape))].reshape(shape))
            at += int(np.prod(shape))
        return [*views, numbers[at : at + rows * self.limits.blocks_per_row]]

    def _fill(self, chosen: tuple[int, int], chunks: Sequence[Chunk]) -> None:
        """Write a step's numbers and the padding's into the buffers; what stands behind the tables stays."""
        num, size = len(chunks), self.limits.block_size
        ids, positions, slots, tiles, work, tables = self._views(chosen, self._host)
        blocks = [chunk.block_table[: chunk.start // size + 1] for chunk in chunks]
        flat = np.fromiter((block for table in blocks for block in table), dtype=np.int64)
        lengths = np.array([len(table) for table in blocks], dtype=np.int64)
        ends = lengths.cumsum()
        ids[:num], ids[num:] = [chunk.token_ids[0] for chunk in chunks], 0
        positions[:num], positions[num:] = [chunk.start for chunk in chunks], 0
        slots[:num] = flat[ends - 1] * size + positions[:num] % size
        slots[num:] = self.limits.scratch_slot
        tables[: len(flat)] = flat
        parts = positions[:num] // PART + 1
        first_work = parts.cumsum() - parts
        tiles[:, 0], tiles[:, 1] = np.arange(len(tiles)), 1
        tiles[:num, 2], tiles[:num, 3], tiles[:num, 4] = ends - lengths, positions[:num], first_work
        tiles[num:, 2], tiles[num:, 3], tiles[num:, 4] = 0, -1, 0
        num_work = int(parts.sum())
        work[:num_work, 0] = np.repeat(np.arange(num), parts)
        work[:num_work, 1] = np.arange(num_work) - np.repeat(first_work, parts)
        work[num_work:] = -1
        used = len(tiles) * (3 + TILE_FIELDS) + work.size + len(flat)
        self._numbers[:used].copy_(torch.from_numpy(self._host[:used]))

    def _plan(self, chosen: tuple[int, int]) -> PagePlan:
        """Return the plan of a class, which reads the buffers."""
        rows, num_work = chosen
        ids, positions, slots, tiles, work, tables = self._views(chosen, self._numbers)
        group = TileGroup(tiles, 1, work if num_work > rows else None)  # of one part each: no need to keep parts
        num_keys = min(self.limits.max_keys, num_work * PART)
        last_rows = torch.arange(rows, device=self._numbers.device)
        return PagePlan(ids[None], positions[None], Pages(slots, tables, (group,), num_keys), last_rows)

    def _try_to_record(self, chosen: tuple[int, int]) -> bool:
        """Record a class, or turn recording off and say why."""
        plan = self._plan(chosen)
        try:
            if self._out is None:
                with NoWaiting():
                    out = self._compute(plan)
                self._out = (out[0].new_empty(self._rows[-1], out[0].shape[1]),
                             out[1].new_empty(self._rows[-1], out[1].shape[1]))  # fmt: skip
            self._recorded[chosen] = self._record(self._work(plan, chosen[0], self._out))
        except RuntimeError as error:  # out of memory is one, too
            self.why_not = str(error)
            self._recorded.clear()
            log.warning("decode steps are not recorded on this device, which costs time: %s", error)
            return False
        return True

    def _work(self, plan: PagePlan, rows: int, out: tuple[Tensor, Tensor]) -> Callable[[], None]:
        def work() -> None:
            for target, found in zip(out, self._compute(plan), strict=True):
                target[:rows].copy_(found)

        return work


def is_plain_decode(chunk: Chunk) -> bool:
    """Tell whether a chunk is one token whose logits are wanted, computed by the model's own weights from its id."""
    request = chunk.request
    return (
        chunk.computed_end - chunk.start == 1
        and chunk.num_rows == 1
        and request.adapter is None
        and not any(place <= chunk.start < place + len(picture.vectors) for place, picture in request.pictures)
    )
