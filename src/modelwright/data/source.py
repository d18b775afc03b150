"""One interface for everything that documents are kept in: `iterate_documents`.

A source is a folder, a file, or the name of a data set; files are told by their suffix (`modelwright.data`: PARSERS for
one document a file, TABLES for one a row, ARCHIVES for files within files). One document is held at a time. What cannot
be read comes back as a `Failure` in its place and the rest goes on; ``strict`` raises instead. Files come in the order
of their names, rows and members in their own, so the same source gives the same documents in the same order.
Nothing outside the folder is read: symbolic links are not followed, and nothing in an archive is written by its name.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

from modelwright.base.artifact import MANIFEST, read_manifest
from modelwright.base.errors import DataError, ModelwrightError
from modelwright.base.progress import human_bytes
from modelwright.base.registry import lookup
from modelwright.base.types import Document
from modelwright.data import ARCHIVES, PARSERS, TABLES
from modelwright.data.archive import suffix_of
from modelwright.data.entry import PIECE_BYTES, Entry, Exhausted, Failure, Limits, Unreadable
from modelwright.data.hub_dataset import find_dataset
from modelwright.data.isolate import parse_apart
from modelwright.data.ocr import OcrConfig
from modelwright.data.parse import Parsed
from modelwright.data.tables import Columns

Kind = Literal["auto", "dataset", "csv", "tsv", "jsonl", "parquet", "arrow", "warc", "zip", "tar", "txt", "md", "html"]


@dataclass(frozen=True)
class ReadConfig:
    """One place that documents come from, and how it is read."""

    path: str  # a folder or file; with kind "dataset" the name of a Hugging Face data set or its folder
    kind: Kind = "auto"  # "auto" goes by the suffixes
    text_column: str = "text"  # of tables
    id_column: str | None = None  # None: "id" where there is such a column, else file and row number
    title_column: str | None = None  # None: "title" where there is such a column
    metadata_columns: tuple[str, ...] | None = None  # kept beside the text; None: all
    delimiter: str | None = None  # of CSV; None: what the first line has most of
    split: str = "train"  # of a data set
    subset: str | None = None  # of a data set; None: its default
    revision: str | None = None  # of a data set that is fetched; None: the newest
    datasets: Path | None = None  # folder with local copies of data sets; None: MODELWRIGHT_DATASETS
    ocr: OcrConfig = OcrConfig()
    limits: Limits = Limits()
    strict: bool = False  # raise at the first thing that cannot be read


def iterate_documents(
    source: ReadConfig | Path | str, others: Counter[str] | None = None
) -> Iterator[Document | Failure]:
    """Yield every document of a source, and a `Failure` for whatever cannot be read.

    Args:
        source: The settings, or just a path.
        others: Counts what is no document: files of other kinds by suffix, and "link" for links within the folder.

    Raises:
        DataError: There is nothing at the path; a single table has no such column; or, if strict, the first failure.
        MissingExtraError: A file's format needs an optional package that is not installed.
    """
    config = source if isinstance(source, ReadConfig) else ReadConfig(str(source))
    for item in _iterate(config, Counter() if others is None else others):
        if config.strict and isinstance(item, Failure):
            where = f"{item.path}, {item.position}" if item.position else item.path
            raise DataError(f"{where}: {item.reason}. Mend it, or read without strict to set it aside.")
        yield item


def _iterate(config: ReadConfig, others: Counter[str]) -> Iterator[Document | Failure]:
    if config.kind == "dataset":
        files = find_dataset(config.path, config.split, config.subset, config.revision, config.datasets)
        for path, name in files:
            yield from iterate_file(path, name, replace(config, kind="auto"))
        return
    path = Path(config.path)
    if not path.exists():
        raise DataError(f"{path} does not exist. Give a folder or a file of {kinds()}.")
    if not path.is_dir():
        if suffix_of(path.name) not in known_suffixes() and config.kind == "auto":
            raise DataError(f"{path} is a {path.suffix or 'file without suffix'}; expected one of {kinds()}.")
        # The user named this file, so a link is followed to what it names.
        yield from iterate_file(path.resolve(), path.name, config, others, source=str(path))
        return
    if _is_documents(path):
        yield from iterate_file(path / "documents.jsonl", "documents.jsonl", config)
        return
    for found in walk_folder(path, "", others):
        if isinstance(found, Failure):
            yield found
            continue
        inner, name = found
        try:
            yield from iterate_file(inner, name, config, others)
        except DataError as error:  # one table of many has no such column
            yield Failure(name, str(error))


def _is_documents(folder: Path) -> bool:
    """Tell whether this is the artifact of documents; its lists of failures are no documents."""
    try:
        return (folder / MANIFEST).is_file() and read_manifest(folder).kind == "documents"
    except (OSError, ModelwrightError):
        return False  # closed to us, or another program's manifest


def known_suffixes() -> set[str]:
    """Return every suffix that can be read."""
    return {*PARSERS, *TABLES, *ARCHIVES}


def kinds() -> str:
    """Return the suffixes that can be read, for people."""
    return " ".join(sorted(known_suffixes()))


def walk_folder(root: Path, prefix: str, others: Counter[str]) -> Iterator[tuple[Path, str] | Failure]:
    """Yield (path, name below the root) of each file with a known suffix in the order of names; note the rest."""
    try:
        # A folder sorts as its name with the slash, which makes the order that of whole names.
        entries = sorted(os.scandir(root / prefix), key=lambda e: e.name + "/" * e.is_dir(follow_symlinks=False))
    except OSError as error:
        yield Failure(prefix.rstrip("/") or ".", _os_reason(error))
        return
    for entry in entries:
        name = prefix + entry.name
        if entry.name.startswith("."):
            continue
        if not _is_utf8(entry.name):
            shown = name.encode("utf-8", "backslashreplace").decode()
            yield Failure(shown, "its name is not valid UTF-8; rename it")
        elif entry.is_symlink():
            reason = _link_reason(Path(entry.path), root)
            if reason:
                yield Failure(name, reason)
            else:
                others["link"] += 1
        elif entry.is_dir(follow_symlinks=False):
            yield from walk_folder(root, f"{name}/", others)
        elif suffix_of(entry.name) in known_suffixes():
            yield Path(entry.path), name
        else:
            others[suffix_of(entry.name) or "no suffix"] += 1


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _link_reason(link: Path, root: Path) -> str:
    """Why a link is refused; empty for a link within the tree, whose target is read under its own name."""
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):
        return "a symbolic link that leads nowhere or in a circle"
    if root.resolve() not in (target, *target.parents):
        return "a symbolic link out of the folder; copy the file in, or name its place"
    return ""


def iterate_file(
    path: Path, name: str, config: ReadConfig, others: Counter[str] | None = None, *, source: str = ""
) -> Iterator[Document | Failure]:
    """Yield the documents of one file, which is called ``name`` in ids and failures.

    Raises:
        DataError: A table has no such column.
        MissingExtraError: The format needs an optional package that is not installed.
    """
    try:
        handle = _open(path)
    except Unreadable as error:
        yield Failure(name, str(error))
        return
    with handle:
        suffix = suffix_of(path.name if suffix_of(path.name) in known_suffixes() else name)
        if config.kind not in ("auto", "dataset"):
            suffix = f".{config.kind}"
        size = os.fstat(handle.fileno()).st_size
        found = Counter() if others is None else others
        yield from _read(Entry(name, suffix, handle, size, source or str(path)), config, found)


def _open(path: Path) -> BinaryIO:
    """Open a regular file; never follow a link and never wait on a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise Unreadable(_os_reason(error)) from None
    handle = os.fdopen(descriptor, "rb", PIECE_BYTES)
    found = os.fstat(descriptor)
    reason = "" if stat.S_ISREG(found.st_mode) else "not a regular file (a pipe, socket or device)"
    if not reason and found.st_size == 0:
        reason = "empty (0 bytes)"
    if reason:
        handle.close()
        raise Unreadable(reason)
    return handle


