"""Batches in an order that a seed fixes, and that can be taken up again at any point.

A loader's whole state is (epoch, row): the rows of an epoch are made anew from the seed, so a resumed run sees the
same batches as an uninterrupted one, also across the end of an epoch. For many ranks, mixtures and rows on disk there
is `data.feed`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modelwright.base.errors import DataError
from modelwright.base.logs import get_logger
from modelwright.data.pack import Rows, document_positions

log = get_logger(__name__)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B rows."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, IGNORED where no loss is taken
    positions: Tensor | None = None  # (B, T) int64; None: 0..T-1
    mask: Tensor | None = None  # (B, 1, T, T) bool, True where attention may look; None: causal

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on another device."""
        moved = (t if t is None else t.to(device, non_blocking=True) for t in vars(self).values())
        return Batch(*moved)  # type: ignore[arg-type]


class RowLoader:
    """Endless batches from rows that are made once an epoch.

    Args:
        make_rows: From an epoch number to that epoch's rows, always the same ones for the same number.
        batch_size: Rows a batch; rows of an epoch that fill no whole batch are left out of that epoch. Where there are
            fewer rows than that in all, a warning says so, and batches have as many as there are.
    """

    def __init__(self, make_rows: Callable[[int], Rows], batch_size: int):
        self._make_rows = make_rows
        self.epoch = 0
        self.row = 0
        self._rows = make_rows(0)
        if len(self._rows) < 1:
            raise DataError("There is no row to train on. Give more data.")
        self.batch_size = min(batch_size, len(self._rows))
        if self.batch_size < batch_size:
            log.warning(
                "the data has %d rows, and a micro-batch of %d was asked for: batches have %d. Give more data or lower "
                "micro_batch_size.", len(self._rows), batch_size, self.batch_size,
            )  # fmt: skip

    def next_batch(self) -> Batch:
        """Return the next batch and move on."""
        part = self._advance()
        rows, documents = self._rows, self._rows.document_ids
        return make_batch(Rows(rows.input_ids[part], rows.labels[part], None if documents is None else documents[part]))

    def skip_batch(self) -> None:
        """Move on past a batch that another rank takes, without making it."""
        self._advance()

    def _advance(self) -> slice:
        size = min(self.batch_size, len(self._rows))
        if self.row + size > len(self._rows):
            self.epoch += 1
            self.row = 0
            self._rows = self._make_rows(self.epoch)
            size = min(self.batch_size, len(self._rows))
        part = slice(self.row, self.row + size)
        self.row += size
        return part

    def state(self) -> dict[str, int]:
        """Return where the loader stands."""
        return {"epoch": self.epoch, "row": self.row}

    def load_state(self, state: dict[str, int]) -> None:
        """Go to a place that `state` returned."""
        self.epoch, self.row = state["epoch"], state["row"]
        self._rows = self._make_rows(self.epoch)


def make_batch(rows: Rows) -> Batch:
    """Return rows as tensors, with positions and mask where they have boundaries."""
    inputs, labels = torch.from_numpy(rows.input_ids), torch.from_numpy(rows.labels)
    if rows.document_ids is None:
        return Batch(inputs, labels)
    positions = torch.from_numpy(document_positions(rows.document_ids))
    return Batch(inputs, labels, positions, block_causal_mask(rows.document_ids))


def block_causal_mask(document_ids: np.ndarray) -> Tensor:
    """Return (B, 1, T, T), True where a position may look: not ahead, and only within its own document.

    A padding position (-1) looks at itself alone, so that no row of the softmax is empty.
    """
    ids = torch.from_numpy(np.ascontiguousarray(document_ids))
    same = ids[:, :, None] == ids[:, None, :]
    length = ids.shape[1]
    mask = same & torch.ones(length, length, dtype=torch.bool).tril() & (ids >= 0)[:, :, None]
    return (mask | torch.eye(length, dtype=torch.bool))[:, None]


def repeat_rows(rows: Rows, seed: int) -> Callable[[int], Rows]:
    """Return a maker that gives the same rows every epoch, each time in another order."""

    def make(epoch: int) -> Rows:
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        documents = None if rows.document_ids is None else rows.document_ids[order]
        return Rows(rows.input_ids[order], rows.labels[order], documents)

    return make
