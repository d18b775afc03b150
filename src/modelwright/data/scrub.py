"""Take personal data out of texts: find the spans, then mask, replace by pseudonyms, or remove them.

What has a form (`personal_data.py`) and the tagger's names (`tagger.py`) are joined; of two findings that overlap the
better kind stays. Three modes: ``mask`` writes the kind in brackets; ``pseudonym`` writes a stand-in of the same type,
equal for equal values in all documents (`pseudonyms.py`); ``remove`` writes nothing. Reports hold spans, kinds and
counts, never a value; spans point into the text as it was before.
"""

import html
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal

from modelwright.base import env
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import atomic_file
from modelwright.base.types import Document
from modelwright.data.json_array import array_values, first_piece, open_array
from modelwright.data.personal_data import ALL, KINDS, TAGGED, TYPES, Finding, find_patterns, without_overlaps
from modelwright.data.pseudonyms import Pseudonyms
from modelwright.data.tagger import load_tagger

__all__ = ["KINDS", "Finding", "Scrub", "find_personal", "redact", "scrub_jsonl"]

SECRET = "MODELWRIGHT_SECRET"
MAX_LINE_BYTES = 64 << 20  # a longer line is set aside unread: one document is not worth the machine's memory


def find_personal(text: str, kinds: Sequence[str] = KINDS) -> list[Finding]:
    """Return what should be redacted, in order and without overlaps.

    Args:
        text: Any text; the kinds of `KINDS` are safe in code too.
        kinds: Of `personal_data.TYPES`. Names, places and the like load the tagger, once a process.

    >>> find_personal("Ask jo@acme.org, version 3.11.7 of 2024-01-31.")
    [Finding(start=4, end=15, kind='email')]
    """
    found = list(find_patterns(text, kinds))
    tagged = set(kinds) & set(TAGGED)
    if tagged:
        found += [f for f in load_tagger().find(text) if f.kind in tagged]
    return without_overlaps(found, len(text))


def redact(text: str, kinds: Sequence[str] = KINDS) -> tuple[str, list[Finding]]:
    """Replace each finding by its kind in brackets; the spans point into the text as it was.

    >>> redact("Call +49 30 9018200 now")[0]
    'Call [phone] now'
    """
    findings = find_personal(text, kinds)
    return _rewrite(text, findings, lambda kind, value: f"[{kind}]"), findings


def _rewrite(text: str, findings: Sequence[Finding], stand_in: Callable[[str, str], str]) -> str:
    parts, at = [], 0
    for finding in findings:
        parts += [text[at : finding.start], stand_in(finding.kind, text[finding.start : finding.end])]
        at = finding.end
    return "".join([*parts, text[at:]])


@dataclass(frozen=True)
class Scrub:
    """Step of a pipeline: replace personal data in the text, the title and the strings of the metadata.

    Pseudonyms need a secret: the first line of ``secret_file``, or the variable ``MODELWRIGHT_SECRET``. It is read when
    first needed, in each process, and no setting, report or message holds it.
    """

    kinds: tuple[str, ...] = ALL  # of `personal_data.TYPES`
    mode: Literal["mask", "pseudonym", "remove"] = "mask"
    secret_file: str = ""  # file whose first line is the secret of the pseudonyms; empty: the variable

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kinds) - set(TYPES))
        if unknown:
            raise ConfigError(f"kinds holds {unknown[0]!r}; known: {', '.join(TYPES)}. Use some of these.")
        if self.mode not in ("mask", "pseudonym", "remove"):
            raise ConfigError(f"mode is {self.mode!r}; known: mask, pseudonym, remove. Use one of these.")
        if self.secret_file and self.mode != "pseudonym":
            raise ConfigError(
                f"secret_file is given and mode is {self.mode!r}; only pseudonyms take a secret. Leave one of them out."
            )

    def change(self, document: Document) -> Document:
        """Return the document without personal data; its id stays as it is."""
        return self.change_and_tell(document)[0]

    def change_and_tell(self, document: Document) -> tuple[Document, list[Finding]]:
        """Return the document without personal data, and what was found where in its text."""
        text, findings = self.scrub_text(document.text)
        metadata = {key: self._scrub_value(value) for key, value in document.metadata.items()}
        title = self.scrub_text(document.title)[0]
        return replace(document, text=text, title=title, metadata=metadata), findings

    def scrub_text(self, text: str) -> tuple[str, list[Finding]]:
        """Return the text to go on with, and what was found where in the text as it was."""
        if not text:
            return text, []
        findings = find_personal(text, self.kinds)
        return _rewrite(text, findings, self._stand_in), findings

    def _stand_in(self, kind: str, value: str) -> str:
        if self.mode == "remove":
            return ""
        return f"[{kind}]" if self.mode == "mask" else _pseudonyms(self.secret_file).stand_in(kind, value)

    def _scrub_value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.scrub_text(value)[0]
        if isinstance(value, (list, tuple)):
            return [self._scrub_value(item) for item in value]
        if isinstance(value, dict):
            return {key: self._scrub_value(item) for key, item in value.items()}
        return value