def _os_reason(error: OSError) -> str:
    return f"cannot be opened: {(error.strerror or str(error)).lower()}"


def _read(entry: Entry, config: ReadConfig, others: Counter[str]) -> Iterator[Document | Failure]:
    """Read one open file by its suffix; whatever goes wrong with it ends here, except a spent budget."""
    try:
        if entry.suffix in ARCHIVES:
            yield from _read_archive(entry, config, others)
        elif entry.suffix in TABLES:
            columns = columns_of(config)
            read_rows = lookup(TABLES, entry.suffix, "format")
            yield from read_rows(entry, columns, config.limits)
        elif entry.suffix in PARSERS:
            yield _read_document(entry, config)
        else:
            others[entry.suffix or "no suffix"] += 1
    except Unreadable as error:
        yield Failure(entry.name, str(error))
        if isinstance(error, Exhausted) and entry.depth:
            raise
    except OSError as error:
        yield Failure(entry.name, _os_reason(error).replace("opened", "read"))


def columns_of(config: ReadConfig) -> Columns:
    """Return which columns of a table make the document."""
    return Columns(config.text_column, config.id_column, config.title_column, config.metadata_columns, config.delimiter)


def _read_archive(entry: Entry, config: ReadConfig, others: Counter[str]) -> Iterator[Document | Failure]:
    if entry.depth > config.limits.depth:
        raise Unreadable(f"lies in {entry.depth} archives; at most {config.limits.depth} within each other are opened")
    unpack = lookup(ARCHIVES, entry.suffix, "format")
    for member in unpack(entry, config.limits):
        if isinstance(member, Failure):
            yield member
            continue
        try:
            yield from _read(member, config, others)
        except DataError as error:
            if entry.depth == 0 and member.name == entry.name:  # a single compressed table
                raise
            yield Failure(member.name, str(error))


def _read_document(entry: Entry, config: ReadConfig) -> Document:
    if entry.num_bytes > config.limits.file_bytes and entry.whole is None:
        raise Unreadable(
            f"has {human_bytes(entry.num_bytes)}; one file may have {human_bytes(config.limits.file_bytes)}"
        )
    parsed: Parsed = parse_apart(entry.suffix, entry.read_whole(config.limits), config.ocr, config.limits)
    if not parsed.text.strip("\ufeff \t\r\n\0"):
        raise Unreadable("holds no text, only white space")
    return Document(
        id=entry.name,
        text=parsed.text,
        source=entry.source,
        title=parsed.title or Path(entry.name).stem,
        metadata={**entry.metadata, **parsed.metadata},
    )
