"""Pieces of a corpus on disk: how input is cut, how documents are written, how a finished data set is read back.

A `Slice` is a run of lines of a JSON-lines file, a `Bundle` some whole files. Both are cut by the order and size of
the input alone, never by who works on them, so that any number of workers sees the same pieces. A line is read with a
ceiling on its length: one of two gigabytes costs no more memory than the ceiling.

Not done: cutting compressed files, which can be read from their beginning only; they are bundles.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from modelwright.base.errors import DataError, MissingExtraError
from modelwright.base.files import atomic_file, hash_file, read_jsonl
from modelwright.base.types import Document
from modelwright.data.read import document_row, row_document
from modelwright.data.text_lines import SetAside, text_lines

MAX_LINE_BYTES = 64 * 10**6
SUFFIXES = ("jsonl", "parquet")
_COLUMNS = ("id", "text", "source", "title", "metadata")
_GROUP_BYTES = 16_000_000
_PIECE_BYTES = 1 << 20
_NEWLINE = 10


@dataclass(frozen=True)
class ShardConfig:
    """How large a piece of work is at most, whichever comes first; and a file of the output."""

    documents: int = 1000
    bytes: int = 16_000_000  # of the file; a single larger document is a piece by itself
    out_bytes: int = 256_000_000  # of a file of the output; what fits in one is called train.jsonl without a number


@dataclass(frozen=True)
class Slice:
    """Lines of a JSON-lines file, by their place in it."""

    path: str
    name: str  # for people: relative to its source
    start: int  # first byte
    end: int  # first byte after it
    first_line: int  # counted from 1
    num_lines: int
    source: int = 0  # index of the source that it belongs to
    is_ours: bool = False  # whether a pipeline wrote it

    def __len__(self) -> int:
        return self.num_lines


@dataclass(frozen=True)
class Bundle:
    """Whole files, read one after another."""

    files: tuple[tuple[str, str], ...]  # (path, name relative to the source)
    source: int = 0

    def __len__(self) -> int:
        return len(self.files)


Unit = Slice | Bundle


def cut_lines(path: Path, name: str, shard: ShardConfig, source: int = 0) -> tuple[list[Slice], str]:
    """Cut a JSON-lines file into slices and return them with the SHA-256 of the file, in one reading."""
    digest = hashlib.sha256()
    slices: list[Slice] = []
    start = line = at = 0
    first_line = 1

    def close(end: int) -> None:
        nonlocal start, first_line, line
        slices.append(Slice(str(path), name, start, end, first_line, line, source))
        start, first_line, line = end, first_line + line, 0

    with open(path, "rb") as handle:
        while piece := handle.read(_PIECE_BYTES):
            digest.update(piece)
            for end in np.flatnonzero(np.frombuffer(piece, dtype=np.uint8) == _NEWLINE).tolist():
                line += 1
                if line >= shard.documents or at + end + 1 - start >= shard.bytes:
                    close(at + end + 1)
            at += len(piece)
    if at > start:  # the last line lacks its newline, or the slice is not full
        line += not _ends_with_newline(path)
        close(at)
    return slices, digest.hexdigest()


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as handle:
        handle.seek(-1, 2)
        return handle.read(1) == b"\n"


def bundle_files(
    files: Sequence[tuple[Path, str]], shard: ShardConfig, source: int = 0
) -> tuple[list[Bundle], list[tuple[str, str]]]:
    """Put files that are read whole into bundles of at most a shard, and return those with (name, SHA-256) of each."""
    bundles: list[Bundle] = []
    held: list[tuple[str, str]] = []
    hashes, num_bytes = [], 0
    for path, name in files:
        size = path.stat().st_size
        if held and (len(held) >= shard.documents or num_bytes + size > shard.bytes):
            bundles.append(Bundle(tuple(held), source))
            held, num_bytes = [], 0
        held.append((str(path), name))
        num_bytes += size
        hashes.append((name, hash_file(path)))
    return bundles + ([Bundle(tuple(held), source)] if held else []), hashes


def read_lines(piece: Slice, start: int, stop: int, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[int, Any]]:
    """Yield (line number, bytes) of lines ``start`` to ``stop`` of a slice; None for a line above the ceiling."""
    with open(piece.path, "rb") as handle:
        handle.seek(piece.start)
        for index in range(stop):
            line: bytes | None = handle.readline(max_line_bytes + 1)
            if line is not None and len(line) > max_line_bytes and not line.endswith(b"\n"):
                _skip_line(handle)
                line = None
            if index >= start:
                yield piece.first_line + index, line


def _skip_line(handle: IO[bytes]) -> None:
    while rest := handle.readline(_PIECE_BYTES):
        if rest.endswith(b"\n"):
            return


def encode_row(row: dict[str, Any]) -> bytes:
    """Return one line of JSON in UTF-8.

    Raises:
        ValueError: It holds half of a surrogate pair, or a number that JSON does not have.
    """
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


Encode = Callable[[Document], bytes]


def encode_document(document: Document) -> bytes:
    """Return a document as one line of JSON."""
    return encode_row(document_row(document))


def write_shards(documents: Iterable[bytes], folder: Path, part: str, shard_bytes: int, suffix: str) -> int:
    """Write encoded documents as ``part.jsonl``, or ``part-00000.jsonl`` and so on where one file is not enough.

    Returns how many there were. With the suffix ``parquet`` the files are Parquet.
    """
    count = num_files = num_bytes = 0
    lines = iter(documents)
    ahead = next(lines, None)
    while ahead is not None or not num_files:
        with atomic_file(folder / f"{part}-{num_files:05}.{suffix}", "wb") as handle:
            num_files, num_bytes = num_files + 1, 0
            writer = _ParquetWriter(handle) if suffix == "parquet" else handle
            while ahead is not None and (not num_bytes or num_bytes + len(ahead) <= shard_bytes):
                writer.write(ahead)
                count, num_bytes = count + 1, num_bytes + len(ahead)
                ahead = next(lines, None)
            if isinstance(writer, _ParquetWriter):
                writer.close()
    if num_files == 1:
        (folder / f"{part}-00000.{suffix}").rename(folder / f"{part}.{suffix}")
    return count


class _ParquetWriter:
    """Takes lines of JSON and writes them in groups of rows, so that a file of any size needs little memory."""

    def __init__(self, handle: IO[bytes]):
        self._pyarrow, parquet = import_pyarrow()
        # Metadata differs from document to document: as JSON it has one type in every file.
        self._schema = self._pyarrow.schema([(name, self._pyarrow.string()) for name in _COLUMNS])
        self._writer = parquet.ParquetWriter(handle, self._schema, compression="zstd")
        self._held: list[dict[str, Any]] = []
        self._num_bytes = 0

    def write(self, line: bytes) -> None:
        row = json.loads(line)
        self._held.append({**row, "metadata": json.dumps(row["metadata"], ensure_ascii=False)})
        self._num_bytes += len(line)
        if self._num_bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(self._pyarrow.Table.from_pylist(self._held, schema=self._schema))
        self._held, self._num_bytes = [], 0

    def close(self) -> None:
        self._flush()
        self._writer.close()


def import_pyarrow() -> tuple[Any, Any]:
    """Return pyarrow and pyarrow.parquet.

    Raises:
        MissingExtraError: They are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data", "Writing and reading Parquet") from error
    return pyarrow, pyarrow.parquet


