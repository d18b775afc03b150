"""Files are the old version or the new one, never half; paths stay inside."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelwright.base.errors import DataError, DeviceError
from modelwright.base.files import (
    atomic_file,
    atomic_folder,
    hash_bytes,
    hash_file,
    hash_folder,
    inside,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the operating system refuse every fsync, as a full disk does at the latest."""

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


def test_text_is_written_with_unix_line_ends_and_readable_by_others(tmp_path: Path):
    with atomic_file(tmp_path / "deep" / "a.txt") as handle:
        handle.write("ä\n")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == b"\xc3\xa4\n"
    assert (tmp_path / "deep" / "a.txt").stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a") as handle:
        handle.write("new")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.json").write_text("1")
    fill_disk(monkeypatch)
    with pytest.raises(DeviceError, match=r"disk is full while writing .*a\.json.*Free some space"):
        write_json(tmp_path / "a.json", 2)
    assert read_json(tmp_path / "a.json") == 1
    assert names(tmp_path) == ["a.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_device_that_is_really_full_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.fdopen
    monkeypatch.setattr(
        os,
        "fdopen",
        lambda fd, *args, **kwargs: (os.close(fd), real(os.open("/dev/full", os.O_WRONLY), *args, **kwargs))[1],
    )
    with pytest.raises(DeviceError, match="disk is full"):
        write_jsonl(tmp_path / "rows.jsonl", ({"n": n} for n in range(100_000)))
    assert names(tmp_path) == []


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with atomic_folder(tmp_path / "f") as work:
        (work / "a").write_text("old")
    fill_disk(monkeypatch)
    with pytest.raises(DeviceError, match="disk is full"), atomic_folder(tmp_path / "f") as work:
        (work / "a").write_text("new")
    assert (tmp_path / "f" / "a").read_text() == "old"
    assert names(tmp_path) == ["f"]


def test_a_folder_is_replaced_whole(tmp_path: Path):
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "f") as work:
            (work / content).write_text(content)
    assert names(tmp_path / "f") == ["two"]
    assert names(tmp_path) == ["f"]


KILLED_WHILE_WRITING = """
import sys, time
from pathlib import Path
from modelwright.base.files import atomic_file, atomic_folder
target = Path(sys.argv[1])
if sys.argv[2] == "file":
    with atomic_file(target) as handle:
        handle.write("half"); handle.flush()
        print("writing", flush=True); time.sleep(60)
else:
    with atomic_folder(target) as work:
        (work / "a").write_text("half")
        print("writing", flush=True); time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_writer_killed_in_the_middle_leaves_the_old_version(tmp_path: Path, kind: str):
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("old")
    else:
        with atomic_folder(target) as work:
            (work / "a").write_text("old")
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED_WHILE_WRITING, str(target), kind], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait(timeout=10)
    writer.stdout.close()
    assert (target if kind == "file" else target / "a").read_text() == "old"
    started = time.monotonic()
    if kind == "file":
        with atomic_file(target) as handle:
            handle.write("new")
        assert target.read_text() == "new"
    else:
        with atomic_folder(target) as work:
            (work / "a").write_text("new")
        assert (target / "a").read_text() == "new"
    assert time.monotonic() - started < 5


def test_json_that_cannot_be_read_again_is_not_written(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    assert names(tmp_path) == []


def test_damaged_json_is_named(tmp_path: Path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(DataError, match=r"none\.json does not exist"):
        read_json(tmp_path / "none.json")


def test_rows_come_back_and_blank_lines_are_passed_over(tmp_path: Path):
    rows = [{"text": "a\nb"}, {"text": "\u2028 ü"}]
    assert write_jsonl(tmp_path / "r.jsonl", rows) == 2
    with open(tmp_path / "r.jsonl", "a") as handle:
        handle.write("\n")
    assert list(read_jsonl(tmp_path / "r.jsonl")) == rows


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 2: not valid JSON"), ("[1]", "line 2: expected a JSON object")]
)
def test_a_damaged_row_is_named_by_file_and_line(tmp_path: Path, line: str, message: str):
    (tmp_path / "r.jsonl").write_text(json.dumps({"a": 1}) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        list(read_jsonl(tmp_path / "r.jsonl"))


def test_a_folder_hash_sees_names_and_contents_but_not_the_manifest(tmp_path: Path):
    (tmp_path / "a").write_text("1")
    first = hash_folder(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    assert hash_folder(tmp_path) == first
    (tmp_path / "a").write_text("2")
    changed = hash_folder(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, changed, hash_folder(tmp_path)}) == 3


def test_file_and_byte_hashes_agree(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert hash_file(tmp_path / "a") == hash_bytes(b"x" * 3_000_000)
    # FIPS 180-2, appendix B.1
    assert hash_bytes(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_paths_inside_a_folder_are_returned(tmp_path: Path):
    (tmp_path / "a").mkdir()
    assert inside(tmp_path, "a/b.txt") == (tmp_path / "a" / "b.txt").resolve()
    assert inside(tmp_path, "a/../c") == (tmp_path / "c").resolve()


def test_paths_that_leave_a_folder_are_refused(tmp_path: Path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "root-secret").mkdir()
    (root / "link").symlink_to(tmp_path / "root-secret")
    for name in ("..", "../root-secret", "/etc/passwd", "a/../../x", "link/x", "link"):
        with pytest.raises(DataError, match="points outside"):
            inside(root, name)
