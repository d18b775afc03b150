"""Load and save models as Hugging Face folders: ``config.json``, ``model.safetensors``, ``generation_config.json``.

Which tensor goes where is told by each model class (``published_names``); the files are the business of
`modelwright.models.tensor_file`. Weights are mapped into memory, not copied, when they are kept as stored. Loading
checks every name and shape before it returns. Saving writes each file to a temporary name first and ``config.json``
last; other files in the folder (the tokenizer, a manifest) stay. Pickled weights are refused.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modelwright.base.errors import CheckpointError, ConfigError, DataError
from modelwright.base.files import read_json, write_json
from modelwright.base.registry import lookup
from modelwright.models import FAMILIES
from modelwright.models.layout import from_published as from_published
from modelwright.models.layout import is_ignored, pack, tied_names, unpack
from modelwright.models.layout import to_published as to_published
from modelwright.models.tensor_file import read_folder, write_folder
from modelwright.nn import lowbit

CONFIG, GENERATION = "config.json", "generation_config.json"
MAX_SHARD_BYTES = 5_000_000_000
ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_model(
    directory: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> nn.Module:
    """Load a model from its folder, in evaluation mode.

    Args:
        directory: Folder with ``config.json`` and safetensors.
        dtype: Of the floating-point weights; None: as stored.
        device: Where the weights go; None: the CPU.

    Raises:
        CheckpointError: A file is missing, damaged or not safetensors; the architecture is unknown; a tensor is
            missing, not expected, or of another shape. The message names it.
    """
    folder, place = Path(directory), torch.device(device or "cpu")
    model = _build_empty(folder, _read_config(folder))
    expected = model.state_dict()  # on the meta device: names and shapes
    found: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for file, published, whole in read_folder(folder):
        for name, tensor in _unpack(model, file, published, whole, expected):
            if name is None:
                if not is_ignored(model, published):
                    unexpected.append(published)
                continue
            if name in found:
                raise CheckpointError(f"{file}: {published} gives {name} a second time. Keep one of the two.")
            found[name] = tensor.to(device=place, dtype=dtype if tensor.is_floating_point() else None)
    _check_ties(model, folder, found)
    _leave_out_optional(model, found)
    _check_complete(model, folder, found, unexpected)
    model.load_state_dict(found, strict=False, assign=True)
    return _finish(model, folder, place)


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
    dtypes = [t.dtype for t in tensors.values() if t.dtype.is_floating_point]
    config["dtype"] = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")
    quantization = getattr(model, "quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(folder, tensors, max_shard_bytes)
    if "eos_token_id" in config:  # a model that writes text
        ids = {name: config[name] for name in ID_FIELDS if config[name] is not None}
        write_json(folder / GENERATION, {**ids, **getattr(model, "generation_config", {})})
    write_json(folder / CONFIG, config)


def _unpack(
    model: nn.Module, file: Path, published: str, tensor: Tensor, expected: dict[str, Tensor]
) -> list[tuple[str | None, Tensor]]:
    """Name a published tensor, or its parts, and hold their shapes against the config's."""
    try:
        parts = unpack(model, published, tensor, expected)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    for name, part in parts:
        if name in expected and part.shape != expected[name].shape:
            raise CheckpointError(
                f"{file}: tensor {published} has shape {tuple(part.shape)}; {CONFIG} asks for "
                f"{tuple(expected[name].shape)}. The config and the weights belong to different models."
            )
    return [(name if name in expected else None, part) for name, part in parts]


def _read_config(folder: Path) -> dict[str, Any]:
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


