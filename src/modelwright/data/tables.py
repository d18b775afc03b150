"""Files of rows: CSV, JSON lines, Parquet and Arrow; each row is a document, and a bad one is set aside by its number.

One line or one small batch is held at a time, so a file may have any size. A row's own ``id``, ``text``, ``source``,
``title`` and ``metadata`` are taken as they are; other columns become metadata. A row without an id is called
``file#number``. Numbers begin at 1: of the line where a CSV or JSONL row begins, of the row in Parquet and Arrow.
Text is UTF-8; half surrogate pairs and NaN, which JSON lines hold but no JSON reader must take, become U+FFFD and null.
Not done: a Parquet value that a run-length code repeats is bounded only after a batch of 64 is unpacked.
"""

import csv
import datetime
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from modelwright.base.errors import DataError, MissingExtraError
from modelwright.base.progress import human_bytes
from modelwright.base.types import Document
from modelwright.data.entry import Entry, Failure, Limits, Unreadable, seekable

MAX_TEXT_BYTES = 32 * 10**6  # of one document, as in data/parse.py
_READ_BYTES = 1 << 20
_BATCH_ROWS = 64
_OWN = ("id", "text", "source", "title", "metadata")


@dataclass(frozen=True)
class Columns:
    """Which columns make the document."""

    text: str = "text"
    id: str | None = None  # None: "id" where there is such a column, else the row's number
    title: str | None = None  # None: "title" where there is such a column
    metadata: tuple[str, ...] | None = None  # None: all other columns
    delimiter: str | None = None  # of CSV; None: the commonest of , ; tab and | in the first line


def read_jsonl_rows(entry: Entry, columns: Columns, limits: Limits) -> Iterator[Document | Failure]:
    """Read one JSON object a line.

    Raises:
        DataError: No row among the first has the text column.
        Unreadable: The file is damaged from some place on; what stands before it was yielded.
    """
    has_text = False
    for number, line in _lines(entry.handle, limits):
        where = f"line {number}"
        if isinstance(line, Failure):
            yield Failure(entry.name, line.reason, where)
            continue
        if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise Unreadable("is UTF-16; JSON lines are UTF-8: save it as UTF-8")
        if not line.strip(b" \t\r\n\xef\xbb\xbf"):
            continue
        try:
            row = parse_row(line)
            if columns.text not in row and not has_text and number == 1:
                raise _missing(entry, columns.text, "text_column", row)
            has_text = has_text or columns.text in row
            yield table_document(row, columns, entry, number)
        except Unreadable as error:
            yield Failure(entry.name, str(error), where)


