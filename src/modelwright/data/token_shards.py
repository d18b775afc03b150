"""Texts as token ids on disk, read through memory maps: encoded once, fed to any number of runs and ranks.

A folder of ``tokens-00000.npy`` (uint16 where the vocabulary allows, else uint32) and ``starts-00000.npy`` (where each
document begins, int64), with ``shards.json`` and a manifest. Every document begins with the separator; one more
separator is read after the last. A shard ends with a whole document. Only one shard is in memory while writing, and
only the rows asked for while reading.

Rows come in two ways: `StreamRows` cuts the one long stream every T tokens (no padding; a row may hold the end of one
document and the beginning of the next); `PackedRows` lays whole documents, those longer than a row in pieces, by best
fit, so that few are cut at all. Source of the latter: Ding et al. 2024, arXiv:2404.10830.
"""

import bisect
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modelwright.base.artifact import new_artifact
from modelwright.base.errors import CheckpointError, DataError
from modelwright.base.files import hash_bytes, read_json, write_json
from modelwright.data.pack import IGNORED, Rows, best_fit
from modelwright.tokenizer.bpe import Tokenizer

INDEX = "shards.json"
DIFFICULTIES = "difficulties.npy"  # one float64 a document, where they were given
SHARD_TOKENS = 50_000_000  # 100 MB of two bytes each
_BATCH_TEXTS = 512

Ids = npt.NDArray[np.int64]


def write_token_shards(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    parents: Sequence[Path] = (),
    difficulties: Iterable[float] | None = None,
) -> int:
    """Encode texts into a folder of shards and return the number of tokens.

    Args:
        texts: In the order in which they are kept; empty ones are passed over.
        tokenizer: Its EOS is the separator.
        folder: The artifact to make; a killed run leaves nothing.
        shard_tokens: A shard is closed when it holds at least so many.
        parents: Artifacts that the texts come from.
        difficulties: One number for each text, kept beside the tokens for a curriculum; None: none is kept.

    Raises:
        DataError: There is no text.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    settings = {"vocab_size": tokenizer.vocab_size, "tokenizer": hash_bytes(tokenizer.to_json().encode())}
    with new_artifact(folder, "tokens", settings=settings, parents=parents) as (work, measured):
        shards: list[dict[str, int]] = []
        pieces: list[npt.NDArray[np.generic]] = []
        starts: list[int] = []
        size = 0

        def close() -> None:
            nonlocal pieces, starts, size
            name = f"{len(shards):05d}"
            np.save(work / f"tokens-{name}.npy", np.concatenate(pieces))
            np.save(work / f"starts-{name}.npy", np.array(starts, dtype=np.int64))
            shards.append({"num_tokens": size, "num_documents": len(starts)})
            pieces, starts, size = [], [], 0

        numbers = array("d")
        for batch in _batches(texts if difficulties is None else _note(texts, difficulties, numbers)):
            for ids in tokenizer.encode_batch(batch, add_special_tokens=False):
                starts.append(size)
                pieces.append(np.array([tokenizer.eos_id, *ids], dtype=dtype))
                size += len(ids) + 1
                if size >= shard_tokens:
                    close()
        if size:
            close()
        if not shards:
            raise DataError(f"There is no text to write token shards to {folder} from. Check the data set.")
        index = {"dtype": np.dtype(dtype).name, "separator_id": tokenizer.eos_id, "shards": shards, **settings}
        write_json(work / INDEX, index)
        if difficulties is not None:
            np.save(work / DIFFICULTIES, np.array(numbers))
        measured["num_tokens"] = sum(shard["num_tokens"] for shard in shards)
        measured["num_documents"] = sum(shard["num_documents"] for shard in shards)
    return int(measured["num_tokens"])


def _note(texts: Iterable[str], difficulties: Iterable[float], numbers: "array[float]") -> Iterator[str]:
    """Yield the texts that are not empty, and keep the numbers of those."""
    for text, difficulty in zip(texts, difficulties, strict=True):
        if text:
            numbers.append(difficulty)
            yield text


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        if text:
            batch.append(text)
        if len(batch) == _BATCH_TEXTS:
            yield batch
            batch = []
    if batch:
        yield batch


class TokenShards:
    """A folder of shards as one stream of tokens.

    Args:
        folder: What `write_token_shards` made.
        tokenizer: Checked to be the one that wrote them; None: not checked.

    Raises:
        DataError: The folder is no such one, or another tokenizer wrote it.
        CheckpointError: A shard is missing or has another length than the index says.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer | None = None):
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise DataError(f"{folder} holds no token shards: it has no {INDEX}. Make them with mw shards.")
        self._index = read_json(self.folder / INDEX)
        if tokenizer is not None and self._index["tokenizer"] != hash_bytes(tokenizer.to_json().encode()):
            raise DataError(
                f"{folder} was written by another tokenizer (of {self._index['vocab_size']} tokens, this one has "
                f"{tokenizer.vocab_size}). Make the shards again with the tokenizer of the run."
            )
        self.separator_id = int(self._index["separator_id"])
        sizes = [shard["num_tokens"] for shard in self._index["shards"]]
        self._ends = np.cumsum(sizes).tolist()
        self.num_tokens = int(sum(sizes))  # with the separator in front of each document
        self.num_documents = int(sum(shard["num_documents"] for shard in self._index["shards"]))
        for number, size in enumerate(sizes):
            if len(self._tokens(number)) != size:
                found = len(self._tokens(number))
                raise CheckpointError(
                    f"{self.folder}/tokens-{number:05d}.npy has {found} tokens, the index says {size}. Make it again."
                )

    @lru_cache(maxsize=64)  # noqa: B019 - one map a shard for the life of this object
    def _tokens(self, number: int) -> npt.NDArray[np.generic]:
        file = self.folder / f"tokens-{number:05d}.npy"
        try:
            return np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}. Make the shards again.") from error

    def read(self, start: int, length: int) -> Ids:
        """Return tokens of the stream, (length,); one separator stands after the last document."""
        if start < 0 or start + length > self.num_tokens + 1:
            raise DataError(f"Tokens {start} to {start + length} were asked for; the stream has {self.num_tokens + 1}.")
        found = np.full(length, self.separator_id, dtype=np.int64)
        number, at = bisect.bisect_right(self._ends, start), 0
        while at < length and number < len(self._ends):
            begin = start + at - (self._ends[number - 1] if number else 0)
            piece = self._tokens(number)[begin : begin + length - at]
            found[at : at + len(piece)] = piece
            at, number = at + len(piece), number + 1
        return found

    def starts(self) -> Ids:
        """Return where each document begins in the stream, (documents,)."""
        before = [0, *self._ends[:-1]]
        files = (self.folder / f"starts-{number:05d}.npy" for number in range(len(self._ends)))
        return np.concatenate([np.load(file) + first for file, first in zip(files, before, strict=True)])

    def difficulties(self) -> npt.NDArray[np.float64]:
        """Return the number kept for each document, (documents,).

        Raises:
            DataError: None were kept.
        """
        file = self.folder / DIFFICULTIES
        if not file.is_file():
            raise DataError(
                f"{self.folder} keeps no difficulties of its documents: it has no {DIFFICULTIES}. Make the shards "
                "again with mw shards --difficulty FIELD, or order them by length or perplexity."
            )
        found: npt.NDArray[np.float64] = np.load(file, allow_pickle=False)
        return found

    def lengths(self) -> Ids:
        """Return the number of tokens of each document, with its separator, (documents,)."""
        return np.diff(self.starts(), append=self.num_tokens)


