"""Batches of examples of unequal length: padded to the longest of the batch, in an order that a seed fixes.

What is random about an example (which tokens are hidden, where a text is cut) is drawn from the seed, the epoch and the
example's number, never from its place in a batch: any split into micro-batches and ranks sees the same examples, and a
run that is taken up again goes on with them.

Not done: sorting by length (the order of a shuffled epoch is kept), packing (see `data.pack`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modelwright.base.errors import ConfigError, DataError

Collate = Callable[[Sequence[int], int], Any]  # numbers of examples and the epoch -> a batch


@dataclass(frozen=True)
class TextBatch:
    """One micro-batch for an encoder; labels are what the objective makes of them."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # tokens (B, T), classes (B,), spans (B, 2) int64; values (B, C) float32
    attention_mask: Tensor  # (B, T) int64, 1 for tokens
    token_type_ids: Tensor | None = None  # (B, T) int64; None: the model has one type

    def to(self, device: torch.device) -> "TextBatch":
        """Return the batch on another device."""
        return move(self, device)

    def inputs(self) -> dict[str, Tensor]:
        """Return what the model is called with, beside the ids."""
        types = {} if self.token_type_ids is None else {"token_type_ids": self.token_type_ids}
        return {"attention_mask": self.attention_mask, **types}


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch for an encoder-decoder."""

    input_ids: Tensor  # (B, S) int64, read by the encoder
    labels: Tensor  # (B, T) int64, written by the decoder; IGNORED behind the end
    attention_mask: Tensor  # (B, S) int64
    decoder_input_ids: Tensor  # (B, T) int64: the labels one later, behind the start token

    def to(self, device: torch.device) -> "PairBatch":
        """Return the batch on another device."""
        return move(self, device)


@dataclass(frozen=True)
class GroupBatch:
    """One micro-batch of groups of texts: an anchor, its positive, and perhaps hard negatives."""

    input_ids: Tensor  # (B, K, T) int64
    attention_mask: Tensor  # (B, K, T) int64
    token_type_ids: Tensor | None = None  # (B, K, T) int64, for pairs of a query and a passage
    classes: Tensor | None = None  # (B, K) int64: texts of one class are no negatives of each other

    def to(self, device: torch.device) -> "GroupBatch":
        """Return the batch on another device."""
        return move(self, device)


@dataclass(frozen=True)
class SeriesBatch:
    """One micro-batch of windows of a series."""

    inputs: Tensor  # (B, window) float32
    labels: Tensor  # (B,) float32

    def to(self, device: torch.device) -> "SeriesBatch":
        """Return the batch on another device."""
        return move(self, device)


def move(batch: Any, device: torch.device) -> Any:
    """Return a dataclass of tensors on another device; what is None stays None."""
    values = (getattr(batch, field.name) for field in fields(batch))
    return type(batch)(*(None if v is None else v.to(device, non_blocking=True) for v in values))


def pad(rows: Sequence[Sequence[int] | npt.NDArray[np.int64]], fill: int) -> Tensor:
    """Return rows of ids as one tensor, filled up on the right, (B, T).

    >>> pad([[5], [6, 7]], 0)
    tensor([[5, 0],
            [6, 7]])
    """
    width = max(1, *map(len, rows), 1)
    out = torch.full((len(rows), width), fill, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.from_numpy(np.array(row, dtype=np.int64))
    return out


def length_mask(rows: Sequence[Sequence[int] | npt.NDArray[np.int64]]) -> Tensor:
    """Return 1 for the tokens of padded rows and 0 behind them, (B, T)."""
    return pad([np.ones(len(row), dtype=np.int64) for row in rows], 0)


def shift_right(labels: Tensor, start_id: int, pad_id: int, ignored: int = -100) -> Tensor:
    """Return what a decoder reads to write ``labels`` (B, T): the start token, and each label one later."""
    shifted = torch.cat([torch.full_like(labels[:, :1], start_id), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == ignored, pad_id)


class ExampleLoader:
    """Endless batches of examples in a new order each epoch; nothing of an epoch is left out.

    Args:
        num_examples: How many there are.
        collate: From the numbers of examples and their epoch to a batch.
        batch_size: Examples a batch of this rank.
        seed: Decides the order.
        rank: Number of this process among those that see different data.
        num_ranks: How many these are.
    """

    def __init__(
        self, num_examples: int, collate: Collate, batch_size: int, *, seed: int = 0, rank: int = 0, num_ranks: int = 1
    ):
        if num_examples < 1:
            raise DataError("There is no example to train on. Give more data.")
        if batch_size < 1 or not 0 <= rank < num_ranks:
            raise ConfigError(
                f"batch_size is {batch_size} and rank {rank} of {num_ranks}; expected at least 1, and a rank below."
            )
        self.num_examples, self.batch_size = num_examples, batch_size
        self._collate, self._seed, self._rank, self._num_ranks = collate, seed, rank, num_ranks
        self.epoch = 0
        self.row = 0
        self._order = self._shuffle(0)

    def _shuffle(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(self.num_examples)

    def next_batch(self) -> Any:
        """Return this rank's next batch and move on; at the end of an epoch it is shorter."""
        if self.row >= self.num_examples:
            self.epoch, self.row = self.epoch + 1, 0
            self._order = self._shuffle(self.epoch)
        whole = self._order[self.row : self.row + self.batch_size * self._num_ranks]
        self.row += len(whole)
        mine = np.array_split(whole, self._num_ranks)[self._rank]
        if not len(mine):  # every rank needs a batch; the shortest one repeats an example of the epoch
            mine = whole[:1]
        return self._collate(mine.tolist(), self.epoch)

    def state(self) -> dict[str, int]:
        """Return where the loader stands."""
        return {"epoch": self.epoch, "row": self.row}

    def load_state(self, state: dict[str, int]) -> None:
        """Go to a place that `state` returned."""
        self.epoch, self.row = state["epoch"], state["row"]
        self._order = self._shuffle(self.epoch)


def random_of(seed: int, epoch: int, number: int) -> np.random.Generator:
    """Return the draws of one example in one epoch."""
    return np.random.default_rng([seed, epoch, number])