def parse_row(line: bytes) -> dict[str, Any]:
    """Return the object that a line of JSON holds.

    Raises:
        Unreadable: It is no JSON object in UTF-8.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_constant=lambda name: None)
    except UnicodeDecodeError as error:
        raise Unreadable(f"not valid UTF-8: byte 0x{line[error.start]:02x} at place {error.start + 1}") from None
    except RecursionError:
        raise Unreadable("JSON nested too deep") from None
    except ValueError as error:
        raise Unreadable(f"not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise Unreadable(f"expected a JSON object, found {type(row).__name__}")
    return row


def _lines(handle: BinaryIO, limits: Limits) -> Iterator[tuple[int, bytes | Failure]]:
    """Yield the numbered lines without their ends; of one that is too long only the verdict, and none of it is kept."""
    number, length = 1, 0
    held: list[bytes] = []  # the pieces of a line that has not ended
    # What comes at once: of a stream that breaks off, all before the break.
    read: Callable[[int], bytes] = getattr(handle, "read1", handle.read)
    while piece := read(_READ_BYTES):
        if b"\n" not in piece and length > limits.line_bytes:
            length += len(piece)
            continue
        *ended, rest = piece.split(b"\n")
        for line in ended:
            yield number, _line([*held, line], length + len(line), limits)
            number, length = number + 1, 0
            held.clear()
        length += len(rest)
        held = [*held, rest] if length <= limits.line_bytes else []
    if length:
        yield number, _line(held, length, limits)


def _line(pieces: list[bytes], length: int, limits: Limits) -> bytes | Failure:
    if length <= limits.line_bytes:
        return b"".join(pieces)
    return Failure("", f"has {human_bytes(length)}; a line may have {human_bytes(limits.line_bytes)}")


def read_csv_rows(entry: Entry, columns: Columns, limits: Limits) -> Iterator[Document | Failure]:
    """Read rows separated by commas (or what `Columns` says); the first line names the columns.

    Raises:
        DataError: There is no text column.
        Unreadable: A quoted field never ends, or the file is damaged from some place on.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_TEXT_BYTES))
    lines = _CsvLines(entry.handle, limits)
    first = next(lines, None)
    if first is None:
        raise Unreadable("empty (0 bytes)")
    first = first.removeprefix("\ufeff")
    delimiter = columns.delimiter or max(",;\t|", key=first.count)
    rows = csv.reader(_chain(first, lines), delimiter=delimiter)
    names = next(rows)
    _wanted(entry, columns, names)
    while True:
        start = lines.number + 1
        where = f"line {start}"
        try:
            values = next(rows, None)
        except csv.Error as error:
            raise Unreadable(f"line {start}: {error}; the rest is left out") from None
        if lines.too_long:
            yield Failure(entry.name, lines.too_long, f"line {lines.number}")
            lines.too_long = ""
            continue
        if values is None:
            return
        if not values:
            continue
        try:
            if len(values) != len(names):
                raise Unreadable(f"has {len(values)} fields; the first line names {len(names)} columns")
            if any("\udc80" <= char <= "\udcff" for value in values for char in value if char >= "\udc80"):
                raise Unreadable("not valid UTF-8; save the file as UTF-8")
            yield table_document(dict(zip(names, values, strict=True)), columns, entry, start)
        except Unreadable as error:
            yield Failure(entry.name, str(error), where)


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


class _CsvLines:
    """Lines as text; bytes that are no UTF-8 become lone surrogates, which the row is refused for later."""

    def __init__(self, handle: BinaryIO, limits: Limits):
        self._lines = _lines(handle, limits)
        self.number = 0
        self.too_long = ""

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        if isinstance(line, Failure):
            self.too_long = line.reason
            return "\n"
        return line.decode("utf-8", "surrogateescape") + "\n"


def read_parquet_rows(entry: Entry, columns: Columns, limits: Limits) -> Iterator[Document | Failure]:
    """Read a Parquet file, one row group after the other; a damaged row group is set aside.

    Raises:
        DataError: There is no text column.
        Unreadable: The file is damaged or cut off; Parquet keeps its directory at the end.
    """
    parquet = _pyarrow("pyarrow.parquet")
    arrow = _pyarrow("pyarrow")
    handle = seekable(entry)
    try:
        try:
            file = parquet.ParquetFile(handle, pre_buffer=False, thrift_string_size_limit=10**8)
        except (arrow.ArrowException, OSError, ValueError) as error:
            raise Unreadable(f"damaged or truncated Parquet ({_first_line(error)})") from None
        wanted = _wanted(entry, columns, file.schema_arrow.names)
        number = 0
        for group in range(file.num_row_groups):
            first, number = number, number + file.metadata.row_group(group).num_rows
            if (size := file.metadata.row_group(group).total_byte_size) > limits.unpacked_bytes // 16:
                yield Failure(entry.name, f"unpacks to {human_bytes(size)}", f"row group {group + 1}")
                continue
            try:
                batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=wanted)
                for batch in batches:
                    for row in batch.to_pylist():
                        first += 1
                        yield _row_or_failure(row, columns, entry, first)
            except (arrow.ArrowException, OSError, ValueError) as error:
                yield Failure(entry.name, f"damaged ({_first_line(error)})", f"row group {group + 1}, row {first + 1}")
    finally:
        if handle is not entry.handle:
            handle.close()


