"""Put a model together from a published config and a stream of published tensors, wherever they come from.

A folder, a GGUF and a llama2.c file each give the names and layouts of the published checkpoints, so that one set of
checks (names, shapes, ties, completeness) stands for every format. The model is built on the meta device and its
tensors put in place of the empty ones, so nothing is drawn or copied on the way.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.base.registry import lookup
from modelwright.models import FAMILIES
from modelwright.models.layout import from_published, is_ignored, tied_names, to_published, unpack
from modelwright.models.task import ask_for, begin_head, is_replaceable
from modelwright.nn import lowbit, nf4

CONFIG = "config.json"


def assemble(
    source: Path,
    values: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    task: str | None = None,
    num_labels: int | None = None,
) -> nn.Module:
    """Build the model of a config and fill it, in evaluation mode.

    Args:
        source: The folder or file, for messages.
        values: A published ``config.json``.
        tensors: (published name, tensor), each taken and placed before the next is asked for.
        dtype: Of the floating-point weights; None: as they come.
        device: Where the weights go; None: the CPU; "meta": nowhere, for names, shapes and dtypes alone.
        task: That of `load_model`.
        num_labels: That of `load_model`.

    Raises:
        CheckpointError: The config does not build, or a tensor is missing, not expected, or of another shape.
    """
    place, is_asked = torch.device(device or "cpu"), task is not None or num_labels is not None
    if is_asked:
        try:
            values = ask_for(dict(values), _find_family(dict(values)), task, num_labels)
        except ConfigError as error:
            raise CheckpointError(f"{_config_of(source)}: {error}") from error
    model = build_empty(source, values)
    expected = model.state_dict()  # on the meta device: names and shapes
    found: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for published, whole in tensors:
        for name, tensor in _unpack(model, source, published, whole, expected, is_asked):
            if name is None:
                if not is_ignored(model, published):
                    unexpected.append(published)
                continue
            if name in found:
                raise CheckpointError(f"{source}: {published} gives {name} a second time. Keep one of the two.")
            is_cast = tensor.is_floating_point() and ".weight." not in name  # scales of 4-bit weights stay float32
            found[name] = tensor.to(device=place, dtype=dtype if is_cast else None)
    _check_ties(model, source, found)
    _leave_out_optional(model, found)
    if is_asked:
        unexpected = begin_head(model, found, unexpected, dtype)
    _check_complete(model, source, found, unexpected)
    model.load_state_dict(found, strict=False, assign=True)
    return _finish(model, place)


def _unpack(
    model: nn.Module, file: Path, published: str, tensor: Tensor, expected: dict[str, Tensor], is_asked: bool = False
) -> list[tuple[str | None, Tensor]]:
    """Name a published tensor, or its parts, and hold their shapes against the config's."""
    try:
        parts = unpack(model, published, tensor, expected)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    if is_asked:  # a head for other labels begins anew
        parts = [(n if n and _fits(n, t, expected) or not is_replaceable(n or "") else None, t) for n, t in parts]
    for name, part in parts:
        if name in expected and not _fits(name, part, expected):
            raise CheckpointError(
                f"{file}: tensor {published} has shape {tuple(part.shape)}; the config asks for "
                f"{tuple(expected[name].shape)}. The config and the weights belong to different models."
            )
    return [(name if name in expected else None, part) for name, part in parts]


def _fits(name: str, tensor: Tensor, expected: dict[str, Tensor]) -> bool:
    # The description of a 4-bit weight is a text of its own length.
    return name not in expected or tensor.shape == expected[name].shape or name.endswith(nf4.STATE)


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


def build_empty(source: Path, values: Mapping[str, Any]) -> nn.Module:
    """Build the model that a config describes on the meta device: names and shapes, no storage.

    Raises:
        CheckpointError: The architecture is unknown, or the config asks for what the code does not compute.
    """
    try:
        model_class = find_class(values)
        with torch.device("meta"), _NoDraws():
            model: nn.Module = model_class(model_class.config_class.from_hf(values))
            if values.get("quantization_config") is not None:
                _make_low_bit(model, values["quantization_config"])
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{_config_of(source)}: {error}") from error
    return model


def _config_of(source: Path) -> Path:
    return source / CONFIG if source.is_dir() else source


