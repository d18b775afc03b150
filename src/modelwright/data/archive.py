"""Archives and compressed files: zip, tar and gz, bz2, xz, zst, one member after the other, nothing written by name.

Each reader yields open `Entry`s, to be used before the next is asked for, and a `Failure` for each member that is left
out: links, devices, names that point outside, passwords, bombs. An archive inside an archive is yielded like any file;
the caller opens it again, and `Limits.depth` says how often. Unpacked bytes are counted as they come (`entry.Budget`),
so what a directory claims is never believed. A zip archive goes on after a bad member; a tar or a compressed stream
ends where it breaks, since the place of the next member is not known then.
Not done: passwords, archives in several volumes, 7z and rar.
"""

import bz2
import io
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Protocol

from modelwright.base.errors import MissingExtraError
from modelwright.base.progress import human_bytes
from modelwright.data.entry import PIECE_BYTES, Budget, Entry, Failure, Limits, Unreadable, seekable

MAX_WINDOW_BYTES = 128 * 2**20  # memory that an xz or zst stream may ask for
_MAX_HEADER_BYTES = 10**6  # of a long name in a tar archive

_DOUBLE_SUFFIXES = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".warc.gz", ".wet.gz")


class _Decompressor(Protocol):
    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Inflate:
    """zlib's decompressor for gzip members, with the interface of those of bz2 and lzma."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail


def _make_zstd() -> _Decompressor:
    try:
        from compression import zstd  # Python 3.14 and later
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise MissingExtraError("backports.zstd", "data", "Reading .zst files") from None
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 27})


_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": _Inflate,
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(memlimit=MAX_WINDOW_BYTES),
    ".zst": _make_zstd,
}


class _Unpacked(io.RawIOBase):
    """The bytes of a compressed stream of one or more members, counted as they come."""

    def __init__(self, packed: BinaryIO, make: Callable[[], _Decompressor], budget: Budget):
        self._packed = packed
        self._make = make
        self._budget = budget
        self._current = make()
        self._rest = b""
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        self._budget.spend(len(data))
        self._num_bytes += len(data)
        buffer[: len(data)] = data
        return len(data)

    def _read(self, size: int) -> bytes:
        try:
            while True:
                if self._current.eof and not self._begin_member():
                    return b""
                piece = b""
                if self._current.needs_input:
                    piece, self._rest = self._rest or self._packed.read(PIECE_BYTES), b""
                if data := self._current.decompress(piece, size):
                    return data
                if not piece and self._current.needs_input and not self._current.eof:
                    raise Unreadable(f"ends in the middle, after {self._num_bytes} unpacked bytes: truncated")
        except Unreadable:
            raise
        except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
            raise Unreadable(f"is damaged after {self._num_bytes} unpacked bytes ({error})") from None
        except Exception as error:  # zstd's error is a class of the optional package
            if type(error).__name__ != "ZstdError":
                raise
            raise Unreadable(f"is damaged after {self._num_bytes} unpacked bytes ({error})") from None

    def _begin_member(self) -> bool:
        rest = self._current.unused_data
        while not rest.strip(b"\0"):  # padding between members, as tapes have it
            if not (rest := self._packed.read(PIECE_BYTES)):
                return False
        self._rest = rest.lstrip(b"\0")
        self._current = self._make()
        return True


def suffix_of(name: str) -> str:
    """Return the suffix that says how a file is read, in small letters.

    >>> suffix_of("a/B.TAR.gz"), suffix_of("notes.md"), suffix_of("rows.jsonl.gz")
    ('.tar.gz', '.md', '.gz')
    """
    lower = name.lower()
    double = next((suffix for suffix in _DOUBLE_SUFFIXES if lower.endswith(suffix)), None)
    return double or PurePosixPath(lower).suffix


def decompress(entry: Entry, kind: str, limits: Limits) -> BinaryIO:
    """Return the stream of unpacked bytes of an entry compressed as ``kind``, such as ".gz"."""
    budget = Budget(entry.num_bytes, limits, entry.whole or Budget(entry.num_bytes, limits))
    return io.BufferedReader(_Unpacked(entry.handle, _DECOMPRESSORS[kind], budget), PIECE_BYTES)


def unpack_stream(entry: Entry, limits: Limits) -> Iterator[Entry | Failure]:
    """Yield the one file that a .gz, .bz2, .xz or .zst holds, under the compressed file's name."""
    whole = entry.whole or Budget(entry.num_bytes, limits)
    entry = replace(entry, whole=whole)
    bare = entry.bare_name or entry.name
    bare = bare[: -len(entry.suffix)] if bare.lower().endswith(entry.suffix) else ""
    handle = decompress(entry, entry.suffix, limits)
    yield replace(entry, suffix=suffix_of(bare), bare_name=bare, handle=handle, depth=entry.depth + 1)


def unpack_tar(entry: Entry, limits: Limits) -> Iterator[Entry | Failure]:
    """Yield the regular files of a tar archive, plain or compressed, in their order."""
    whole = entry.whole or Budget(entry.num_bytes, limits)
    entry = replace(entry, whole=whole)
    packed = {".tgz": ".gz", ".tbz": ".bz2", ".txz": ".xz"}.get(entry.suffix, entry.suffix.removeprefix(".tar"))
    handle = decompress(entry, packed, limits) if packed else entry.handle
    seen: set[int] = set()
    try:
        with tarfile.open(fileobj=handle, mode="r|", tarinfo=_TarInfo) as archive:
            for number, info in enumerate(archive, start=1):
                if number > limits.num_members:
                    raise Unreadable(f"holds more than {limits.num_members} members; the rest is left out")
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                reason = _name_reason(info.name, seen) or _tar_reason(info)
                if reason:
                    yield Failure(_member_name(entry, info.name), reason)
                elif info.isfile():
                    member = archive.extractfile(info)
                    assert member is not None
                    yield _member(entry, info.name, member, info.size)  # type: ignore[arg-type]
    except (tarfile.TarError, EOFError, ValueError, UnicodeError) as error:
        raise Unreadable(f"damaged tar archive ({error})") from None


