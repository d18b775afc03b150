"""Find a published model: a folder on this machine, or a hub id that is fetched when there is a network.

Only safetensors, JSON, templates and tokenizer texts are fetched, and GGUF where it is asked for by name; pickled
weights never are, because unpickling runs whatever code they carry. `pull` makes an artifact of what was fetched: its
manifest holds the commit it came from and the hash of every file.
"""

import fnmatch
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from modelwright.base.artifact import MANIFEST, new_artifact, read_manifest
from modelwright.base.errors import CheckpointError, ConfigError, DataError
from modelwright.base.files import hash_file
from modelwright.base.progress import console, track

WANTED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
SAFE_SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja", ".txt", ".model", ".md")
WEIGHT_SUFFIXES = (".safetensors", ".gguf")


def fetch(name_or_dir: str | Path, *, revision: str | None = None) -> Path:
    """Return the folder of a model: ``name_or_dir`` itself if it is one or a GGUF file, else the hub's copy of that id.

    Args:
        name_or_dir: A folder, or a hub id such as ``sentence-transformers/all-MiniLM-L6-v2``.
        revision: Branch, tag or commit on the hub; None: the default branch.

    Raises:
        CheckpointError: Neither a folder here nor an id that the hub could be asked for.
    """
    folder = Path(name_or_dir).expanduser()
    if folder.is_dir() or (folder.is_file() and folder.suffix == ".gguf"):
        return folder
    name = str(name_or_dir)
    if folder.exists():
        raise CheckpointError(f"{name} is a file; a model is a folder with config.json and *.safetensors. Give that.")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"There is no folder {name}, and it is not a hub id of the form owner/name. Check the path."
        )
    return _download(name, revision, WANTED_FILES)


def pull(hub_id: str, to: Path, *, revision: str | None = None, only: Sequence[str] = ()) -> dict[str, Any]:
    """Fetch a model and make an artifact of it at ``to``; return the figures of its manifest.

    What a broken transfer left in the hub's cache is used again. Weights are linked from there where the file system
    can, so they take no room twice.

    Args:
        hub_id: Such as ``HuggingFaceTB/SmolLM2-135M``.
        to: Folder to make; an earlier pull of the same model is replaced, anything else is left alone.
        revision: Branch, tag or commit; None: the default branch.
        only: Patterns of weight files to fetch, such as ``*Q8_0.gguf``; none: all safetensors.

    Raises:
        CheckpointError: The hub cannot be reached, or has no such model, revision or file.
        ConfigError: ``to`` holds something else, or a pattern asks for files that are not fetched.
    """
    _check_place(to, hub_id)
    for pattern in only:
        if not pattern.endswith(SAFE_SUFFIXES):
            raise ConfigError(
                f"--only is {pattern!r}; it must end with one of {', '.join(SAFE_SUFFIXES)}. Pickled weights and code "
                "are not fetched."
            )
    patterns = (*only, *(p for p in WANTED_FILES if p != "*.safetensors")) if only else WANTED_FILES
    snapshot = _download(hub_id, revision, patterns)
    files = sorted(f for f in snapshot.rglob("*") if f.is_file() and _is_wanted(f.relative_to(snapshot), patterns))
    if not any(file.suffix in WEIGHT_SUFFIXES for file in files):
        wanted = " or ".join(only) or "*.safetensors"
        raise CheckpointError(
            f"The hub's {hub_id!r} has no file {wanted} at {revision or 'its default branch'}. It may hold pickled "
            "weights, which are not fetched, or GGUF, which is fetched by --only '*Q8_0.gguf' or the like."
        )
    settings = {"hub_id": hub_id, "revision": snapshot.name, "asked_revision": revision, "only": list(only)}
    with new_artifact(to, "model", settings=settings) as (work, measured):
        measured["files"] = {}
        for file in track(files, "hash"):
            name = file.relative_to(snapshot).as_posix()
            _place(file.resolve(), work / name)
            measured["files"][name] = {"size_bytes": file.stat().st_size, "sha256": hash_file(work / name)}
        measured["size_bytes"] = sum(entry["size_bytes"] for entry in measured["files"].values())
        return {**settings, **measured}


def _check_place(to: Path, hub_id: str) -> None:
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    try:
        earlier = read_manifest(to).settings.get("hub_id") if to.is_dir() else None
    except DataError:
        earlier = None
    if earlier != hub_id:
        raise ConfigError(f"{to} is there already and is no earlier pull of {hub_id}. Give another folder with --to.")


def _is_wanted(name: Path, patterns: Sequence[str]) -> bool:
    return name.name != MANIFEST and any(fnmatch.fnmatch(name.as_posix(), pattern) for pattern in patterns)


def _place(source: Path, target: Path) -> None:
    """Link a file of weights, which nobody edits in place; copy any other, or where links do not reach."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix in WEIGHT_SUFFIXES:
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another file system, or one without links
    shutil.copyfile(source, target)


def _download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Return the hub's copy of a model in the cache of this machine."""
    (enable_progress_bars if console.is_terminal else disable_progress_bars)()
    where = f"{name!r}" if revision is None else f"{name!r} at {revision!r}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError:
        raise CheckpointError(
            f"The model {where} is gated. Accept its terms on the hub's page, then log in with `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(
            f"The hub's {name!r} has no revision {revision!r}. Give a branch, tag or commit."
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"The hub has no public model {name!r}, and there is no such folder here. Check the spelling, "
            "or log in with `hf auth login` if the model is gated."
        ) from None
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a folder here nor a well-formed hub id: {error}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"The model {where} is not on this machine and the hub could not be reached ({type(error).__name__}). "
            "Give the path of a folder with config.json and *.safetensors, or try again with a network."
        ) from error
