"""Files that are either the old version or the new one, never half of it; JSON lines; hashes; safe paths."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from modelwright.base.errors import DataError, DeviceError


def _raise_if_disk_full(error: OSError, path: Path) -> None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DeviceError(
            f"The disk is full while writing {path}; nothing was replaced. Free some space and run the command again."
        ) from error
    if error.errno == errno.EFBIG:
        raise DeviceError(
            f"{path} grew larger than a file may be here (File too large); nothing was replaced. Raise the limit "
            "(ulimit -f), or write to another file system, and run the command again."
        ) from error


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Write ``path`` through a temporary neighbour that is fsynced and renamed on success, removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    encoding = None if "b" in mode else "utf-8"
    try:
        with os.fdopen(descriptor, mode, encoding=encoding, newline=None if "b" in mode else "\n") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            _raise_if_disk_full(error, path)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces ``path`` on success and vanishes on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    os.chmod(work, 0o755)
    try:
        yield work
        for file in sorted(p for p in work.rglob("*") if p.is_file()):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.replace(path, old / path.name)
            os.replace(work, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(work, path)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError):
            _raise_if_disk_full(error, path)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, indented, atomically. NaN and infinity are refused."""
    with atomic_file(path) as handle:
        json.dump(value, handle, indent=2, ensure_ascii=False, allow_nan=False)
        handle.write("\n")


def read_json(path: Path) -> Any:
    """Read one JSON value; a damaged file is a DataError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON: {error}. It may be damaged; make it again.") from error


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line, atomically, and return how many."""
    count = 0
    with atomic_file(path) as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield one object a line; a malformed line is a DataError with its number."""
    try:
        handle = open(path, encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    with handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not valid JSON ({error}). Mend or remove the line.") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}.")
            yield row


def hash_bytes(data: bytes) -> str:
    """Return the SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


# What tells of the making rather than of the thing: the manifest itself, and reports that hold seconds.
NOT_HASHED = ("manifest.json", "funnel.json", "funnel.html")


def hash_folder(path: Path, leave_out: tuple[str, ...] = NOT_HASHED) -> str:
    """Return one SHA-256 over the relative names and contents of all files below ``path``."""
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(path).rglob("*") if p.is_file() and p.name not in leave_out):
        digest.update(f"{file.relative_to(path).as_posix()}\0{hash_file(file)}\n".encode())
    return digest.hexdigest()


def inside(folder: Path, name: str) -> Path:
    """Return ``folder / name`` after following links, refusing anything that leaves the folder.

    Raises:
        DataError: The name points outside (``..``, an absolute path, a symbolic link out of the tree).
    """
    root = Path(folder).resolve()
    target = (root / name).resolve()
    if target != root and root not in target.parents:
        raise DataError(f"{name!r} points outside {folder}; only files inside that folder are read.")
    return target
