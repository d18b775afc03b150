"""Save and load low-rank adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

A tensor is called ``base_model.model.`` + the layer's published name + ``.lora_A.weight`` or ``.lora_B.weight``, so the
folder loads with ``peft.PeftModel.from_pretrained`` over the same base model in transformers, and theirs load here.
Layers may differ in rank and alpha (``rank_pattern``, ``alpha_pattern``).
Source: https://huggingface.co/docs/peft/developer_guides/checkpoint. Not done: DoRA, trained biases, whole modules.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.base.files import write_json
from modelwright.models.adapter_file import (
    CONFIG,
    PARTS,
    PREFIX,
    WEIGHTS,
    adapter_size,
    check_parts,
    published_layer,
    read_adapter_config,
    read_adapter_parts,
)
from modelwright.models.tensor_file import write_tensors
from modelwright.nn.linear import linears, replace_module, shared_parameters
from modelwright.nn.lora import LoraLinear, lora_layers


def save_adapter(model: nn.Module, folder: str | Path, *, base_model: str | None = None) -> None:
    """Write the model's adapters into ``folder``; other files there stay.

    Args:
        base_model: Path or hub id of the model that the adapters belong to, for whoever loads them.

    Raises:
        ConfigError: The model has no adapters.
    """
    model = getattr(model, "_orig_mod", model)
    layers = {published_layer(model, name): layer for name, layer in lora_layers(model).items()}
    if not layers:
        raise ConfigError("The model has no adapters to save. Add them with add_lora before training.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for theirs, ours in PARTS.items():
            tensors[f"{PREFIX}{name}.{theirs}.weight"] = getattr(layer, ours).detach()
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, _describe(model, layers, base_model))


def _describe(model: nn.Module, layers: Mapping[str, LoraLinear], base_model: str | None) -> dict[str, Any]:
    ranks = Counter(layer.rank for layer in layers.values())
    alphas = Counter(layer.alpha for layer in layers.values())
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    first = next(iter(layers.values()))
    if any(layer.use_rslora != first.use_rslora for layer in layers.values()):
        raise ConfigError("Some adapters use rank-stabilised scaling and some do not; PEFT's format has one choice.")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "lm_head") else None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": first.dropout.p,
        "use_rslora": first.use_rslora,
        "rank_pattern": {re.escape(n): layer.rank for n, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {re.escape(n): _whole(layer.alpha) for n, layer in layers.items() if layer.alpha != alpha},
        "target_modules": _name_targets(model, set(layers)),
        "bias": "none",
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _name_targets(model: nn.Module, adapted: set[str]) -> list[str]:
    """Name layers by their last part where all layers of that name are adapted, else in full."""
    by_end: dict[str, set[str]] = defaultdict(set)
    for name, _ in linears(model):
        published = published_layer(model, name)
        by_end[published.rsplit(".", 1)[-1]].add(published)
    targets: set[str] = set()
    for end, names in by_end.items():
        targets |= {end} if names <= adapted else names & adapted
    return sorted(targets)


def load_adapter(model: nn.Module, folder: str | Path) -> list[str]:
    """Put the adapters of ``folder`` beside the model's layers; freeze everything else; return the layers' names.

    Raises:
        CheckpointError: A file is missing or damaged, the adapter computes something that is not done here, or a
            tensor does not fit this model; the message names it. The model is then as it was.
        ConfigError: The model already has adapters.
    """
    if lora_layers(model):
        raise ConfigError("The model already has adapters. Merge them with merge_lora before loading others.")
    folder = Path(folder)
    config = read_adapter_config(folder)
    parts = read_adapter_parts(model, folder)
    found, tied = dict(linears(model)), shared_parameters(model)
    made: dict[str, LoraLinear] = {}
    for name, tensors in parts.items():
        base = found[name]
        if any(id(parameter) in tied for parameter in base.parameters()):
            raise CheckpointError(f"{folder}: the adapter changes {name}, whose weight is tied to the embedding here.")
        made[name] = _make_layer(base, published_layer(model, name), config, tensors, folder)
    model.requires_grad_(False)
    for name, layer in made.items():
        replace_module(model, name, layer)
    return list(made)


def _make_layer(
    base: nn.Module, published: str, config: Mapping[str, Any], tensors: dict[str, Tensor], folder: Path
) -> LoraLinear:
    rank, alpha = adapter_size(config, published, folder)
    check_parts(tensors, (rank, base.in_features, base.out_features), published, folder)  # type: ignore[arg-type]
    options = {"use_rslora": bool(config.get("use_rslora"))}
    layer = LoraLinear(base, rank, alpha, float(config.get("lora_dropout") or 0.0), **options)
    with torch.no_grad():
        for part, tensor in tensors.items():
            getattr(layer, part).copy_(tensor)
    return layer
