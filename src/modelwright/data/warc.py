"""Web archives: each page that a WARC file keeps becomes a document.

Responses, resources and conversions (the plain text of a .wet file) are read; requests, metadata and revisits are
passed over. A page's id is the archive's name and the record's, its source the address. In a compressed archive each
record is a gzip member of its own, so a damaged record is set aside with its place and reading goes on at the next
member; in a plain one it goes on at the next line that begins a record.
Source: ISO 28500:2017 (WARC 1.1), https://iipc.github.io/warc-specifications/; RFC 9112 for HTTP inside.
Not done: ARC files of before 2009, HTTP bodies in brotli, records in several segments.
"""

import io
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO

from modelwright.base.progress import human_bytes
from modelwright.data.archive import decompress
from modelwright.data.entry import PIECE_BYTES, Budget, Entry, Exhausted, Failure, Limits, Unreadable

MAX_HEADER_BYTES = 1 << 16
_READ_TYPES = ("response", "resource", "conversion")
_SUFFIXES = {
    "text/html": ".html",
    "application/xhtml+xml": ".html",
    "text/plain": ".txt",
    "text/markdown": ".md",
    "application/pdf": ".pdf",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": ".docx",
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/tiff": ".tiff",
    "image/webp": ".webp",
}
_GZIP_MARK = b"\x1f\x8b\x08"


def unpack_warc(entry: Entry, limits: Limits) -> Iterator[Entry | Failure]:
    """Yield the page of each record, and a `Failure` for each record that is damaged."""
    entry = replace(entry, whole=entry.whole or Budget(entry.num_bytes, limits))
    window = _Window(entry.handle)
    if window.peek(3) == _GZIP_MARK:
        yield from _read_members(entry, window, limits)
    else:
        yield from _read_plain(entry, window, limits)


