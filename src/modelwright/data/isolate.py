"""Parsing in a process of its own, so that a file can cost a failure but never the run.

PDF, HTML, Word and image parsers walk structures of any shape in C; one crafted file may take hours, all memory, or the
process. So they run in a child with bounded memory and a bounded time between signs of life, kept for the next file and
replaced when it dies. Plain text is decoded here. The child speaks lengths and pickles over its pipes; only what this
package sent and made is unpickled.
"""

import atexit
import contextlib
import importlib.util
import os
import pickle
import select
import struct
import subprocess
import sys
import time
from typing import IO, Any

from modelwright.base.errors import MissingExtraError
from modelwright.base.progress import human_bytes
from modelwright.base.registry import lookup
from modelwright.data import PARSERS
from modelwright.data.entry import Limits, Unreadable
from modelwright.data.ocr import OcrConfig
from modelwright.data.parse import Parsed

_HERE = (".md", ".txt")  # decoding cannot go wrong in any way that a check does not see
_NEEDS = {
    ".docx": ("docx", "python-docx", "docs"),
    ".htm": ("trafilatura", "trafilatura", "docs"),
    ".html": ("trafilatura", "trafilatura", "docs"),
    ".pdf": ("pypdfium2", "pypdfium2", "docs"),
    **dict.fromkeys((".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"), ("PIL", "pillow", "vision")),
}
_ALIVE, _DONE = 0, 1
_HEAD = struct.Struct("<BQ")
_COMMAND = "from modelwright.data.isolate import serve; serve({})"


def parse_apart(suffix: str, data: bytes, ocr: OcrConfig, limits: Limits) -> Parsed:
    """Parse a file's bytes by its suffix, in another process if it is of a kind that can go wrong.

    Raises:
        Unreadable: The file cannot be parsed, or took more time or memory than it may.
        MissingExtraError: The format needs an optional package that is not installed.
    """
    if suffix in _HERE or limits.parse_seconds is None:
        return _parse(suffix, data, ocr, lambda: None)
    if suffix in _NEEDS and importlib.util.find_spec(_NEEDS[suffix][0]) is None:
        _, package, extra = _NEEDS[suffix]
        raise MissingExtraError(package, extra, f"Reading {suffix} files")
    return _child(limits).parse(suffix, data, ocr, limits.parse_seconds)


def _parse(suffix: str, data: bytes, ocr: OcrConfig, on_page: Any) -> Parsed:
    parse = lookup(PARSERS, suffix, "format")
    takes_pictures = suffix not in (*_HERE, ".docx", ".htm", ".html")
    parsed: Parsed = parse(data, ocr, on_page) if takes_pictures else parse(data)
    return parsed


class _Child:
    """The parsing process, as its parent sees it."""

    def __init__(self, memory_bytes: int):
        self.owner = os.getpid()  # a forked worker must not speak into its parent's pipe
        self.memory_bytes = memory_bytes
        command = _COMMAND.format(memory_bytes)
        self._process = subprocess.Popen(
            [sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def is_usable(self, memory_bytes: int) -> bool:
        same = self.owner == os.getpid() and self.memory_bytes == memory_bytes
        return same and self._process.poll() is None

    def stop(self) -> None:
        if self.owner == os.getpid():
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def parse(self, suffix: str, data: bytes, ocr: OcrConfig, seconds: float) -> Parsed:
        try:
            assert self._process.stdin is not None and self._process.stdout is not None
            _send(self._process.stdin, _DONE, (suffix, data, ocr))
            while True:
                kind, value = _receive(self._process.stdout, time.monotonic() + seconds)
                if kind == _DONE:
                    break
        except TimeoutError:
            self.stop()
            raise Unreadable(f"took longer than {seconds:g} s to parse") from None
        except (EOFError, OSError):
            self._process.wait()
            code = self._process.returncode
            self.stop()
            limit = human_bytes(self.memory_bytes)
            raise Unreadable(f"the parser died of it (exit {code}; it may use {limit} of memory)") from None
        except BaseException:  # an interrupt between question and answer
            self.stop()
            raise
        if isinstance(value, BaseException):
            raise value
        return value  # type: ignore[no-any-return]


def _send(pipe: IO[bytes], kind: int, value: Any) -> None:
    body = pickle.dumps(value)
    pipe.write(_HEAD.pack(kind, len(body)))
    pipe.write(body)
    pipe.flush()


def _receive(pipe: IO[bytes], deadline: float) -> tuple[int, Any]:
    kind, length = _HEAD.unpack(_read_exactly(pipe, _HEAD.size, deadline))
    return kind, pickle.loads(_read_exactly(pipe, length, deadline))


def _read_exactly(pipe: IO[bytes], length: int, deadline: float) -> bytes:
    pieces = bytearray()
    while len(pieces) < length:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        piece = os.read(pipe.fileno(), min(1 << 20, length - len(pieces)))
        if not piece:
            raise EOFError
        pieces += piece
    return bytes(pieces)


_kept: list[_Child] = []


def _child(limits: Limits) -> _Child:
    if _kept and not _kept[0].is_usable(limits.memory_bytes):
        _kept.pop().stop()
    if not _kept:
        _kept.append(_Child(limits.memory_bytes))
    return _kept[0]


@atexit.register
def stop_children() -> None:
    """End the parsing process of this process; the next file starts another."""
    while _kept:
        _kept.pop().stop()


def serve(memory_bytes: int) -> None:
    """Answer questions on standard input until it closes; what `_Child` starts."""
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a parser that prints must not speak into the pipe
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while head := questions.read(_HEAD.size):
        _, length = _HEAD.unpack(head)
        suffix, data, ocr = pickle.loads(questions.read(length))
        try:
            answer: Any = _parse(suffix, data, ocr, lambda: _send(answers, _ALIVE, None))
        except (Unreadable, MissingExtraError) as error:
            answer = Unreadable(str(error))
        except MemoryError:
            answer = Unreadable(f"needs more than {human_bytes(memory_bytes)} of memory to parse")
        except Exception as error:
            answer = Unreadable(f"cannot be parsed ({type(error).__name__}: {str(error)[:120]})")
        del data
        _send(answers, _DONE, answer)
