"""Save and load adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

A tensor is called ``base_model.model.`` + the layer's published name + ``.lora_A.weight`` or ``.lora_B.weight``, so the
folder loads with ``peft.PeftModel.from_pretrained`` over the same base model in transformers, and theirs load here.
Layers may differ in rank and alpha (``rank_pattern``, ``alpha_pattern``). An adapter that PiSSA began is written as a
plain one of twice the rank over the untouched model: s (B A - B0 A0). LoRA and DoRA are here, the other methods in
`modelwright.train.peft_formats`.
Source: https://huggingface.co/docs/peft/developer_guides/checkpoint. Not done: trained biases, whole modules.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.base.files import write_json
from modelwright.base.registry import lookup
from modelwright.models.adapter_file import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    adapter_size,
    check_parts,
    published_layer,
    read_adapter_config,
    read_adapter_parts,
)
from modelwright.models.layout import from_published
from modelwright.models.tensor_file import write_tensors
from modelwright.nn.adalora import AdaLoraLinear
from modelwright.nn.adapters import adapter_layers, has_adapters, remove_adapters
from modelwright.nn.bottleneck import BottleneckLinear
from modelwright.nn.dora import DoraLinear
from modelwright.nn.ia3 import IA3Linear
from modelwright.nn.linear import linears, replace_module, shared_parameters
from modelwright.nn.lora import LoraLinear
from modelwright.nn.lora_embedding import LoraEmbedding
from modelwright.nn.lora_init import init_pissa
from modelwright.nn.virtual_tokens import Prefix
from modelwright.train import PEFT_FORMATS

# First values that were taken out of the base: what is saved says how far the adapter has come from them.
_TAKEN = ("pissa", "qpissa")


def save_adapter(model: nn.Module, folder: str | Path, *, base_model: str | None = None) -> None:
    """Write the model's adapters into ``folder``; other files there stay.

    Args:
        base_model: Path or hub id of the model that the adapters belong to, for whoever loads them.

    Raises:
        ConfigError: The model has no adapters.
    """
    model = getattr(model, "_orig_mod", model)
    kind = _kind_of(model)
    if kind == "LORA":
        layers: dict[str, Any] = {published_layer(model, name): x for name, x in adapter_layers(model).items()}
        tensors = {f"{PREFIX}{n}.{part}": t.contiguous() for n, x in layers.items() for part, t in _tensors(x).items()}
        config = _describe(model, layers, base_model)
    else:
        own, fields = lookup(PEFT_FORMATS[kind], "write", "side")(model, partial(published_layer, model))
        tensors = {n if n == "prompt_embeddings" else PREFIX + n: t.contiguous() for n, t in own.items()}
        task = "CAUSAL_LM" if hasattr(model, "lm_head") else None
        config = {"task_type": task, "base_model_name_or_path": base_model, "inference_mode": True, **fields}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, config)


def _kind_of(model: nn.Module) -> str:
    """Return the ``peft_type`` of a model's adapters."""
    virtual, layers = getattr(model, "virtual", None), list(adapter_layers(model).values())
    if virtual is not None:
        return "PREFIX_TUNING" if isinstance(virtual, Prefix) else "PROMPT_TUNING"
    if not layers:
        raise ConfigError("The model has no adapters to save. Add them with attach_adapter before training.")
    kinds = {AdaLoraLinear: "ADALORA", IA3Linear: "IA3", BottleneckLinear: "BOTTLENECK"}
    found = {kinds.get(type(layer), "LORA") for layer in layers}
    if len(found) > 1:
        raise ConfigError(f"The model has adapters of several methods ({', '.join(sorted(found))}); save one.")
    return found.pop()


def _tensors(layer: Any) -> dict[str, Tensor]:
    """Return the tensors of a layer by their endings."""
    a, b = layer.lora_a.detach(), layer.lora_b.detach()
    if isinstance(layer, LoraEmbedding):
        return {"lora_embedding_A": a, "lora_embedding_B": b}
    if layer.init_name in _TAKEN:
        a, b = torch.cat((a, layer.first_a)), torch.cat((b, -layer.first_b), dim=1)
    extra = {"lora_magnitude_vector": layer.magnitude.detach()} if isinstance(layer, DoraLinear) else {}
    return {"lora_A.weight": a, "lora_B.weight": b, **extra}


def _sizes(layer: Any) -> tuple[int, float]:
    """Return rank and alpha as they are written."""
    if getattr(layer, "init_name", "") not in _TAKEN:
        return layer.rank, layer.alpha
    return 2 * layer.rank, layer.alpha * (math.sqrt(2) if layer.use_rslora else 2)  # the scale stays


