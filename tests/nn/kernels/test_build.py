"""The kernels are compiled once, kept by content, and their absence has a reason."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from modelwright.nn.kernels import build


def test_what_is_compiled_is_kept_and_found_again(library: ctypes.CDLL):
    path = build.compiled()
    before = path.stat().st_mtime_ns
    assert build.compiled() == path and path.stat().st_mtime_ns == before
    assert not list(path.parent.glob("*.part"))
    assert build.ready() is library and build.failure() is None


def test_a_compiler_that_fails_leaves_nothing_behind(
    library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MODELWRIGHT_KERNELS", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("--no-such-flag",))
    with pytest.raises(subprocess.CalledProcessError):
        build.compiled()
    assert list(tmp_path.iterdir()) == []


def test_compilation_can_be_switched_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MODELWRIGHT_COMPILE", "0")
    assert "MODELWRIGHT_COMPILE" in str(build.missing.__wrapped__())


def test_every_source_is_part_of_the_name():
    here = Path(build.__file__).parent
    assert {p.name for p in here.iterdir() if p.suffix in (".h", ".cpp")} == set(build.SOURCES)