@lru_cache(maxsize=4)
def _pseudonyms(secret_file: str) -> Pseudonyms:
    if secret_file:
        try:
            secret = Path(secret_file).read_text(encoding="utf-8").partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"The secret for pseudonyms cannot be read from {secret_file} ({type(error).__name__}). "
                "Expected a text file whose first line is the secret; write one that only you can read."
            ) from None
    else:
        secret = env.read(SECRET) or ""
    if not secret:
        raise ConfigError(
            f"Pseudonyms need a secret and there is none: secret_file is empty and {SECRET} is not set. "
            "Expected at least 16 random characters; set one of the two, and keep it apart from the data."
        )
    return Pseudonyms(secret)


@dataclass
class ScrubResult:
    """What `scrub_jsonl` did."""

    num_documents: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # by type, as Presidio names them
    failures: list[tuple[int, str]] = field(default_factory=list)  # (line from 1, reason); the reason holds no text


def scrub_jsonl(
    source: Path, out: Path, report: Path | None = None, settings: Scrub | None = None, *, is_strict: bool = False
) -> ScrubResult:
    """Scrub a file of JSON objects with ``id`` and ``text``, one a line; every other string is scrubbed as well.

    Args:
        source: Read line by line; memory is bounded by the longest line. A ``.json`` file may be one array of objects.
        out: The same rows without personal data. An id that is personal itself becomes ``line-N``.
        report: Where to write spans (``start``, ``end``, ``type``; ``field`` when not of the text) and counts, without
            values: ``.jsonl`` one document a line, ``.html`` the counts as a page, else one JSON object. None: nowhere.
        settings: None: everything, masked.
        is_strict: Stop at the first line that cannot be read, leaving no output.

    Raises:
        DataError: There is no such file, or (strict) a line is wrong; the message has its number, not its text.
    """
    settings, result = settings or Scrub(), ScrubResult()
    if not Path(source).is_file():
        raise DataError(f"{source} is not a file. Expected JSON lines with id and text; give the path of such a file.")
    with atomic_file(Path(out)) as written, _open_report(report, result) as add_spans:
        for number, row in _read_rows(Path(source), result, is_strict):
            clean, spans = _scrub_row(row, number, settings)
            written.write(json.dumps(clean, ensure_ascii=False) + "\n")
            add_spans(clean["id"], spans)
            result.num_documents += 1
            result.counts.update(span["type"] for span in spans)
    return result


def _scrub_row(row: dict[str, Any], number: int, settings: Scrub) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    spans: list[dict[str, Any]] = []
    patterns = tuple(kind for kind in ALL if kind not in TAGGED and kind not in ("date", "age", "zip_code", "url"))

    def scrub(value: Any, name: str) -> Any:
        if isinstance(value, str):
            text, findings = settings.scrub_text(value)
            where = {} if name == "text" else {"field": name}
            spans.extend({"start": f.start, "end": f.end, "type": f.type, **where} for f in findings)
            return text
        if isinstance(value, list):
            return [scrub(item, name) for item in value]
        if isinstance(value, dict):
            return {key: scrub(item, f"{name}.{key}") for key, item in value.items()}
        return value

    name = row.get("id", number)
    if isinstance(name, str) and find_personal(name, patterns):
        name = f"line-{number}"
    rest = {key: scrub(value, key) for key, value in row.items() if key != "id"}
    return {"id": name, **rest}, spans