def _describe(model: nn.Module, layers: Mapping[str, Any], base_model: str | None) -> dict[str, Any]:
    ranks = Counter(_sizes(layer)[0] for layer in layers.values())
    alphas = Counter(_sizes(layer)[1] for layer in layers.values())
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    first = next((layer for layer in layers.values() if isinstance(layer, LoraLinear)), next(iter(layers.values())))
    if any(layer.use_rslora != first.use_rslora for layer in layers.values()):
        raise ConfigError("Some adapters use rank-stabilised scaling and some do not; PEFT's format has one choice.")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "lm_head") else None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": first.dropout.p if isinstance(first, LoraLinear) else 0.0,
        "use_rslora": first.use_rslora,
        "rank_pattern": {re.escape(n): _sizes(x)[0] for n, x in layers.items() if _sizes(x)[0] != rank},
        "alpha_pattern": {re.escape(n): _whole(_sizes(x)[1]) for n, x in layers.items() if _sizes(x)[1] != alpha},
        "target_modules": _name_targets(model, set(layers)),
        "bias": "none",
        "use_dora": isinstance(first, DoraLinear),
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _name_targets(model: nn.Module, adapted: set[str]) -> list[str]:
    """Name layers by their last part where all layers of that name are adapted, else in full."""
    by_end: dict[str, set[str]] = defaultdict(set)
    embeddings = [name for name, module in model.named_modules() if isinstance(module, LoraEmbedding)]
    for name in (*(name for name, _ in linears(model)), *embeddings):
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
    if has_adapters(model):
        raise ConfigError("The model already has adapters. Merge them with merge_lora before loading others.")
    folder = Path(folder)
    config = read_adapter_config(folder, ("LORA", *PEFT_FORMATS), ("use_dora", "pissa"))
    if config["peft_type"] != "LORA":
        return _load_other(model, folder, config)
    found, tied = dict(linears(model)), shared_parameters(model)
    found = {n: m for n, m in model.named_modules() if n in found or isinstance(m, nn.Embedding)}
    parts = read_adapter_parts(model, folder, found)
    made: dict[str, nn.Module] = {}
    for name, tensors in parts.items():
        base = found[name]
        if not isinstance(base, nn.Embedding) and any(id(parameter) in tied for parameter in base.parameters()):
            raise CheckpointError(f"{folder}: the adapter changes {name}, whose weight is tied to the embedding here.")
        made[name] = _make_layer(base, published_layer(model, name), config, tensors, folder)
    model.requires_grad_(False)
    for name, layer in made.items():
        replace_module(model, name, layer)
    return list(made)


def _load_other(model: nn.Module, folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Load an adapter of another method than LoRA; the model is left as it was when the file does not fit."""

    def ours(published: str) -> str | None:
        name = from_published(model, f"{published}.weight")
        return None if name is None else name.removesuffix(".weight")

    path = folder / WEIGHTS
    try:
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(path).items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; an adapter folder holds {CONFIG} and {WEIGHTS}.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}. Fetch or save it again.") from error
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        return lookup(PEFT_FORMATS[config["peft_type"]], "read", "side")(model, config, tensors, ours)
    except (CheckpointError, ConfigError, KeyError, TypeError) as error:
        remove_adapters(model)
        for parameter in trained:
            parameter.requires_grad_(True)
        lacks = isinstance(error, (KeyError, TypeError))
        raise CheckpointError(f"{folder}: {f'{CONFIG} lacks the field {error}' if lacks else error}") from error


def _make_layer(
    base: nn.Module, published: str, config: Mapping[str, Any], tensors: dict[str, Tensor], folder: Path
) -> nn.Module:
    rank, alpha = adapter_size(config, published, folder)
    is_table = isinstance(base, nn.Embedding)
    num_ins, num_outs = base.weight.shape if is_table else (base.in_features, base.out_features)  # type: ignore[misc,operator,union-attr]
    kept = dict(tensors)
    magnitude = kept.pop("magnitude", None)
    check_parts(kept, (rank, num_ins, num_outs), published, folder)  # type: ignore[arg-type]
    if (magnitude is not None) != (bool(config.get("use_dora")) and not is_table) or (
        magnitude is not None and magnitude.shape != (num_outs,)
    ):
        raise CheckpointError(
            f"{folder / WEIGHTS}: use_dora is {config.get('use_dora')}, which the tensors of {published} do not fit. "
            "Save the adapter again."
        )
    use_rslora = bool(config.get("use_rslora"))
    layer: Any
    if isinstance(base, nn.Embedding):
        layer = LoraEmbedding(base, rank, alpha, use_rslora=use_rslora)
    else:
        kind = LoraLinear if magnitude is None else DoraLinear
        layer = kind(base, rank, alpha, float(config.get("lora_dropout") or 0.0), use_rslora=use_rslora)
        if config.get("init_lora_weights") == "pissa":
            layer.init_name = "pissa"
            init_pissa(layer)
    with torch.no_grad():
        for part, tensor in tensors.items():
            getattr(layer, part).copy_(tensor)
    return layer