def find_shards(folder: Path, part: str) -> list[Path]:
    """Return the files of one part of a data set in their order: ``train.jsonl``, or ``train-00000.jsonl`` and on.

    A file stands for itself.
    """
    folder = Path(folder)
    if folder.is_file():
        return [folder]
    for suffix in SUFFIXES:
        single = folder / f"{part}.{suffix}"
        found = [single] if single.is_file() else sorted(folder.glob(f"{part}-[0-9]*.{suffix}"))
        if found:
            return found
    return []


def read_shards(folder: Path, part: str = "train") -> Iterator[Document]:
    """Yield the documents of one part of a data set, a shard at a time.

    Raises:
        DataError: A line is damaged.
    """
    for path, _, row in read_rows(folder, part):
        yield row_document(row, str(path))


def read_texts(folder: Path, part: str = "train", set_aside: SetAside | None = None) -> Iterator[str]:
    """Yield the texts of one part of a data set, or of a file; nothing but the texts is asked of the rows.

    Args:
        folder: The data set.
        part: "train" or "validation".
        set_aside: Gets the lines that cannot be used; None: the first one is an error.

    Raises:
        DataError: The folder holds no such part, or (see ``set_aside``) a row has no text.
    """
    if not find_shards(folder, part):
        raise DataError(
            f"{folder} holds no {part}.jsonl and no shards of it. Give a data set that mw data or mw data run made, "
            'or any folder with such a file of {"text": ...} lines.'
        )
    for path in find_shards(folder, part):
        if path.suffix == ".parquet":
            for number, row in enumerate(_read_parquet(path), start=1):
                if isinstance(row.get("text"), str):
                    yield row["text"]
                elif set_aside is None:
                    raise DataError(f"{path}, row {number}: text is {row.get('text')!r:.60}; expected a text.")
                else:
                    set_aside(f"{path}, row {number}", f"text is {row.get('text')!r:.60}; expected a text")
        else:
            yield from text_lines(path, set_aside)


def read_rows(folder: Path, part: str = "train") -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """Yield (file, number of the row in it counted from 1, row) of one part of a data set.

    Raises:
        DataError: A line is damaged.
    """
    for path in find_shards(folder, part):
        rows = _read_parquet(path) if path.suffix == ".parquet" else read_jsonl(path)
        for number, row in enumerate(rows, start=1):
            yield path, number, row


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    _, parquet = import_pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield {**row, "metadata": json.loads(row["metadata"])}
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path} is not a Parquet shard of documents: {error}. It may be damaged; make it again."
        ) from error
