"""The default corpus: the reference documentation that the running Python interpreter carries.

Every machine that can run this package has it, so the whole life of a model can be shown without a network. Modules
are imported and read in a process of their own (`modelwright.data.interpreter_pages`), so that nothing they do on
import touches the user's process; a module that crashes or hangs that process is skipped and the rest goes on.
"""

import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

from modelwright.base.errors import DataError
from modelwright.base.files import atomic_folder
from modelwright.base.logs import get_logger
from modelwright.base.progress import Bar, bar

MODULE_SECONDS = 20.0  # longest that one import may take
_PROGRAM = Path(__file__).with_name("interpreter_pages.py")


def write_reference(folder: Path) -> int:
    """Write one Markdown document per standard-library module and per topic of ``help()``; return how many.

    The same interpreter gives the same bytes every time. Takes a few seconds. A folder that already holds such
    pages is replaced as a whole; any other folder with files in it is refused.

    Raises:
        DataError: The folder holds other files, or the interpreter gave no documentation at all.
    """
    folder = Path(folder).absolute()  # the worker stands in another folder
    _check_replaceable(folder)
    with atomic_folder(folder) as work:
        names = _run("--list").split()
        with bar("reference", len(names)) as shown:
            while names:
                names = _write_pages(names, work, shown)
        _run("--topics", str(work))
        count = len(list(work.glob("*.md")))
        if not count:
            raise DataError(
                f"No standard-library module of {sys.executable} could be documented; expected some hundred. "
                "Give a folder of documents instead."
            )
    return count


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; expected a new folder for the reference pages. Name another place.")
    others = [entry.name for entry in folder.iterdir() if entry.suffix != ".md" or not entry.is_file()]
    is_reference = (folder / "sys.md").is_file() and (folder / "builtins.md").is_file()
    if others or (any(folder.iterdir()) and not is_reference):
        raise DataError(
            f"{folder} already holds other files; the reference pages replace a folder as a whole. Name a new folder."
        )


def _command(*arguments: str) -> list[str]:
    # -S: no site-packages, no start-up hooks; -s -P: nothing from the user's folders can stand in for a module.
    return [sys.executable, "-S", "-s", "-P", str(_PROGRAM), *arguments]


def _environment() -> dict[str, str]:
    # A fixed hash seed keeps sets in default values in one order; COLUMNS and PYTHON* settings change what is shown.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k not in ("COLUMNS", "LINES")}
    return {**kept, "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}


def _run(*arguments: str) -> str:
    done = subprocess.run(
        _command(*arguments), env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        raise DataError(f"{sys.executable} could not describe itself: {done.stderr.strip()[-300:]}")
    return done.stdout


def _write_pages(names: list[str], work: Path, shown: Bar) -> list[str]:
    """Run one worker over the modules; return those left to do after the one it crashed or hung on."""
    worker = subprocess.Popen(
        _command(str(work)),
        env=_environment(),
        cwd=work,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert worker.stdin is not None
    try:
        worker.stdin.write("\n".join(names))
        worker.stdin.close()
        begun = _follow(worker, shown)
    finally:
        worker.kill()
        worker.wait()
        assert worker.stdout is not None
        worker.stdout.close()
    if begun is None:
        return []
    if begun != names[-1]:
        get_logger(__name__).warning("Module %s stopped the documentation process; it is left out.", begun)
    return names[names.index(begun) + 1 :]


def _follow(worker: "subprocess.Popen[str]", shown: Bar) -> str | None:
    """Return the module in work when the worker fell silent, or None when it ended by itself."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    begun = None
    while True:
        try:
            line = lines.get(timeout=MODULE_SECONDS)
        except queue.Empty:
            return begun
        if not line:
            return None if worker.wait(timeout=5) == 0 else begun
        if line.startswith("> "):
            begun = line[2:].strip()
            shown.advance()
            shown.describe(begun)
