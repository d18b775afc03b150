"""Find a published model: a folder on this machine, or a hub id that is fetched when there is a network.

Only safetensors, JSON, templates and tokenizer texts are fetched; pickled weights never are, because unpickling runs
whatever code they carry.
"""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from modelwright.base.errors import CheckpointError

WANTED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


def fetch(name_or_dir: str | Path, *, revision: str | None = None) -> Path:
    """Return the folder of a model: ``name_or_dir`` itself if it is a folder, else the hub's copy of that id.

    Args:
        name_or_dir: A folder, or a hub id such as ``sentence-transformers/all-MiniLM-L6-v2``.
        revision: Branch, tag or commit on the hub; None: the default branch.

    Raises:
        CheckpointError: Neither a folder here nor an id that the hub could be asked for.
    """
    folder = Path(name_or_dir).expanduser()
    if folder.is_dir():
        return folder
    name = str(name_or_dir)
    if folder.exists():
        raise CheckpointError(f"{name} is a file; a model is a folder with config.json and *.safetensors. Give that.")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"There is no folder {name}, and it is not a hub id of the form owner/name. Check the path."
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(WANTED_FILES)))
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"The hub has no public model {name!r}, and there is no such folder here. Check the spelling, "
            "or log in with `hf auth login` if the model is gated."
        ) from None
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a folder here nor a well-formed hub id: {error}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"The model {name!r} is not on this machine and the hub could not be reached ({type(error).__name__}). "
            "Give the path of a folder with config.json and *.safetensors, or try again with a network."
        ) from error