class _Window:
    """A stream with its place, in which one can look ahead and search for a mark."""

    def __init__(self, handle: BinaryIO):
        self._handle = handle
        self._held = b""
        self.place = 0

    def peek(self, size: int) -> bytes:
        while len(self._held) < size:
            piece = self._handle.read(PIECE_BYTES)
            if not piece:
                break
            self._held += piece
        return self._held[:size]

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes; fewer only at the end."""
        data = self.peek(size)
        self._held = self._held[len(data) :]
        self.place += len(data)
        return data

    def push_back(self, data: bytes) -> None:
        self._held = data + self._held
        self.place -= len(data)

    def skip(self, size: int) -> int:
        left = size
        while left and (data := self.read(min(left, PIECE_BYTES))):
            left -= len(data)
        return size - left

    def skip_to(self, mark: bytes) -> bool:
        """Go to the next place where ``mark`` stands."""
        while True:
            self.peek(PIECE_BYTES)
            found = self._held.find(mark)
            if found >= 0:
                self.skip(found)
                return True
            if len(self._held) < len(mark):
                self.skip(len(self._held))
                return False
            self.skip(max(1, len(self._held) - len(mark) + 1))


@dataclass(frozen=True)
class _Record:
    number: int
    place: int
    headers: Mapping[str, str]
    block: bytes

    @property
    def position(self) -> str:
        return f"record {self.number} at byte {self.place}"


def _read_members(entry: Entry, window: _Window, limits: Limits) -> Iterator[Entry | Failure]:
    """Read one gzip member after the other; after a damaged one, look for the next that begins a record."""
    number = 0
    while window.peek(1):
        number += 1
        place = window.place
        position = f"record {number} at byte {place}"
        try:
            member = _Window(io.BytesIO(_inflate_member(entry, window, limits)))
            while member.peek(1):
                record = _read_record(member, number, place, limits)
                if record is not None:
                    yield from _open_record(entry, record, limits)
        except Exhausted:
            raise
        except Unreadable as error:
            yield Failure(entry.name, str(error), position)
            if window.place == place:
                window.skip(1)
            if window.peek(3) != _GZIP_MARK and not window.skip_to(_GZIP_MARK):
                return


def _inflate_member(entry: Entry, window: _Window, limits: Limits) -> bytes:
    """Unpack one gzip member; on damage the window stands just behind its first byte, to look for the next mark."""
    start_piece = window.peek(len(_GZIP_MARK))
    if start_piece != _GZIP_MARK:
        raise Unreadable("is not a gzip member")
    stream = zlib.decompressobj(wbits=31)
    pieces: list[bytes] = []
    length = packed = 0
    first = True
    while not stream.eof:
        piece = window.read(1 << 14)
        if not piece:
            raise Unreadable(f"ends in the middle, after {length} unpacked bytes: truncated")
        packed += len(piece)
        data = piece
        try:
            while data or first:
                first = False
                out = stream.decompress(data, PIECE_BYTES)
                length += len(out)
                _check_member(entry, length, packed, len(out), limits)
                pieces.append(out)
                data = stream.unconsumed_tail
        except (zlib.error, Unreadable) as error:
            # What was read ahead may hold whole members; the first byte of this one is not looked at again.
            window.push_back(piece[1:] if packed == len(piece) else piece)
            if isinstance(error, Unreadable):
                raise
            raise Unreadable(f"damaged gzip data ({error})") from None
    window.push_back(stream.unused_data)
    return b"".join(pieces)


def _check_member(entry: Entry, length: int, packed: int, new: int, limits: Limits) -> None:
    assert entry.whole is not None
    entry.whole.spend(new)
    if length > limits.file_bytes:
        raise Unreadable(f"unpacks to more than {human_bytes(limits.file_bytes)}")
    if length > limits.free_bytes and length > limits.ratio * packed:
        raise Unreadable(f"is packed more than {limits.ratio} to 1: this looks like a bomb")


def _read_plain(entry: Entry, window: _Window, limits: Limits) -> Iterator[Entry | Failure]:
    number = 0
    while _skip_blank(window):
        number += 1
        place = window.place
        try:
            record = _read_record(window, number, place, limits)
            if record is not None:
                yield from _open_record(entry, record, limits)
        except Exhausted:
            raise
        except Unreadable as error:
            yield Failure(entry.name, str(error), f"record {number} at byte {place}")
            if window.place == place:
                window.skip(1)
            if not window.skip_to(b"WARC/1."):
                return


def _read_record(window: _Window, number: int, place: int, limits: Limits) -> _Record | None:
    """Read one record; None for one that is passed over or for blank lines at the end."""
    if not _skip_blank(window):
        return None
    head = window.peek(MAX_HEADER_BYTES)
    end = head.find(b"\r\n\r\n")
    if not head.startswith(b"WARC/") or end < 0:
        raise Unreadable("does not begin with a WARC header")
    headers = _headers(head[:end].split(b"\r\n")[1:])
    length = headers.get("content-length", "")
    if not length.isascii() or not length.isdigit() or len(length) > 15:
        raise Unreadable(f"has the Content-Length {length!r}; expected a number")
    num_bytes = int(length)
    window.skip(end + 4)
    if headers.get("warc-type", "").lower() not in _READ_TYPES or num_bytes > limits.file_bytes:
        missing = num_bytes - window.skip(num_bytes)
        if missing:
            raise Unreadable(f"ends {missing} bytes before its Content-Length of {num_bytes}")
        if num_bytes > limits.file_bytes:
            raise Unreadable(f"has {human_bytes(num_bytes)}; one page may have {human_bytes(limits.file_bytes)}")
        return None
    block = window.read(num_bytes)
    if len(block) < num_bytes:
        raise Unreadable(f"ends {num_bytes - len(block)} bytes before its Content-Length of {num_bytes}")
    is_cut_off = not window.peek(1) and not block.endswith(b"\r\n\r\n")  # only the end mark is missing
    if window.peek(4) != b"\r\n\r\n" and not is_cut_off:
        # The length is wrong: what follows is still this record's, or the block holds the beginning of the next.
        inner = block.find(b"\r\n\r\nWARC/1.")
        if inner >= 0:
            window.push_back(block[inner + 4 :])
        raise Unreadable(f"does not end where its Content-Length of {num_bytes} says")
    return _Record(number, place, headers, block)


def _skip_blank(window: _Window) -> bool:
    """Pass over the empty lines that end a record; False at the end."""
    while window.peek(2) == b"\r\n":
        window.read(2)
    return bool(window.peek(1))


def _headers(lines: list[bytes]) -> dict[str, str]:
    found: dict[str, str] = {}
    last = ""
    for line in lines:
        text = line.decode("utf-8", "replace")
        if text[:1] in (" ", "\t") and last:  # a folded line
            found[last] += " " + text.strip()
            continue
        name, colon, value = text.partition(":")
        if colon:
            last = name.strip().lower()
            found.setdefault(last, value.strip())
    return found


def _open_record(entry: Entry, record: _Record, limits: Limits) -> Iterator[Entry | Failure]:
    """Yield the page in a record; nothing for kinds that are not read, such as scripts."""
    kind, body = record.headers.get("content-type", ""), record.block
    status = ""
    if record.headers["warc-type"].lower() == "response" and kind.lower().startswith("application/http"):
        head, mark, body = body.partition(b"\r\n\r\n")
        if not mark:
            raise Unreadable("holds an HTTP answer without an end of its header")
        lines = head.split(b"\r\n")
        status = lines[0].decode("latin-1").partition(" ")[2][:3]
        http = _headers(lines[1:])
        kind = http.get("content-type", "")
        body = _decode_body(entry, body, http, limits)
    media, charset = _media_type(kind)
    suffix = _SUFFIXES.get(media)
    if suffix is None or (status and not status.startswith("2")) or not body:
        return
    if suffix in (".html", ".txt", ".md") and charset:
        body = _to_utf8(body, charset)
    name = record.headers.get("warc-record-id", "").strip("<>") or str(record.number)
    metadata = {
        "url": record.headers.get("warc-target-uri", "").strip("<>"),
        "date": record.headers.get("warc-date", ""),
    }
    yield replace(
        entry,
        name=f"{entry.name}/{name}",
        suffix=suffix,
        handle=io.BytesIO(body),
        num_bytes=len(body),
        source=metadata["url"] or entry.source,
        metadata={**entry.metadata, **{k: v for k, v in metadata.items() if v}},
        depth=entry.depth + 1,
    )


def _media_type(kind: str) -> tuple[str, str]:
    media, _, rest = kind.partition(";")
    charset = re.search(r"charset\s*=\s*[\"']?([\w.:-]{1,40})", rest, re.IGNORECASE)
    return media.strip().lower(), charset[1].lower() if charset else ""


def _decode_body(entry: Entry, body: bytes, http: Mapping[str, str], limits: Limits) -> bytes:
    # Crawlers that store bodies decoded leave the header in place, so what is not encoded is taken as it is.
    if "chunked" in http.get("transfer-encoding", "").lower():
        body = _join_chunks(body)
    encoding = http.get("content-encoding", "").lower()
    if encoding in ("gzip", "x-gzip") and body.startswith(_GZIP_MARK):
        inner = replace(entry, handle=io.BytesIO(body), num_bytes=len(body))
        return inner_bytes(decompress(inner, ".gz", limits), limits)
    if encoding == "br":
        raise Unreadable("its body is packed with brotli, which is not read")
    return body


def inner_bytes(stream: BinaryIO, limits: Limits) -> bytes:
    """Return a stream's bytes, bounded by what a file may have."""
    data = stream.read(limits.file_bytes + 1)
    if len(data) > limits.file_bytes:
        raise Unreadable(f"unpacks to more than {human_bytes(limits.file_bytes)}")
    return data


def _join_chunks(body: bytes) -> bytes:
    pieces: list[bytes] = []
    place = 0
    while True:
        end = body.find(b"\r\n", place, place + 200)
        size = body[place:end].partition(b";")[0].strip() if end >= 0 else b""
        if not re.fullmatch(rb"[0-9a-fA-F]{1,8}", size):
            return body if not pieces else b"".join(pieces)
        length = int(size, 16)
        if not length:
            return b"".join(pieces)
        pieces.append(body[end + 2 : end + 2 + length])
        place = end + 2 + length + 2


def _to_utf8(body: bytes, charset: str) -> bytes:
    """Write a page in UTF-8 with its mark, which goes before what the page says of itself, as HTTP's header does."""
    charset = "cp1252" if charset in ("iso-8859-1", "latin-1", "latin1", "ascii", "us-ascii") else charset
    try:
        text = body.decode(charset)
    except LookupError:
        return body  # the page may know better
    except UnicodeDecodeError as error:
        raise Unreadable(f"not valid {charset.upper()}, as its header says: offset {error.start}") from None
    return b"\xef\xbb\xbf" + text.removeprefix("\ufeff").encode()
