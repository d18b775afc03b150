"""Batches for one rank of many, in an order that a few numbers fix: the loader of large runs.

The one idea: the samples of a run form one endless sequence, the same for every number of ranks and of workers. A
`Sequencer` says which sample stands at each place; its whole state is a few integers that count what *all* ranks have
taken. Rank r of W takes its part of each global batch, so over the ranks every sample comes exactly once an epoch, and
a run can be taken up with other ranks, workers or batch sizes at exactly the sample where it stopped. A batch may hold
the end of one epoch and the beginning of the next; nothing is left out.

Workers only fetch rows ahead of time; the state counts what was handed out, never what was fetched.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt

from modelwright.base.errors import CheckpointError, ConfigError, DataError
from modelwright.data.load import Batch, make_batch
from modelwright.data.pack import IGNORED, Rows

State = dict[str, int]
Picks = npt.NDArray[np.int64]  # (samples, 2): number of the source, number of its row
Order = Callable[[int], npt.NDArray[np.int64]]  # from an epoch to the rows in the order they come


class RowSource(Protocol):
    """Rows that can be asked for by number."""

    def __len__(self) -> int:
        """Return how many rows there are."""
        ...

    def rows(self, indices: npt.NDArray[np.int64]) -> Rows:
        """Return the rows of these numbers; ``document_ids`` is None for all of them or for none."""
        ...


class HeldRows:
    """Rows that are in memory already."""

    def __init__(self, rows: Rows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, indices: npt.NDArray[np.int64]) -> Rows:
        """Return the rows of these numbers."""
        documents = self._rows.document_ids
        return Rows(
            self._rows.input_ids[indices],
            self._rows.labels[indices],
            None if documents is None else documents[indices],
        )


class Sequencer(Protocol):
    """The endless sequence of samples."""

    def start(self) -> State:
        """Return the state before the first sample."""
        ...

    def advance(self, state: State, num: int) -> tuple[Picks, State]:
        """Return the next samples after a state, and the state after them. The state given is not changed."""
        ...


def shuffled(num_rows: int, seed: int) -> Order:
    """Return an order that is another permutation of all rows in each epoch."""

    def order(epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([seed, epoch]).permutation(num_rows)

    return order


class Epochs:
    """One source, an order for each epoch.

    Args:
        order: From an epoch number to its rows, always the same for the same number.
        source: Number of the source among those of the feed.
    """

    def __init__(self, order: Order, source: int = 0):
        self._order, self._source = order, source
        self._kept: tuple[int, npt.NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def start(self) -> State:
        """Return the beginning of the first epoch."""
        return {"epoch": 0, "row": 0}

    def advance(self, state: State, num: int) -> tuple[Picks, State]:
        """Return the next samples, across the ends of epochs."""
        epoch, row = state["epoch"], state["row"]
        parts: list[npt.NDArray[np.int64]] = []
        while num > 0:
            rows = self._rows_of(epoch)
            part = rows[row : row + num]
            parts.append(part)
            num, row = num - len(part), row + len(part)
            if row >= len(rows):
                epoch, row = epoch + 1, 0
        indices = np.concatenate(parts) if parts else np.empty(0, np.int64)
        return np.stack([np.full_like(indices, self._source), indices], axis=1), {"epoch": epoch, "row": row}

    def _rows_of(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._kept[0] != epoch:
            rows = np.asarray(self._order(epoch), dtype=np.int64)
            if not len(rows):
                raise DataError(f"Epoch {epoch} has no row to train on. Give more data, or another order.")
            self._kept = (epoch, rows)
        return self._kept[1]


class Feed:
    """Endless batches of one rank; fits where `RowLoader` does.

    Args:
        sources: Where rows come from, by the numbers that the sequencer uses.
        sequencer: Which sample comes when.
        batch_size: Rows of a batch of this rank.
        rank: Number of this process among those that train together.
        num_ranks: How many these are.
        num_workers: Threads that fetch batches ahead; 0: none is fetched before it is asked for.
    """

    def __init__(
        self,
        sources: Sequence[RowSource],
        sequencer: Sequencer,
        batch_size: int,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        num_workers: int = 0,
    ):
        if batch_size < 1 or not 0 <= rank < num_ranks or num_workers < 0:
            raise ConfigError(
                f"batch_size is {batch_size}, rank {rank} of {num_ranks}, num_workers {num_workers}; expected at least "
                "1 row, a rank from 0 to below the number of ranks, and workers from 0 on."
            )
        self._sources, self._sequencer = list(sources), sequencer
        self.batch_size, self.rank, self.num_ranks = batch_size, rank, num_ranks
        self._state = sequencer.start()
        self._ahead = self._state  # after the last batch that is being fetched
        self._num_ahead = 2 * num_workers
        self._pool = ThreadPoolExecutor(num_workers, "feed") if num_workers else None
        self._fetching: deque[tuple[Future[Batch], State]] = deque()

    def next_batch(self) -> Batch:
        """Return this rank's next batch and move on."""
        if self._pool is None:
            picks, self._state = self._next_picks(self._state)
            return self._fetch(picks)
        while len(self._fetching) < self._num_ahead:
            picks, self._ahead = self._next_picks(self._ahead)
            self._fetching.append((self._pool.submit(self._fetch, picks), self._ahead))
        future, self._state = self._fetching.popleft()
        return future.result()

    def skip_batch(self) -> None:
        """Move on past a batch that another rank takes, without making it where none is fetched ahead."""
        if self._pool is None:
            self._state = self._next_picks(self._state)[1]
        else:
            self.next_batch()

    def _next_picks(self, state: State) -> tuple[Picks, State]:
        picks, state = self._sequencer.advance(state, self.batch_size * self.num_ranks)
        return picks[self.rank * self.batch_size : (self.rank + 1) * self.batch_size], state

    def _fetch(self, picks: Picks) -> Batch:
        parts = {
            source: self._sources[source].rows(picks[picks[:, 0] == source, 1]) for source in np.unique(picks[:, 0])
        }
        return make_batch(_join(parts, picks[:, 0]))

    def state(self) -> State:
        """Return where all ranks together stand."""
        return dict(self._state)

    def load_state(self, state: State) -> None:
        """Go to a place that `state` returned, here or in a feed of other ranks, workers or batch size.

        Raises:
            CheckpointError: The state is of another kind of feed.
        """
        expected = self._sequencer.start()
        if set(state) != set(expected):
            raise CheckpointError(
                f"The place in the data has the entries {', '.join(sorted(state))}; this feed has "
                f"{', '.join(sorted(expected))}. Go on with the sources that the run began with."
            )
        for future, _ in self._fetching:
            future.cancel()
        self._fetching.clear()
        self._state = self._ahead = dict(state)

    def close(self) -> None:
        """Stop the workers."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _join(parts: Mapping[int, Rows], sources: npt.NDArray[np.int64]) -> Rows:
    """Put rows of several sources into the order of the samples; one source's boundaries give all rows some."""
    first = next(iter(parts.values()))
    if len(parts) == 1:
        return first
    if len({rows.input_ids.shape[1] for rows in parts.values()}) > 1:
        widths = ", ".join(str(rows.input_ids.shape[1]) for rows in parts.values())
        raise ConfigError(f"The sources have rows of {widths} tokens; all of a mixture need one length.")
    shape = (len(sources), first.input_ids.shape[1])
    inputs, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    has_documents = any(rows.document_ids is not None for rows in parts.values())
    documents = np.zeros(shape, np.int32) if has_documents else None
    for source, rows in parts.items():
        at = sources == source
        inputs[at], labels[at] = rows.input_ids, rows.labels
        if documents is not None and rows.document_ids is not None:
            documents[at] = rows.document_ids
    return Rows(inputs, labels, documents)
