"""What the readers hand to each other: an open file with its name, a verdict on it, and the limits that all keep to.

The one idea: every byte that comes out of a compressed stream is counted before anyone sees it (`Budget`), so an
archive that unpacks to more than it should is stopped while it unpacks, whatever its directory says.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from modelwright.base.progress import human_bytes

PIECE_BYTES = 1 << 18
IN_MEMORY_BYTES = 16 * 10**6  # a member above this is unpacked to a temporary file, not to memory


class Unreadable(Exception):  # noqa: N818 - a verdict on one file that the reader records, not an error of the house
    """A file that cannot be read; the message is the reason."""


class Exhausted(Unreadable):
    """A whole archive has unpacked to more than it may; nothing more of it is read."""


@dataclass(frozen=True)
class Failure:
    """A file, folder, row or record that could not be read, and why."""

    path: str  # relative to the source, with forward slashes; a member of an archive stands behind the archive's name
    reason: str
    position: str = ""  # where in it: "line 12", "record 3 at byte 4096"; empty: all of it


@dataclass(frozen=True)
class Limits:
    """What reading may cost; whatever needs more is set aside."""

    file_bytes: int = 256 * 10**6  # of a file that is parsed as a whole
    line_bytes: int = 64 * 10**6  # of one line of JSONL or CSV; JSON's escapes make text up to six times longer
    unpacked_bytes: int = 64 * 10**9  # of one archive with all that is nested in it
    ratio: int = 200  # unpacked to packed bytes; text packs about 4 to 1, very regular tables 50 to 1
    free_bytes: int = 20 * 10**6  # unpacked of one stream before its ratio counts; 50 times that of a whole archive
    num_members: int = 200_000  # of one archive
    depth: int = 3  # archives within archives
    parse_seconds: float | None = 120.0  # of one file in a process of its own; None: parsed in this process, unlimited
    memory_bytes: int = 4 * 10**9  # of that process


class Budget:
    """Counts unpacked bytes; a part spends from the whole archive's budget too."""

    def __init__(self, packed_bytes: int, limits: Limits, whole: "Budget | None" = None):
        self._whole = whole
        self._limits = limits
        self._spent = 0
        free_bytes = limits.free_bytes * (50 if whole is None else 1)
        self._allowed = free_bytes + limits.ratio * packed_bytes
        if whole is None:
            self._allowed = min(self._allowed, limits.unpacked_bytes)

    def spend(self, num_bytes: int) -> None:
        """Count ``num_bytes`` more.

        Raises:
            Exhausted: The whole archive has used up what it may.
            Unreadable: This stream has.
        """
        self._spent += num_bytes
        if self._whole is not None:
            self._whole.spend(num_bytes)
        if self._spent <= self._allowed:
            return
        if self._whole is None:
            raise Exhausted(
                f"unpacks to more than {human_bytes(self._allowed)}: this looks like a bomb; the rest is left out"
            )
        raise Unreadable(f"is packed more than {self._limits.ratio} to 1: this looks like a bomb")


@dataclass(frozen=True)
class Entry:
    """One open file, on disk or inside an archive, at its beginning. It is closed by whoever opened it."""

    name: str  # as in `Failure.path`
    suffix: str  # what it is read as: ".md", ".jsonl", ".tar.gz"
    handle: BinaryIO
    num_bytes: int  # its size as it lies there; of a compressed stream the packed size
    source: str = ""  # for people: the path on disk, or an address
    metadata: Mapping[str, Any] = field(default_factory=dict)  # what is known of it from outside
    whole: Budget | None = None  # of the outermost archive that it lies in; None: it lies on disk
    depth: int = 0  # archives that it lies in
    bare_name: str = ""  # of what a compressed file holds: its name without the suffixes taken off so far

    def read_whole(self, limits: Limits) -> bytes:
        """Return all its bytes.

        Raises:
            Unreadable: It is empty, larger than a file may be, or damaged.
        """
        pieces, length = [], 0
        while piece := self.handle.read(min(PIECE_BYTES, limits.file_bytes + 1 - length)):
            pieces.append(piece)
            length += len(piece)
            if length > limits.file_bytes:
                size = human_bytes(self.num_bytes) if self.num_bytes >= length else f"more than {human_bytes(length)}"
                raise Unreadable(f"has {size}; one file may have {human_bytes(limits.file_bytes)}")
        if not length:
            raise Unreadable("empty (0 bytes)")
        return b"".join(pieces)


def seekable(entry: Entry) -> BinaryIO:
    """Return the entry's handle, or a temporary copy of it, in which one can jump about; the caller closes a copy.

    The copy's size is bounded by what the entry's streams may unpack to.
    """
    if entry.handle.seekable():
        return entry.handle
    held = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)
    try:
        while piece := entry.handle.read(PIECE_BYTES):
            held.write(piece)
    except BaseException:
        held.close()
        raise
    held.seek(0)
    return held  # type: ignore[return-value]
