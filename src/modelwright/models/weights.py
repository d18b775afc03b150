"""Load and save models as Hugging Face folders: ``config.json``, ``model.safetensors``, ``generation_config.json``.

Which tensor goes where is told by each model class (``published_names``); the files are the business of
`modelwright.models.tensor_file`. Weights are mapped into memory, not copied, when they are kept as stored. Loading
checks every name and shape before it returns. Saving writes each file to a temporary name first and ``config.json``
last; other files in the folder (the tokenizer, a manifest) stay. Models kept in one file of another format are left to
the readers in `modelwright.models.READERS`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.errors import CheckpointError, DataError
from modelwright.base.files import read_json, write_json
from modelwright.base.registry import lookup
from modelwright.models import FAMILIES, READERS
from modelwright.models.assemble import CONFIG, assemble
from modelwright.models.layout import from_published as from_published
from modelwright.models.layout import pack
from modelwright.models.layout import to_published as to_published
from modelwright.models.pickled import is_pickled
from modelwright.models.quantized_files import reader_of
from modelwright.models.tensor_file import folder_names, read_folder, write_folder

GENERATION = "generation_config.json"
MAX_SHARD_BYTES = 5_000_000_000
ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    task: str | None = None,
    num_labels: int | None = None,
) -> nn.Module:
    """Load a model from its folder or file, in evaluation mode.

    Args:
        path: Folder with ``config.json`` and weights, or a file of one of the kinds in `modelwright.models.READERS`:
            GGUF, or a llama2.c checkpoint.
        dtype: Of the floating-point weights; None: as stored.
        device: Where the weights go; None: the CPU; "meta": nowhere, for names, shapes and dtypes alone.
        task: Of an encoder: encoder, masked_lm, sequence_classification, token_classification or question_answering;
            None: the one the folder was made for. What the file lacks of its head begins anew, seeded with 0; the
            log, ``model.fresh_tensors`` and ``model.dropped_tensors`` name the tensors.
        num_labels: With a task: how many labels the head tells apart; None: those of the config.

    Raises:
        CheckpointError: A file is missing, damaged or of an unknown kind; pickled weights hold more than tensors; the
            architecture is unknown; a tensor is missing, not expected, or of another shape. The message names it.
    """
    folder, place = Path(path), torch.device(device or "cpu")
    if folder.is_file():
        if task is not None or num_labels is not None:
            raise CheckpointError(f"{folder} is a file; another task is asked of a folder. Convert it with mw convert.")
        return _find_reader(folder)(folder, dtype=dtype, device=device)
    is_kept = dtype is None and place.type == "cpu"
    tensors: Iterable[tuple[str, Tensor]] = ((name, one) for _, name, one in read_folder(folder, is_kept=is_kept))
    values = read_config(folder)
    quantized = reader_of(folder, values)
    if quantized is not None:
        values = quantized.config_values(values, folder_names(folder))
        tensors = quantized.turn(tensors)
    model = assemble(folder, values, tensors, dtype=dtype, device=place, task=task, num_labels=num_labels)
    generation = folder / GENERATION
    if generation.is_file():
        try:
            model.generation_config = read_json(generation)  # type: ignore[assignment]
        except DataError as error:
            raise CheckpointError(str(error)) from error
    return model


def save_model(model: nn.Module, directory: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Save a model so that `load_model`, and ``from_pretrained`` of transformers, read it unchanged.

    Args:
        model: A model of one of the architectures here, compiled or not, on any device.
        directory: Folder to write into; it is made when it does not exist.
        max_shard_bytes: Weights beyond this go into several files with an index.

    Raises:
        CheckpointError: A parameter has no published name (merge adapters first) or no storage, or a tie is broken.
        DeviceError: The disk is full; no file is left half-written.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    folder = Path(directory)
    if not hasattr(model, "published_names"):
        raise CheckpointError(
            f"A {type(model).__name__} cannot be saved: it has no published_names. Known: {', '.join(FAMILIES)}."
        )
    tensors = pack(model, model.state_dict())
    config: dict[str, Any] = dict(model.config.to_hf())  # type: ignore[operator, union-attr]
    if hasattr(model, "architecture"):  # an encoder with a head: one config, several architectures
        config["architectures"] = [model.architecture]
    dtypes = [t.dtype for t in tensors.values() if t.dtype.is_floating_point]
    config["dtype"] = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")
    quantization = getattr(model, "quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(folder, tensors, max_shard_bytes)
    if "eos_token_id" in config and not hasattr(model, "is_encoder"):  # a model that writes text
        ids = {name: config[name] for name in ID_FIELDS if config[name] is not None}
        write_json(folder / GENERATION, {**ids, **getattr(model, "generation_config", {})})
    write_json(folder / CONFIG, config)


def _find_reader(file: Path) -> Any:
    """Return the function that reads a model kept in one file.

    Raises:
        CheckpointError: The file is of another kind.
    """
    if file.suffix not in READERS or is_pickled(file):
        what = "holds pickled weights" if is_pickled(file) else "is no file that holds a whole model"
        raise CheckpointError(
            f"{file} {what}; expected a file that ends with {' or '.join(READERS)} (GGUF, llama2.c), or a model's "
            f"folder with {CONFIG}. Give the folder."
        )
    return lookup(READERS, file.suffix, "the kind of file")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a model folder's ``config.json``.

    Raises:
        CheckpointError: There is no such folder or file, or it is not a JSON object.
    """
    if not folder.is_dir():
        hint = f"{folder} is a file" if folder.exists() else f"The folder {folder} does not exist"
        raise CheckpointError(f"{hint}; expected a model's folder with {CONFIG} and safetensors. Check the path.")
    try:
        values = read_json(folder / CONFIG)
    except (DataError, OSError) as error:
        raise CheckpointError(f"{folder} is not a readable model folder: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{folder / CONFIG} holds a {type(values).__name__}; expected a JSON object.")
    return values
