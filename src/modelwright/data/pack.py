"""Rows of equal length from texts of unequal length.

`stream_rows` cuts one long stream of documents (pre-training: every position is used, documents end in a separator).
`pack_rows` lays short examples whole into rows, longest first into the fullest row that has room (best-fit
decreasing; Johnson 1973), and remembers where each example begins so that attention can stop there.
Source for packing with boundaries: Krell et al. 2021, arXiv:2107.02027.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modelwright.base.errors import DataError

IGNORED = -100  # label of a position that no loss is taken at


@dataclass(frozen=True)
class Rows:
    """Rows ready to train on; T is the row length, R the number of rows."""

    input_ids: np.ndarray  # (R, T) int64
    labels: np.ndarray  # (R, T) int64; the token that follows each position, or IGNORED
    document_ids: np.ndarray | None = None  # (R, T) int32, which example a position belongs to; None: no boundaries
    num_examples: int = 0  # examples that were packed; 0 for a stream
    num_dropped: int = 0  # examples left out: longer than a row, or without a token to learn

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_trained_tokens(self) -> int:
        """Positions that a loss is taken at."""
        return int((self.labels != IGNORED).sum())


def stream_rows(documents: Sequence[np.ndarray], row_len: int, separator_id: int, seed: int) -> Rows:
    """Join the documents in a random order, each behind a separator, and cut the stream into rows.

    Args:
        documents: Token ids of each document, (length,).
        row_len: T.
        separator_id: Put before each document, and after the last.
        seed: Decides the order and where the first row begins.

    Raises:
        DataError: All documents together are shorter than one row.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(documents))
    separator = np.array([separator_id], dtype=np.int64)
    pieces = [piece for i in order for piece in (separator, np.asarray(documents[i], dtype=np.int64))]
    stream = np.concatenate([*pieces, separator])
    if len(stream) < row_len + 1:
        raise DataError(
            f"The training text has {len(stream)} tokens, but one row needs {row_len + 1}. "
            "Give more text or a smaller max_seq_len."
        )
    offset = int(random.integers(0, min(row_len, len(stream) - row_len)))
    num_rows = (len(stream) - 1 - offset) // row_len
    used = stream[offset : offset + num_rows * row_len + 1]
    inputs = used[:-1].reshape(num_rows, row_len)
    labels = used[1:].reshape(num_rows, row_len)
    shuffled = random.permutation(num_rows)
    return Rows(inputs[shuffled], labels[shuffled])


def pack_rows(examples: Sequence[tuple[Sequence[int], Sequence[bool]]], row_len: int, pad_id: int) -> Rows:
    """Lay whole examples into rows of ``row_len`` positions.

    Args:
        examples: For each, its token ids and whether each token is to be learned.
        row_len: T; an example of n tokens takes n - 1 positions, since the last token is only predicted.
        pad_id: Fills what stays free; never trained on.

    Raises:
        DataError: No example fits, or none has a token to learn.
    """
    kept = [i for i, (ids, mask) in enumerate(examples) if 2 <= len(ids) <= row_len + 1 and any(mask[1:])]
    if not kept:
        raise DataError(
            f"None of the {len(examples)} examples can be trained on: each is longer than {row_len + 1} tokens or has "
            "no token to learn. Raise max_seq_len or check the data."
        )
    rows = [[kept[i] for i in row] for row in best_fit([len(examples[i][0]) - 1 for i in kept], row_len)]
    return _fill(examples, rows, row_len, pad_id, len(examples) - len(kept))


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Lay items into rows, longest first, each into the fullest row that has room; return each row's items.

    Args:
        lengths: Of each item, at most ``room``.
        room: Of each row.

    >>> best_fit([3, 7, 5, 5], 10)
    [[1, 0], [2, 3]]
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free positions, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(free, (lengths[i], -1))
        if place < len(free):
            left, row = free.pop(place)
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(i)
        bisect.insort(free, (left - lengths[i], row))
    return rows


def _fill(
    examples: Sequence[tuple[Sequence[int], Sequence[bool]]],
    rows: list[list[int]],
    row_len: int,
    pad_id: int,
    num_dropped: int,
) -> Rows:
    inputs = np.full((len(rows), row_len), pad_id, dtype=np.int64)
    labels = np.full((len(rows), row_len), IGNORED, dtype=np.int64)
    documents = np.full((len(rows), row_len), -1, dtype=np.int32)
    for row, members in enumerate(rows):
        at = 0
        for number, i in enumerate(members):
            ids, mask = np.asarray(examples[i][0], dtype=np.int64), np.asarray(examples[i][1], dtype=bool)
            end = at + len(ids) - 1
            inputs[row, at:end] = ids[:-1]
            labels[row, at:end] = np.where(mask[1:], ids[1:], IGNORED)
            documents[row, at:end] = number
            at = end
    return Rows(inputs, labels, documents, sum(map(len, rows)), num_dropped)


def document_positions(document_ids: np.ndarray) -> np.ndarray:
    """Return positions that start again at 0 with each document, (R, T).

    >>> document_positions(np.array([[0, 0, 1, 1, 1, -1]])).tolist()
    [[0, 1, 0, 1, 2, 0]]
    """
    index = np.arange(document_ids.shape[1])[None, :]
    is_first = np.ones_like(document_ids, dtype=bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    start = np.maximum.accumulate(np.where(is_first, index, 0), axis=1)
    return index - start
