"""Values of a JSON array one by one, so that a file of any size needs the memory of its largest value.

A file that ends in ``.json`` may also hold an object a line, as many published data sets do; it is told by its first
character. Damage ends the array: what follows a broken value has no beginning that could be trusted.
Not done: arrays inside an object (``{"data": [...]}``), of which nobody can know which one holds the documents.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Any, BinaryIO

from modelwright.base.types import Document
from modelwright.data.entry import Entry, Failure, Limits, Unreadable
from modelwright.data.tables import Columns, read_jsonl_rows, table_document

_PIECE_CHARS = 1 << 20
_BLANKS = b" \t\r\n\xef\xbb\xbf"


@dataclass(frozen=True)
class ArrayValue:
    """One value of an array, or why it cannot be read."""

    number: int  # counted from 1
    line: int | None  # where it begins; None: the file ended before it
    value: Any  # None where there is a reason
    text: str  # as the file spells it
    reason: str = ""

    @property
    def where(self) -> str:
        """Its place, for people."""
        return f"item {self.number}" + (f" (line {self.line})" if self.line is not None else "")


def array_values(handle: IO[str], head: str, max_chars: int) -> Iterator[ArrayValue]:
    """Yield the values of an array, decoded from a window of the text; its lines are counted as they pass.

    Args:
        handle: The text behind ``head``.
        head: The beginning of the text, with the opening bracket in it.
        max_chars: Of one value.
    """
    decoder, window = json.JSONDecoder(), head.lstrip("\ufeff")
    at, line, number, wanted = window.index("[") + 1, 1, 0, 0
    while True:
        at = _skip(window, at)
        place: int | None = line + window.count("\n", 0, at)
        if at < len(window) and len(window) >= wanted:
            if window[at] == "]":
                return
            try:
                value, end = decoder.raw_decode(window, at)
            except RecursionError:
                yield ArrayValue(number + 1, place, None, "", "nested too deeply; the rest of the array is not read")
                return
            except json.JSONDecodeError as error:
                problem = f"not valid JSON ({error.msg}); the rest of the array is not read"
            else:
                number += 1
                yield ArrayValue(number, place, value, window[at:end])
                line += window.count("\n", 0, end)
                window, at = window[end:], 0
                continue
        elif at >= len(window):
            place, problem = None, "the array does not end; the file was cut off"
        piece = handle.read(_PIECE_CHARS)
        if not piece or len(window) > max_chars:
            reason = problem if not piece else f"longer than {max_chars:,} characters; the rest is not read"
            yield ArrayValue(number + 1, place, None, "", reason)
            return
        wanted = len(window) + min(len(window), max_chars)  # a value of many pieces is tried anew each doubling
        while piece and len(window) < wanted:
            window += piece
            piece = handle.read(_PIECE_CHARS) if len(window) < wanted else ""
        wanted = 0


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n,":
        at += 1
    return at


def open_array(handle: BinaryIO) -> tuple[BinaryIO, IO[str] | None]:
    """Return the handle as if nothing had been read of it; where it begins an array, its text as well.

    Bytes that are no UTF-8 become lone surrogates, for which whoever takes a value refuses it.
    """
    first = b""
    while not first.strip(_BLANKS) and (piece := handle.read(1 << 12)):
        first += piece
    whole = _Prefixed(first, handle)
    if not first.strip(_BLANKS).startswith(b"["):
        return whole, None  # type: ignore[return-value]
    text = io.TextIOWrapper(io.BufferedReader(whole), encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    return whole, text  # type: ignore[return-value]


class _Prefixed(io.RawIOBase):
    """Bytes that were read already, then the rest of a handle, which whoever opened it closes."""

    def __init__(self, first: bytes, handle: BinaryIO):
        self._first, self._handle = first, handle

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._first:
            data, self._first = self._first[: len(buffer)], self._first[len(buffer) :]
        else:
            data = self._handle.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def first_piece(text: IO[str]) -> str:
    """Return the beginning of an array's text, with its opening bracket."""
    head = ""
    while "[" not in head and (more := text.read(_PIECE_CHARS)):
        head += more
    return head


def read_json_rows(entry: Entry, columns: Columns, limits: Limits) -> Iterator[Document | Failure]:
    """Read an array of JSON objects, or an object a line; each is a document.

    Raises:
        DataError: No row among the first has the text column.
        Unreadable: The file is neither.
    """
    handle, text = open_array(entry.handle)
    if text is None:
        yield from read_jsonl_rows(replace(entry, handle=handle), columns, limits)
        return
    for found in array_values(text, first_piece(text), limits.line_bytes):
        try:
            if found.reason:
                raise Unreadable(found.reason)
            if not isinstance(found.value, dict):
                raise Unreadable(f"expected a JSON object, found {type(found.value).__name__}")
            if any("\udc80" <= char <= "\udcff" for char in found.text if char >= "\udc80"):
                raise Unreadable("not valid UTF-8; save the file as UTF-8")
            yield table_document(found.value, columns, entry, found.number)
        except Unreadable as error:
            yield Failure(entry.name, str(error), found.where)
