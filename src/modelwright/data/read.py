"""From a folder or a file to documents, and to the artifact that keeps them.

Files are read in the order of their names. What cannot be read is listed by name and reason and skipped; what is no
document is counted by kind. Nothing outside the folder is read: symbolic links are not followed.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modelwright.base.artifact import new_artifact, read_manifest
from modelwright.base.errors import DataError
from modelwright.base.files import read_jsonl, write_jsonl
from modelwright.base.progress import bar, human_bytes
from modelwright.base.registry import lookup
from modelwright.base.types import Document
from modelwright.data import PARSERS
from modelwright.data.parse import Parsed, Unreadable

MAX_FILE_BYTES = 256 * 10**6
DOCUMENTS, FAILURES = "documents.jsonl", "failures.jsonl"


@dataclass(frozen=True)
class Failure:
    """A file or folder that could not be read, and why."""

    path: str  # relative to the folder, with forward slashes
    reason: str


@dataclass(frozen=True)
class ReadResult:
    """All that was found in one place."""

    documents: list[Document]
    failures: list[Failure] = field(default_factory=list)
    others: Mapping[str, int] = field(default_factory=dict)  # files of other kinds by suffix; "link" for inner links


def read_documents(path: Path) -> ReadResult:
    """Read every document at ``path``, a folder (with all its folders) or one file.

    Raises:
        DataError: There is nothing there, or nothing in it could be read.
        MissingExtraError: A file's format needs an optional package that is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist. Give a folder or a file of {_kinds()}.")
    if path.is_dir():
        result = _read_folder(path)
    else:
        result = _read_one(path)
    if not result.documents:
        raise DataError(_nothing_readable(path, result))
    return result


def _kinds() -> str:
    return " ".join(sorted(PARSERS))


def _read_one(path: Path) -> ReadResult:
    if path.suffix.lower() not in PARSERS:
        raise DataError(f"{path} is a {path.suffix or 'file without suffix'}; expected one of {_kinds()}.")
    try:
        # The user named this file, so a link is followed to what it names.
        return ReadResult([_read_file(path.resolve(), path.name, path)])
    except Unreadable as error:
        return ReadResult([], [Failure(path.name, str(error))])


def _read_folder(root: Path) -> ReadResult:
    failures: list[Failure] = []
    others: Counter[str] = Counter()
    files = sorted(_walk(root, "", failures, others), key=lambda found: found[1])
    documents = []
    with bar("documents", len(files)) as shown:
        for path, name in files:
            shown.describe(name)
            try:
                documents.append(_read_file(path, name, path))
            except Unreadable as error:
                failures.append(Failure(name, str(error)))
            shown.advance()
    return ReadResult(documents, sorted(failures, key=lambda f: f.path), dict(sorted(others.items())))


def _walk(root: Path, prefix: str, failures: list[Failure], others: Counter[str]) -> Iterator[tuple[Path, str]]:
    """Yield (path, name below the root) of each file with a known suffix; note the rest."""
    try:
        entries = sorted(os.scandir(root / prefix), key=lambda entry: entry.name)
    except OSError as error:
        failures.append(Failure(prefix.rstrip("/") or ".", _os_reason(error)))
        return
    for entry in entries:
        name = prefix + entry.name
        if entry.name.startswith("."):
            continue
        if not _is_utf8(entry.name):
            shown = name.encode("utf-8", "backslashreplace").decode()
            failures.append(Failure(shown, "its name is not valid UTF-8; rename it"))
        elif entry.is_symlink():
            reason = _link_reason(Path(entry.path), root)
            if reason:
                failures.append(Failure(name, reason))
            else:
                others["link"] += 1
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(root, f"{name}/", failures, others)
        elif Path(entry.name).suffix.lower() in PARSERS:
            yield Path(entry.path), name
        else:
            others[Path(entry.name).suffix.lower() or "no suffix"] += 1


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