class StreamRows:
    """The stream cut every T tokens; every token but the first is predicted exactly once an epoch, the tail left out.

    Args:
        shards: The tokens.
        row_len: T.
        has_boundaries: Whether attention and positions stop at the beginning of a document.
    """

    def __init__(self, shards: TokenShards, row_len: int, has_boundaries: bool = False):
        self._shards, self._row_len, self._has_boundaries = shards, row_len, has_boundaries
        self._num_rows = shards.num_tokens // row_len
        if self._num_rows < 1:
            raise DataError(
                f"The shards have {shards.num_tokens} tokens, but one row needs {row_len}. Give more text or a smaller "
                "max_seq_len."
            )

    def __len__(self) -> int:
        return self._num_rows

    def rows(self, indices: Ids) -> Rows:
        """Return the rows of these numbers."""
        length = self._row_len
        tokens = np.stack([self._shards.read(int(i) * length, length + 1) for i in indices])  # (R, T + 1)
        documents = None
        if self._has_boundaries:
            documents = np.cumsum(tokens[:, :-1] == self._shards.separator_id, axis=1).astype(np.int32)
        return Rows(tokens[:, :-1], tokens[:, 1:].copy(), documents)


class PackedRows:
    """Whole documents in rows by best fit; attention and positions stop at each document's ends.

    Args:
        shards: The tokens.
        row_len: T; a longer document is cut every T tokens.
        groups: Number of the group of each document, (documents,); a row holds documents of one group. None: of all.
    """

    def __init__(self, shards: TokenShards, row_len: int, groups: npt.NDArray[np.int64] | None = None):
        self._shards, self._row_len = shards, row_len
        starts = shards.starts()
        ends = [*starts[1:].tolist(), shards.num_tokens]
        pieces = [
            (begin, min(row_len, end - begin), number)
            for number, (start, end) in enumerate(zip(starts.tolist(), ends, strict=True))
            for begin in range(start, end, row_len)
        ]
        owners = np.array([number for _, _, number in pieces], dtype=np.int64)
        kinds = np.zeros(len(pieces), dtype=np.int64) if groups is None else groups[owners]
        self._rows: list[list[tuple[int, int, int]]] = []
        for kind in np.unique(kinds):
            members = [pieces[i] for i in np.flatnonzero(kinds == kind)]
            self._rows += [[members[i] for i in row] for row in best_fit([piece[1] for piece in members], row_len)]
        self.num_pieces, self.num_documents = len(pieces), len(starts)
        self.used_fraction = shards.num_tokens / (len(self._rows) * row_len)  # the rest is padding

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, indices: Ids) -> Rows:
        """Return the rows of these numbers."""
        shape = (len(indices), self._row_len)
        inputs = np.full(shape, self._shards.separator_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        documents = np.full(shape, -1, dtype=np.int32)
        for row, index in enumerate(indices):
            at = 0
            for number, (begin, length, _) in enumerate(self._rows[int(index)]):
                tokens = self._shards.read(begin, length + 1)
                inputs[row, at : at + length] = tokens[:-1]
                labels[row, at : at + length] = tokens[1:]
                documents[row, at : at + length] = number
                at += length
        return Rows(inputs, labels, documents)

    def mean_over_rows(self, numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the mean of a number of each document over the tokens of each row: (documents,) gives (rows,)."""
        return np.array(
            [
                np.average([numbers[i] for _, _, i in row], weights=[length for _, length, _ in row])
                for row in self._rows
            ]
        )