def _read_rows(source: Path, result: ScrubResult, is_strict: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    is_array = source.suffix.lower() == ".json"
    with open(source, "rb") as handle:
        for number, row, reason in (_array_rows if is_array else _line_rows)(handle):
            if not reason and (not isinstance(row, dict) or not isinstance(row.get("text"), str)):
                reason = "no object with a string 'text'; add the field"
            if not reason:
                yield number, row
            elif is_strict:
                raise DataError(f"{source}, {'item' if is_array else 'line'} {number}: {reason}.")
            else:
                result.failures.append((number, reason))


def _line_rows(handle: IO[bytes]) -> Iterator[tuple[int, Any, str]]:
    """Yield (number of the line, what it holds, why it cannot be read); reasons quote nothing of it."""
    for number, line in enumerate(_lines(handle), start=1):
        if line is None:
            yield number, None, f"longer than {MAX_LINE_BYTES >> 20} MB; split the document"
        elif line.strip():
            try:
                yield number, json.loads(line), ""
            except (ValueError, RecursionError) as error:  # the text of these may quote the line: only their kind
                yield number, None, f"not valid JSON ({type(error).__name__}); mend or remove the line"


def _array_rows(handle: IO[bytes]) -> Iterator[tuple[int, Any, str]]:
    """Yield the same of the values of one JSON array, or of an object a line where the file is none."""
    whole, text = open_array(handle)  # type: ignore[arg-type]
    if text is None:
        yield from _line_rows(io.BufferedReader(whole))  # type: ignore[type-var]
        return
    for found in array_values(text, first_piece(text), MAX_LINE_BYTES):
        is_text = not any("\udc80" <= char <= "\udcff" for char in found.text if char >= "\udc80")
        yield found.number, found.value, found.reason or ("" if is_text else "not valid UTF-8; save the file as UTF-8")


def _lines(handle: IO[bytes]) -> Iterator[bytes | None]:
    """Yield each line; None for one that is longer than `MAX_LINE_BYTES`, read past in pieces."""
    while line := handle.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = handle.readline(1 << 20)
        yield None


class _open_report:  # noqa: N801 - a context manager that reads as a function
    """Yield ``add(id, spans)``; write the report in the form that the file's name asks for."""

    def __init__(self, path: Path | None, result: ScrubResult):
        self._path, self._result = path, result
        self._file: Any = None
        self._is_first = True

    def __enter__(self) -> Callable[[Any, list[dict[str, Any]]], None]:
        if self._path is None:
            return lambda name, spans: None
        self._file = atomic_file(Path(self._path))
        self._handle = self._file.__enter__()
        if self._form == "json":
            self._handle.write('{"documents": [')
        return self._add

    @property
    def _form(self) -> str:
        suffix = Path(self._path or "").suffix.lower()
        return suffix[1:] if suffix in (".jsonl", ".html") else "json"

    def _add(self, name: Any, spans: list[dict[str, Any]]) -> None:
        if self._form == "html":
            return
        between = "\n" if self._is_first else ",\n"
        row = json.dumps({"id": name, "spans": spans}, ensure_ascii=False)
        self._handle.write(f"{row}\n" if self._form == "jsonl" else f"{between}{row}")
        self._is_first = False

    def __exit__(self, *raised: Any) -> None:
        if self._file is None:
            return
        if raised[0] is None and self._form == "json":
            counts = json.dumps(dict(self._result.counts.most_common()))
            failures = json.dumps([{"line": line, "reason": reason} for line, reason in self._result.failures])
            end = f'\n], "num_documents": {self._result.num_documents}, "counts": {counts}, "failures": {failures}}}\n'
            self._handle.write(end)
        elif raised[0] is None and self._form == "html":
            self._handle.write(_page(self._result))
        self._file.__exit__(*raised)


def _page(result: ScrubResult) -> str:
    rows = "".join(f"<tr><td>{html.escape(name)}<td>{count:,}" for name, count in result.counts.most_common())
    bad = "".join(f"<tr><td>line {line}<td>{html.escape(reason)}" for line, reason in result.failures)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Personal data found</title>"
        "<style>body{font:16px system-ui;margin:2rem}td{padding:.2rem 1rem;text-align:left}</style>"
        f"<h1>Personal data found</h1><p>{result.num_documents:,} documents. Values are not kept.</p>"
        f"<table><tr><th>type<th>spans{rows}</table>" + (f"<h2>Not read</h2><table>{bad}</table>" if bad else "") + "\n"
    )
