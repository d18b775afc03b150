"""Artifacts: folders that know what they are and what they were made from.

Every data set, tokenizer, model, adapter, index and report is a folder with a ``manifest.json`` beside files in the
ecosystem's own format. A manifest names its parents by content hash, so `lineage` walks back to the documents.
"""

import contextlib
import datetime
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modelwright.base.errors import CheckpointError, DataError
from modelwright.base.files import atomic_folder, hash_folder, read_json, write_json

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Parent:
    """One thing that an artifact was made from."""

    path: str  # where it stood, relative to the artifact when both share a tree
    kind: str
    hash: str  # content hash at the time of use


@dataclass(frozen=True)
class Manifest:
    """What is known about one artifact."""

    kind: str  # "documents", "dataset", "tokenizer", "model", "adapter", "index", "report"
    hash: str  # SHA-256 over names and contents of the folder's files, this file left out
    settings: Mapping[str, Any] = field(default_factory=dict)  # resolved settings it was made with
    parents: tuple[Parent, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)  # figures found while making it
    seed: int | None = None
    version: str = ""  # of modelwright
    machine: str = ""
    created: str = ""  # UTC, ISO 8601


@contextlib.contextmanager
def new_artifact(
    path: Path,
    kind: str,
    *,
    settings: Mapping[str, Any] | None = None,
    parents: Sequence[Path] = (),
    seed: int | None = None,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a work folder and an empty dict for measured figures; on success seal both into ``path``.

    A killed or failed block leaves whatever stood at ``path`` before.
    """
    path = Path(path)
    measured: dict[str, Any] = {}
    with atomic_folder(path) as work:
        yield work, measured
        known = tuple(_parent_of(parent, path) for parent in parents)
        _write_manifest(work, kind, settings or {}, known, measured, seed)


def _parent_of(parent: Path, child: Path) -> Parent:
    parent = Path(parent)
    manifest = read_manifest(parent)
    return Parent(path=os.path.relpath(parent, child), kind=manifest.kind, hash=manifest.hash)


def _write_manifest(
    folder: Path,
    kind: str,
    settings: Mapping[str, Any],
    parents: tuple[Parent, ...],
    measured: Mapping[str, Any],
    seed: int | None,
) -> None:
    from modelwright import __version__

    manifest = Manifest(
        kind=kind,
        hash=hash_folder(folder),
        settings=dict(settings),
        parents=parents,
        measured=dict(measured),
        seed=seed,
        version=__version__,
        machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    write_json(folder / MANIFEST, asdict(manifest))


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the artifact at ``path``.

    Raises:
        DataError: The folder has no manifest, or it is not one of ours.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise DataError(f"{path} is not an artifact: it has no {MANIFEST}. Expected a folder that mw made.")
    values = read_json(file)
    try:
        parents = tuple(Parent(**parent) for parent in values.pop("parents", ()))
        return Manifest(parents=parents, **values)
    except TypeError as error:
        raise DataError(f"{file} is not a manifest of this version: {error}") from error


def verify(path: Path) -> Manifest:
    """Read the manifest and check that the files still are what was sealed.

    Raises:
        CheckpointError: A file was changed, added or removed since.
    """
    manifest = read_manifest(path)
    found = hash_folder(Path(path))
    if found != manifest.hash:
        raise CheckpointError(
            f"{path} has changed since it was made: content hash {found[:12]}, manifest says {manifest.hash[:12]}. "
            "Make it again, or remove the manifest to use it as a foreign folder."
        )
    return manifest


@dataclass(frozen=True)
class Ancestor:
    """One step of a lineage: an artifact, how deep it lies, and whether it is still what was used."""

    path: Path
    depth: int
    kind: str
    hash: str
    state: str  # "same", "changed" or "missing"
    manifest: Manifest | None


def lineage(path: Path) -> list[Ancestor]:
    """Walk from an artifact back to the documents, depth first; each artifact is listed once for each use."""
    path = Path(path)
    manifest = read_manifest(path)
    found = [Ancestor(path, 0, manifest.kind, manifest.hash, "same", manifest)]
    _walk(path, manifest, 1, found)
    return found


def _walk(path: Path, manifest: Manifest, depth: int, found: list[Ancestor]) -> None:
    for parent in manifest.parents:
        place = (path / parent.path).resolve()
        if not (place / MANIFEST).is_file():
            found.append(Ancestor(place, depth, parent.kind, parent.hash, "missing", None))
            continue
        theirs = read_manifest(place)
        state = "same" if theirs.hash == parent.hash else "changed"
        found.append(Ancestor(place, depth, parent.kind, parent.hash, state, theirs))
        _walk(place, theirs, depth + 1, found)