def _find_family(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table from architectures to classes for a config's model_type.

    Raises:
        ConfigError: It is not known; the message lists what is.
    """
    family, names = values.get("model_type"), values.get("architectures") or []
    if family is None:  # old exports name the architecture alone
        family = next((f for f in FAMILIES if names and names[0] in lookup(FAMILIES, f, "model_type")), None)
    if family not in FAMILIES:
        raise ConfigError(
            f"model_type is {family!r} and the architecture {names[0] if names else None!r}; known families: "
            f"{', '.join(sorted(FAMILIES))}. Use a model of one of these."
        )
    return lookup(FAMILIES, family, "model_type")


def find_class(values: Mapping[str, Any]) -> Any:
    """Return the class for a config's model_type and architecture.

    Raises:
        ConfigError: Either is not known; the message lists what is.
    """
    classes, names = _find_family(values), values.get("architectures") or []
    name = names[0] if names else next(iter(classes))
    if name not in classes:
        raise ConfigError(
            f"the architecture is {name!r}; of the family {values.get('model_type')!r} these are known: "
            f"{', '.join(sorted(classes))}. Use a model of one of these."
        )
    return classes[name]


def _make_low_bit(model: nn.Module, quantization: dict[str, Any]) -> None:
    """Put low-bit layers where the config says the weights are quantized; it names layers by published names."""
    if quantization.get("quant_method") == "bitsandbytes":
        skipped = [_translate_layer(model, name) for name in quantization.get("llm_int8_skip_modules") or ["lm_head"]]
        nf4.swap_for_nf4(model, {**quantization, "llm_int8_skip_modules": skipped})
        model.quantization_config = quantization  # type: ignore[assignment]
        return
    ignored = [_translate_layer(model, name) for name in quantization.get("ignore") or []]
    lowbit.swap_linears(model, {**quantization, "ignore": ignored})
    model.quantization_config = quantization  # type: ignore[assignment]


def _translate_layer(model: nn.Module, published: str) -> str:
    ours = from_published(model, f"{published}.weight")
    return published if ours is None else ours.removesuffix(".weight")


def _check_ties(model: nn.Module, source: Path, found: dict[str, Tensor]) -> None:
    """Let a tied tensor stand in the file under one name, the other, or both if they are equal."""
    for second, first in tied_names(model).items():
        if second not in found:
            continue
        if first in found and not _is_same(found[first], found[second]):
            raise CheckpointError(
                f"{source}: the config ties {to_published(model, second)} to {to_published(model, first)}, but the two "
                "tensors in the file differ. Set tie_word_embeddings to false, or drop one of them."
            )
        found.setdefault(first, found[second])
        del found[second]


def _is_same(first: Tensor, second: Tensor) -> bool:
    return first.is_meta or torch.equal(first, second)


def _leave_out_optional(model: nn.Module, found: dict[str, Tensor]) -> None:
    for module in getattr(model, "optional_modules", ()):
        if not any(name.startswith(f"{module}.") for name in found):
            parent, _, name = module.rpartition(".")
            setattr(model.get_submodule(parent), name, None)


def _check_complete(model: nn.Module, source: Path, found: dict[str, Tensor], unexpected: list[str]) -> None:
    tied = tied_names(model)
    missing = [to_published(model, n) for n in model.state_dict() if n not in found and n not in tied]
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} tensors that {type(model).__name__} needs: {_some(missing)}. "
            "Fetch or save the whole model again."
        )
    if unexpected:
        raise CheckpointError(
            f"{source} holds {len(unexpected)} tensors that {type(model).__name__} has no place for: "
            f"{_some(unexpected)}. The config and the weights belong to different models."
        )


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names, key=_natural)[:limit]) + more


def _natural(name: str) -> list[Any]:
    """Sort layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]


def _finish(model: nn.Module, device: torch.device) -> nn.Module:
    """Fill the tables that no file holds, tie what is tied, and check that nothing was forgotten."""
    for module in model.modules():
        reset_buffers = getattr(module, "reset_buffers", None)
        if reset_buffers is not None:
            reset_buffers(device)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # type: ignore[operator]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.device.type == device.type, f"{name} was not filled"
    return model.eval()
