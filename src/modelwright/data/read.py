"""From a folder, a file or a data set to documents in memory, and to the artifact that keeps them.

`modelwright.data.source` says what is read and how; this is its whole answer at once. What cannot be read is listed by
name and reason and skipped; what is no document is counted by kind.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modelwright.base.artifact import new_artifact, read_manifest
from modelwright.base.errors import DataError
from modelwright.base.files import read_jsonl, write_jsonl
from modelwright.base.progress import bar
from modelwright.base.types import Document
from modelwright.data.entry import Failure
from modelwright.data.source import ReadConfig, iterate_documents, kinds

DOCUMENTS, FAILURES = "documents.jsonl", "failures.jsonl"


@dataclass(frozen=True)
class ReadResult:
    """All that was found in one place."""

    documents: list[Document]
    failures: list[Failure] = field(default_factory=list)
    others: Mapping[str, int] = field(default_factory=dict)  # files of other kinds by suffix; "link" for inner links


def read_documents(source: ReadConfig | Path | str) -> ReadResult:
    """Read every document of a source: a folder (with all its folders), one file, or what the settings say.

    Raises:
        DataError: There is nothing there, or nothing in it could be read.
        MissingExtraError: A file's format needs an optional package that is not installed.
    """
    config = source if isinstance(source, ReadConfig) else ReadConfig(str(source))
    others: Counter[str] = Counter()
    documents: list[Document] = []
    failures: list[Failure] = []
    seen: set[str] = set()
    with bar("documents") as shown:
        for item in iterate_documents(config, others):
            if isinstance(item, Failure):
                failures.append(item)
            elif item.id in seen:
                failures.append(Failure(item.id, "a second document of that id; the first was read", item.source))
            else:
                seen.add(item.id)
                documents.append(item)
                shown.describe(item.id)
            shown.advance()
    failures.sort(key=lambda failure: failure.path)
    result = ReadResult(documents, failures, dict(sorted(others.items())))
    if not documents:
        raise DataError(_nothing_readable(config.path, result))
    return result


def _nothing_readable(path: str, result: ReadResult) -> str:
    lines = [f"Nothing readable in {path}: looked for {kinds()} (hidden files left out)."]
    if result.failures:
        lines.append(f"{len(result.failures)} could not be read:")
        lines.extend(f"  {_shown(failure)}" for failure in result.failures[:10])
        if len(result.failures) > 10:
            lines.append(f"  ... and {len(result.failures) - 10} more")
    elif not result.others:
        lines.append("It holds no files.")
    if result.others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in result.others.items())
        lines.append(f"Other files there: {counts}.")
    lines.append("Give a folder or file with text in one of these formats.")
    return "\n".join(lines)


def _shown(failure: Failure) -> str:
    where = f"{failure.path}, {failure.position}" if failure.position else failure.path
    return f"{where}: {failure.reason}"


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
    return [Failure(row["path"], row["reason"], row.get("position", "")) for row in read_jsonl(Path(path) / FAILURES)]


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