def read_arrow_rows(entry: Entry, columns: Columns, limits: Limits) -> Iterator[Document | Failure]:
    """Read an Arrow stream or file, as `datasets` keeps its copies.

    Raises:
        DataError: There is no text column.
        Unreadable: The file is damaged or cut off.
    """
    del limits  # a batch has the size it was written with
    arrow, ipc = _pyarrow("pyarrow"), _pyarrow("pyarrow.ipc")
    handle = seekable(entry)
    number = 0
    try:
        is_file = handle.read(6) == b"ARROW1"
        handle.seek(0)
        reader = ipc.open_file(handle) if is_file else ipc.open_stream(handle)
        wanted = _wanted(entry, columns, reader.schema.names)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                for row in batch.slice(start, _BATCH_ROWS).select(wanted).to_pylist():
                    number += 1
                    yield _row_or_failure(row, columns, entry, number)
    except (arrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise Unreadable(f"damaged or truncated Arrow data after row {number} ({_first_line(error)})") from None
    finally:
        if handle is not entry.handle:
            handle.close()


def _pyarrow(module: str) -> Any:
    try:
        import importlib

        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError("pyarrow", "data", "Reading .parquet and .arrow files") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _wanted(entry: Entry, columns: Columns, names: list[str]) -> list[str]:
    for name, setting in ((columns.text, "text_column"), (columns.id, "id_column"), (columns.title, "title_column")):
        if name is not None and name not in names:
            raise _missing(entry, name, setting, names)
    if columns.metadata is None:
        return names
    return [n for n in names if n in {columns.text, columns.id, columns.title, *_OWN, *columns.metadata}]


def _missing(entry: Entry, name: str, setting: str, names: Iterable[str]) -> DataError:
    shown = ", ".join(map(str, list(names)[:40]))
    return DataError(f"{entry.name} has no column {name!r}; its columns: {shown}. Name the right one with {setting}.")


def _row_or_failure(row: Mapping[str, Any], columns: Columns, entry: Entry, number: int) -> Document | Failure:
    try:
        return table_document(row, columns, entry, number)
    except Unreadable as error:
        return Failure(entry.name, str(error), f"row {number}")


def table_document(row: Mapping[str, Any], columns: Columns, entry: Entry, number: int) -> Document:
    """Return the document that row ``number`` of a file is.

    Raises:
        Unreadable: It has no text, or one that is too long.
    """
    if columns.text not in row:
        raise Unreadable(f"has no {columns.text!r}; it has {', '.join(map(str, list(row)[:40]))}")
    text = row[columns.text]
    if not isinstance(text, str):
        raise Unreadable(f"{columns.text!r} is {'null' if text is None else type(text).__name__}; expected text")
    if not text.strip("\ufeff \t\r\n\0"):
        raise Unreadable("holds no text, only white space")
    if len(text) > MAX_TEXT_BYTES:
        raise Unreadable(f"holds {len(text)} characters; a document may have {human_bytes(MAX_TEXT_BYTES)}")
    name, title = row.get(columns.id or "id"), row.get(columns.title or "title")
    if columns.id is not None and name in (None, ""):
        raise Unreadable(f"has no {columns.id!r}")
    given = row.get("metadata")
    metadata = {**entry.metadata, **(given if isinstance(given, Mapping) else {})}
    taken = {columns.text, columns.id or "id", columns.title or "title", "source", "metadata"}
    for key, value in row.items():
        if key not in taken and (columns.metadata is None or key in columns.metadata):
            metadata[str(key)] = value
    return Document(
        id=_encodable(str(name)) if name not in (None, "") else f"{entry.name}#{number}",
        text=_encodable(text),
        source=_encodable(str(row.get("source") or f"{entry.source or entry.name}:{number}")),
        title=_encodable(title) if isinstance(title, str) else "",
        metadata={_encodable(key): _plain(value) for key, value in metadata.items()},
    )


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold; bytes, which it cannot, are said by their number."""
    if isinstance(value, str):
        return _encodable(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_encodable(str(key)): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (bytes, bytearray)):
        return f"({len(value)} bytes)"
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return str(value)


def _encodable(text: str) -> str:
    """Replace half surrogate pairs, which no file can hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
