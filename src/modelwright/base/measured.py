"""What is written beside a measurement so that it can be repeated: machine, versions, commit, command."""

import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from modelwright.base.device import describe_machine
from modelwright.base.env import data_folder
from modelwright.base.files import write_json


def circumstances(packages: Sequence[str] = ("torch",)) -> dict[str, Any]:
    """Return under what a measurement is made.

    Args:
        packages: Whose versions matter; one that is not installed is left out.
    """
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "machine": asdict(describe_machine()),
        "versions": versions,
        "commit": _commit(),
        "command": " ".join(["python", *_relative(sys.argv)]),
    }


def write_result(path: Path, figures: Mapping[str, Any], packages: Sequence[str] = ("torch",)) -> None:
    """Write figures with their `circumstances` as one JSON file."""
    write_json(path, {**circumstances(packages), **figures})


def _commit() -> str | None:
    """Return the commit of the code that runs, marked when files differ from it; None outside of a repository."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "."], cwd=here.parent, capture_output=True, text=True)
    except OSError:
        return None
    if found.returncode:
        return None
    return found.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def _relative(arguments: Sequence[str]) -> list[str]:
    """Return a command's words as another machine could say them.

    Paths below the working directory are made relative to it, those in the data folder begin with its variable, and of
    any other absolute path the last name is kept.
    """
    root, data = str(Path.cwd()) + "/", data_folder()
    words = []
    for word in arguments:
        word = word.replace(root, "")
        if data is not None:
            word = word.replace(str(data), "$MODELWRIGHT_DATA")
        name, sign, value = word.rpartition("=")
        words.append(name + sign + (Path(value).name if value.startswith("/") else value))
    return words