class _NoDraws(TorchFunctionMode):
    """Skip the random first values that torch's layers give themselves.

    On the meta device there is nothing to fill, and the first draw there imports a symbolic algebra system: a second
    and 90 MB for each process that loads a model.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = kwargs or {}
        if func in (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_):
            return args[0] if args else values["tensor"]
        return func(*args, **values)


def _build_empty(folder: Path, values: dict[str, Any]) -> nn.Module:
    """Build the model that a config describes on the meta device: names and shapes, no storage."""
    try:
        model_class = _find_class(values)
        with torch.device("meta"), _NoDraws():
            model: nn.Module = model_class(model_class.config_class.from_hf(values))
            if values.get("quantization_config") is not None:
                _make_low_bit(model, values["quantization_config"])
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    return model


def _find_class(values: dict[str, Any]) -> Any:
    """Return the class for a config's model_type and architecture.

    Raises:
        ConfigError: Either is not known; the message lists what is.
    """
    family, names = values.get("model_type"), values.get("architectures") or []
    if family is None:  # old exports name the architecture alone
        family = next((f for f in FAMILIES if names and names[0] in lookup(FAMILIES, f, "model_type")), None)
    if family not in FAMILIES:
        raise ConfigError(
            f"model_type is {family!r} and the architecture {names[0] if names else None!r}; known families: "
            f"{', '.join(sorted(FAMILIES))}. Use a model of one of these."
        )
    classes = lookup(FAMILIES, family, "model_type")
    name = names[0] if names else next(iter(classes))
    if name not in classes:
        raise ConfigError(
            f"the architecture is {name!r}; of the family {family!r} these are known: {', '.join(sorted(classes))}. "
            "Use a model of one of these."
        )
    return classes[name]


def _make_low_bit(model: nn.Module, quantization: dict[str, Any]) -> None:
    """Put low-bit layers where the config says the weights are quantized; it names layers by published names."""
    ignored = [_translate_layer(model, name) for name in quantization.get("ignore") or []]
    lowbit.swap_linears(model, {**quantization, "ignore": ignored})
    model.quantization_config = quantization  # type: ignore[assignment]


def _translate_layer(model: nn.Module, published: str) -> str:
    ours = from_published(model, f"{published}.weight")
    return published if ours is None else ours.removesuffix(".weight")


def _check_ties(model: nn.Module, folder: Path, found: dict[str, Tensor]) -> None:
    """Let a tied tensor stand in the file under one name, the other, or both if they are equal."""
    for second, first in tied_names(model).items():
        if second not in found:
            continue
        if first in found and not torch.equal(found[first], found[second]):
            raise CheckpointError(
                f"{folder}: {CONFIG} ties {to_published(model, second)} to {to_published(model, first)}, but the two "
                "tensors in the file differ. Set tie_word_embeddings to false, or drop one of them."
            )
        found.setdefault(first, found[second])
        del found[second]


def _leave_out_optional(model: nn.Module, found: dict[str, Tensor]) -> None:
    for module in getattr(model, "optional_modules", ()):
        if not any(name.startswith(f"{module}.") for name in found):
            setattr(model, module, None)


def _check_complete(model: nn.Module, folder: Path, found: dict[str, Tensor], unexpected: list[str]) -> None:
    tied = tied_names(model)
    missing = [to_published(model, n) for n in model.state_dict() if n not in found and n not in tied]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors that {type(model).__name__} needs: {_some(missing)}. "
            "Fetch or save the whole model again."
        )
    if unexpected:
        raise CheckpointError(
            f"{folder} holds {len(unexpected)} tensors that {type(model).__name__} has no place for: "
            f"{_some(unexpected)}. The config and the weights belong to different models."
        )


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names, key=_natural)[:limit]) + more


def _natural(name: str) -> list[Any]:
    """Sort layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]


def _finish(model: nn.Module, folder: Path, device: torch.device) -> nn.Module:
    """Fill the tables that no file holds, tie what is tied, and check that nothing was forgotten."""
    for module in model.modules():
        reset_buffers = getattr(module, "reset_buffers", None)
        if reset_buffers is not None:
            reset_buffers(device)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # type: ignore[operator]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert not tensor.is_meta, f"{name} was not filled"
    generation = folder / GENERATION
    if generation.is_file():
        try:
            model.generation_config = read_json(generation)  # type: ignore[assignment]
        except DataError as error:
            raise CheckpointError(str(error)) from error
    return model.eval()