class _TarInfo(tarfile.TarInfo):
    """A header whose long names may not fill the memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        is_text = self.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, b"L", b"K")
        if is_text and self.size > _MAX_HEADER_BYTES:
            raise tarfile.TarError(f"a header of {human_bytes(self.size)}")
        return super()._proc_member(tar)  # type: ignore[misc]


def _tar_reason(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return "a link in an archive; links are not followed"
    if info.issparse():
        return "a sparse file in an archive; unpack it yourself and name the folder"
    return "" if info.isfile() or info.isdir() else "not a regular file (a pipe or device)"


def unpack_zip(entry: Entry, limits: Limits) -> Iterator[Entry | Failure]:
    """Yield the files of a zip archive in the order of its directory."""
    whole = entry.whole or Budget(entry.num_bytes, limits)
    entry = replace(entry, whole=whole)
    handle = seekable(entry)
    try:
        _check_directory(handle, limits)
        with zipfile.ZipFile(handle) as archive:
            yield from _zip_members(entry, archive, limits)
    except (zipfile.BadZipFile, struct.error, ValueError, UnicodeError, EOFError, OSError) as error:
        raise Unreadable(f"not a whole zip archive ({error})") from None
    finally:
        if handle is not entry.handle:
            handle.close()


def _check_directory(handle: BinaryIO, limits: Limits) -> None:
    """Refuse a directory of very many members before `zipfile` makes an object of each."""
    size = handle.seek(0, io.SEEK_END)
    handle.seek(max(0, size - 70_000))
    tail = handle.read(70_000)
    place = tail.rfind(b"PK\x05\x06")
    if place >= 0 and len(tail) >= place + 22:
        directory_bytes = struct.unpack_from("<I", tail, place + 12)[0]
        place64 = tail.rfind(b"PK\x06\x06", 0, place)
        if place64 >= 0 and len(tail) >= place64 + 48:
            directory_bytes = struct.unpack_from("<Q", tail, place64 + 40)[0]
        if directory_bytes > limits.num_members * 100:  # an entry has 46 bytes and its name
            raise Unreadable(f"its directory has {human_bytes(directory_bytes)}; at most {limits.num_members} members")
    handle.seek(0)


def _zip_members(entry: Entry, archive: zipfile.ZipFile, limits: Limits) -> Iterator[Entry | Failure]:
    infos = archive.infolist()
    if len(infos) > limits.num_members:
        raise Unreadable(f"holds {len(infos)} members; at most {limits.num_members}")
    ends: dict[int, int] = {}  # where each member's bytes end at least, to find those that share bytes
    last = 0
    for info in sorted(infos, key=lambda item: item.header_offset):
        ends[info.header_offset] = last
        last = max(last, info.header_offset + 30 + info.compress_size)
    seen: set[int] = set()
    for info in infos:
        if info.is_dir():
            continue
        reason = _name_reason(info.orig_filename, seen) or _zip_reason(info, limits)
        if info.header_offset < ends[info.header_offset]:
            reason = reason or "shares its bytes with another member: this looks like a bomb"
        if reason:
            yield Failure(_member_name(entry, info.filename), reason)
            continue
        try:
            member = archive.open(info)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, OSError) as error:
            yield Failure(_member_name(entry, info.filename), f"cannot be unpacked ({error})")
            continue
        assert entry.whole is not None
        budget = Budget(info.compress_size, limits, entry.whole)
        with closing(member):
            counted = io.BufferedReader(_Counted(member, budget), PIECE_BYTES)
            yield _member(entry, info.filename, counted, info.file_size)


class _Counted(io.RawIOBase):
    """A zip member whose bytes are counted, and whose damage is a reason."""

    def __init__(self, member: Any, budget: Budget):
        self._member = member
        self._budget = budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._member.read(len(buffer))
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError) as error:
            raise Unreadable(f"damaged in the archive ({error or type(error).__name__})") from None
        self._budget.spend(len(data))
        buffer[: len(data)] = data
        return len(data)


def _zip_reason(info: zipfile.ZipInfo, limits: Limits) -> str:
    if info.flag_bits & 0x1:
        return "encrypted in the archive: it needs a password"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "a link in an archive; links are not followed"
    if info.file_size > limits.free_bytes and info.file_size > limits.ratio * info.compress_size:
        return f"is packed more than {limits.ratio} to 1: this looks like a bomb"
    return ""


def _name_reason(name: str, seen: set[int]) -> str:
    """Why a member's name is refused; nothing is ever written by it, but it names the document."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or "\0" in name:
        return "has no usable name"
    if name[0] in "/\\" or ".." in parts or (len(parts[0]) == 2 and parts[0][1] == ":"):
        return "its name points outside the archive"
    key = hash("/".join(parts))
    if key in seen:
        return "a second member of that name; the first was read"
    seen.add(key)
    return ""


def _member_name(entry: Entry, name: str) -> str:
    shown = name.replace("\\", "/").encode("utf-8", "backslashreplace").decode()
    return f"{entry.name}/{shown}"


def _member(entry: Entry, name: str, handle: BinaryIO, num_bytes: int) -> Entry:
    inner = _member_name(entry, name)
    return replace(
        entry,
        name=inner,
        suffix=suffix_of(inner),
        bare_name="",
        handle=handle,
        num_bytes=num_bytes,
        source=f"{entry.source}/{inner[len(entry.name) + 1 :]}",
        depth=entry.depth + 1,
    )
