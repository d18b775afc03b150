"""What a pipeline reads: the pieces that its sources fall into, and the documents in a piece.

JSON lines are cut by line, so that many workers share one file; every other format is read file by file. What cannot
be read comes back as an `Aside` with its place and the reason, and the rest goes on.
"""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelwright.base.artifact import MANIFEST, read_manifest
from modelwright.base.errors import DataError
from modelwright.base.files import hash_bytes
from modelwright.base.types import Document
from modelwright.data.entry import Entry, Failure, Unreadable
from modelwright.data.hub_dataset import find_dataset
from modelwright.data.plan import SourceConfig
from modelwright.data.read import DOCUMENTS
from modelwright.data.shards import Bundle, ShardConfig, Unit, bundle_files, cut_lines, find_shards, read_lines
from modelwright.data.source import columns_of, iterate_file, kinds, walk_folder
from modelwright.data.tables import Columns, parse_row, table_document

_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Aside:
    """Something that could not be used: where it stands and why."""

    id: str
    position: str  # "corpus.jsonl, line 7" or the name of a file
    reason: str


@dataclass(frozen=True)
class SourceFound:
    """What a source held when it was looked at; what a manifest keeps of it."""

    path: str
    licence: str
    num_files: int
    num_bytes: int
    hash: str  # over names and contents of its files


def find_units(
    sources: Sequence[SourceConfig], shard: ShardConfig
) -> tuple[list[Unit], list[SourceFound], list[Aside]]:
    """List the pieces of all sources in order, what each source is, and what in it cannot be read.

    Raises:
        DataError: A source does not exist or holds no files.
    """
    units: list[Unit] = []
    found: list[SourceFound] = []
    asides: list[Aside] = []
    for index, source in enumerate(sources):
        files = []
        for entry in _files_of(source):
            if isinstance(entry, Failure):
                asides.append(Aside("", entry.path, entry.reason))
            else:
                files.append(entry)
        if not files:
            raise DataError(
                f"The source {source.path} holds nothing to read. Expected files of {kinds()}; name another place."
            )
        hashes: list[tuple[str, str]] = []
        for is_lines, group in _group(files, source.kind):
            if is_lines:
                for path, name in group:
                    slices, digest = cut_lines(path, name, shard, index)
                    units += slices
                    hashes.append((name, digest))
            else:
                bundles, digests = bundle_files(group, shard, index)
                units += bundles
                hashes += digests
        size = sum(path.stat().st_size for path, _ in files)
        digest = hash_bytes("".join(f"{name}\0{value}\n" for name, value in hashes).encode())
        found.append(SourceFound(source.path, source.licence, len(files), size, digest))
    return units, found, asides


def _files_of(source: SourceConfig) -> Iterable[tuple[Path, str] | Failure]:
    """Return (path, name) of the files of a source in the order of their names."""
    config = source.reading()
    if source.kind == "dataset":
        return find_dataset(config.path, config.split, config.subset, config.revision, config.datasets)
    path = Path(source.path).absolute()
    if not path.exists():
        raise DataError(f"The source {source.path} does not exist. Give a folder or a file of {kinds()}.")
    if path.is_file():
        return [(path.resolve(), path.name)]
    if (path / MANIFEST).is_file():
        kind = read_manifest(path).kind
        names = [path / DOCUMENTS] if kind == "documents" else find_shards(path, "train")
        if names and all(name.is_file() for name in names):
            return [(name, name.name) for name in names]
    return walk_folder(path, "", Counter())


def _group(files: list[tuple[Path, str]], as_kind: str) -> Iterator[tuple[bool, list[tuple[Path, str]]]]:
    """Yield runs of neighbours of one kind: (whether they are JSON lines, files)."""
    held: list[tuple[Path, str]] = []
    kind = False
    for path, name in files:
        is_lines = as_kind in ("auto", "dataset", "jsonl") and path.suffix.lower() in _LINES
        if held and is_lines != kind:
            yield kind, held
            held = []
        kind = is_lines
        held.append((path, name))
    if held:
        yield kind, held


@dataclass(frozen=True)
class Reading:
    """How the rows of a source become documents."""

    source: SourceConfig
    max_line_bytes: int
    is_plain: bool = False  # rows keep all their own fields, as the commands for single steps want


def read_unit(
    unit: Unit, start: int, stop: int, how: Reading, progress: Callable[[int], None]
) -> Iterator[tuple[int, Document | Aside]]:
    """Yield (index, document or what could not be read) of rows ``start`` to ``stop`` of a piece.

    ``progress`` is told the index before anything of the row is touched, so that a death can be laid at its door.
    """
    if isinstance(unit, Bundle):
        for index in range(start, stop):
            path, name = unit.files[index]
            progress(index)
            for found in _read_file(Path(path), name, how.source):
                yield index, found
                progress(index)
        return
    columns = columns_of(how.source.reading())
    entry = Entry(unit.name, ".jsonl", io.BytesIO(), 0, unit.name)
    progress(start)
    for number, line in read_lines(unit, start, stop, how.max_line_bytes):
        row = number - unit.first_line
        progress(row)
        if unit.is_ours:
            yield row, _our_document(json.loads(line))
        elif line is None:
            place = f"{unit.name}, line {number}"
            yield row, Aside("", place, f"the line is longer than {how.max_line_bytes:,} bytes")
        elif line.strip(b" \t\r\n\xef\xbb\xbf"):
            yield row, _parse_line(line, number, entry, columns, how)


def _our_document(row: Mapping[str, Any]) -> Document:
    return Document(row["id"], row["text"], row["source"], row["title"], row["metadata"])


def _read_file(path: Path, name: str, source: SourceConfig) -> Iterator[Document | Aside]:
    try:
        for found in iterate_file(path, name, source.reading(), source=name):
            if isinstance(found, Failure):
                place = f"{found.path}, {found.position}" if found.position else found.path
                yield Aside("", place, found.reason)
            else:
                yield _with_licence(found, source)
    except (ValueError, OSError, RecursionError, MemoryError) as error:
        yield Aside("", name, str(error) or type(error).__name__)


def _parse_line(line: bytes, number: int, entry: Entry, columns: Columns, how: Reading) -> Document | Aside:
    try:
        row = parse_row(line)
        document = table_document(row, columns, entry, number)
    except Unreadable as error:
        return Aside("", f"{entry.name}, line {number}", str(error)[:200])
    return replace(document, metadata=row) if how.is_plain else _with_licence(document, how.source)


def _with_licence(document: Document, source: SourceConfig) -> Document:
    if not source.licence or document.metadata.get("licence") or document.metadata.get("license"):
        return document
    metadata = {**document.metadata, "licence": source.licence}
    return Document(document.id, document.text, document.source, document.title, metadata)


def position_of(unit: Unit, row: int) -> tuple[str, str, int]:
    """Return (id where it is known, place for people, size in bytes where it is known) of one row of a piece."""
    if isinstance(unit, Bundle):
        path, name = unit.files[row]
        return name, name, 0
    for number, line in read_lines(unit, row, row + 1):
        if unit.is_ours and line is not None:
            document = _our_document(json.loads(line))
            return document.id, document.source, len(document.text.encode())
        return "", f"{unit.name}, line {number}", 0
    raise AssertionError("a row outside of its piece")