def _read_file(path: Path, name: str, source: Path) -> Document:
    parse = lookup(PARSERS, path.suffix.lower() if path.suffix.lower() in PARSERS else source.suffix.lower(), "format")
    parsed: Parsed = parse(_read_bytes(path))
    if not parsed.text.strip("\ufeff \t\r\n\0"):
        raise Unreadable("holds no text, only white space")
    title = parsed.title or Path(name).stem
    return Document(id=name, text=parsed.text, source=str(source), title=title, metadata=parsed.metadata)


def _read_bytes(path: Path) -> bytes:
    """Read a whole regular file; never follow a link and never wait on a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise Unreadable(_os_reason(error)) from None
    with os.fdopen(descriptor, "rb") as handle:
        found = os.fstat(handle.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise Unreadable("not a regular file (a pipe, socket or device)")
        if found.st_size == 0:
            raise Unreadable("empty (0 bytes)")
        if found.st_size > MAX_FILE_BYTES:
            raise Unreadable(f"has {human_bytes(found.st_size)}; one file may have {human_bytes(MAX_FILE_BYTES)}")
        try:
            return handle.read(MAX_FILE_BYTES)
        except OSError as error:
            raise Unreadable(_os_reason(error)) from None


def _os_reason(error: OSError) -> str:
    return f"cannot be opened: {(error.strerror or str(error)).lower()}"


def _nothing_readable(path: Path, result: ReadResult) -> str:
    lines = [f"Nothing readable in {path}: looked for {_kinds()} (hidden files left out)."]
    if result.failures:
        lines.append(f"{len(result.failures)} could not be read:")
        lines.extend(f"  {failure.path}: {failure.reason}" for failure in result.failures[:10])
        if len(result.failures) > 10:
            lines.append(f"  ... and {len(result.failures) - 10} more")
    elif not result.others:
        lines.append("It holds no files.")
    if result.others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in result.others.items())
        lines.append(f"Other files there: {counts}.")
    lines.append("Give a folder or file with text in one of these formats.")
    return "\n".join(lines)


def write_documents(result: ReadResult, out: Path, *, settings: Mapping[str, Any] | None = None) -> None:
    """Write the documents and the failures as an artifact of kind "documents"."""
    with new_artifact(Path(out), "documents", settings=settings) as (work, measured):
        write_jsonl(work / DOCUMENTS, (document_row(document) for document in result.documents))
        write_jsonl(work / FAILURES, (asdict(failure) for failure in result.failures))
        measured["num_documents"] = len(result.documents)
        measured["text_bytes"] = sum(len(document.text.encode()) for document in result.documents)
        measured["num_failures"] = len(result.failures)
        measured["others"] = dict(result.others)


def load_documents(path: Path) -> list[Document]:
    """Read the documents back from their artifact.

    Raises:
        DataError: The folder is not a documents artifact, or a line in it is damaged.
    """
    manifest = read_manifest(path)
    if manifest.kind != "documents":
        raise DataError(f"{path} is an artifact of kind {manifest.kind!r}; expected documents, as mw data makes them.")
    return [row_document(row, f"{path}/{DOCUMENTS}") for row in read_jsonl(Path(path) / DOCUMENTS)]


def load_failures(path: Path) -> list[Failure]:
    """Read what could not be read back from the documents artifact."""
    return [Failure(row["path"], row["reason"]) for row in read_jsonl(Path(path) / FAILURES)]


def document_row(document: Document) -> dict[str, Any]:
    """Return a document as one JSON line's object."""
    return {**asdict(document), "metadata": dict(document.metadata)}


def row_document(row: Mapping[str, Any], where: str) -> Document:
    """Return the document that a JSON line holds."""
    try:
        return Document(
            id=str(row["id"]),
            text=str(row["text"]),
            source=str(row.get("source", "")),
            title=str(row.get("title", "")),
            metadata=dict(row.get("metadata") or {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: a line is not a document ({error!r}); expected at least id and text.") from error
