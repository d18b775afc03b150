"""The texts of JSON lines, one line in memory at a time; a line that cannot be used is refused or set aside."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from modelwright.base.errors import DataError

MAX_LINE_BYTES = 64 << 20
SetAside = Callable[[str, str], None]  # of the place ("notes.jsonl, line 7") and the reason


def text_lines(path: Path, set_aside: SetAside | None = None) -> Iterator[str]:
    """Yield the ``text`` of every line.

    Args:
        path: JSON lines in UTF-8.
        set_aside: Gets the lines that cannot be used, and the rest goes on; None: the first one is an error.

    Raises:
        DataError: The file cannot be opened, or (without ``set_aside``) a line cannot be used; it names the line.
    """
    try:
        handle = open(path, "rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Give a file of JSON lines.") from error
    with handle:
        number = 0
        while line := handle.readline(MAX_LINE_BYTES + 1):
            number += 1
            if not line.strip():
                continue
            try:
                text = _text_of(line)
            except ValueError as error:
                if set_aside is None:
                    raise DataError(f"{path}, line {number}: {error}. Mend or remove the line.") from error
                set_aside(f"{path}, line {number}", str(error))
                _skip_line(handle, line)
            else:
                yield text


def _text_of(line: bytes) -> str:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"more than {MAX_LINE_BYTES:,} bytes in one line")
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'expected an object with a "text", found {line[:60].decode(errors="replace").strip()!r}')
    return text


def _skip_line(handle: BinaryIO, line: bytes) -> None:
    """Read on to the end of a line of which more is left."""
    while line and not line.endswith(b"\n"):
        line = handle.readline(MAX_LINE_BYTES)
