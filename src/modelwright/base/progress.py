"""Progress that a person can watch: one bar a step on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

console = Console(highlight=False)
if not console.is_terminal:
    console.width = 240  # piped output is read by programs too: paths and sentences stay on one line


class Bar:
    """One running progress bar; `advance` it, or `describe` what it is doing now."""

    def __init__(self, progress: Progress | None, task: int | None):
        self._progress = progress
        self._task = task

    def advance(self, amount: float = 1) -> None:
        """Move forward by ``amount`` units."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, amount)  # type: ignore[arg-type]

    def describe(self, note: str) -> None:
        """Show a short note behind the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, note=note)  # type: ignore[arg-type]

    def total(self, total: float) -> None:
        """Set the number of units once it is known."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=total)  # type: ignore[arg-type]


@contextlib.contextmanager
def bar(name: str, total: float | None = None) -> Iterator[Bar]:
    """Show a progress bar called ``name`` while the block runs; silent where the output is no terminal.

    The bar disappears when the block ends, so that the caller prints one line of what was made. Inside another
    bar no second one is drawn.
    """
    if not console.is_terminal or _is_showing[0]:
        yield Bar(None, None)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    _is_showing[0] = True
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            yield Bar(progress, progress.add_task(name, total=total, note=""))
    finally:
        _is_showing[0] = False


_is_showing = [False]


def track(items: Iterable[T], name: str, total: float | None = None) -> Iterator[T]:
    """Yield the items while a bar counts them."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with bar(name, total) as shown:
        for item in items:
            yield item
            shown.advance()


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start


def human_bytes(count: float) -> str:
    """Return a size for people.

    >>> human_bytes(3_400_000)
    '3.4 MB'
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def human_count(count: float) -> str:
    """Return a number for people.

    >>> human_count(4_200_000)
    '4.2M'
    """
    for unit in ("", "k", "M", "G", "T"):
        if abs(count) < 1000 or unit == "T":
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    raise AssertionError
