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
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from modelwright.base.errors import CheckpointError, ConfigError, DataError
from modelwright.base.files import read_json, write_json
from modelwright.models.tensor_file import write_tensors
from modelwright.models.weights import from_published, to_published
from modelwright.nn.linear import linears, replace_module, shared_parameters
from modelwright.nn.lora import LoraLinear, lora_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {"lora_A": "lora_a", "lora_B": "lora_b"}
# Fields that change what is computed, with the values that mean "off".
_MUST_BE_OFF: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
}


def save_adapter(model: nn.Module, folder: str | Path, *, base_model: str | None = None) -> None:
    """Write the model's adapters into ``folder``; other files there stay.

    Args:
        base_model: Path or hub id of the model that the adapters belong to, for whoever loads them.

    Raises:
        ConfigError: The model has no adapters.
    """
    model = getattr(model, "_orig_mod", model)
    layers = {_published(model, name): layer for name, layer in lora_layers(model).items()}
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


def _published(model: nn.Module, layer_name: str) -> str:
    return to_published(model, f"{layer_name}.weight").removesuffix(".weight")


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
        published = _published(model, name)
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
    config = _read_config(folder)
    parts = _read_parts(model, folder)
    found, tied = dict(linears(model)), shared_parameters(model)
    made: dict[str, LoraLinear] = {}
    for name, tensors in parts.items():
        base = found[name]
        if any(id(parameter) in tied for parameter in base.parameters()):
            raise CheckpointError(f"{folder}: the adapter changes {name}, whose weight is tied to the embedding here.")
        made[name] = _make_layer(base, _published(model, name), config, tensors, folder)
    model.requires_grad_(False)
    for name, layer in made.items():
        replace_module(model, name, layer)
    return list(made)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / CONFIG)
    except (DataError, OSError) as error:
        raise CheckpointError(f"{folder} is not a readable adapter folder: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{folder / CONFIG}: peft_type is {kind!r}; only 'LORA' adapters are loaded here.")
    for name, off in _MUST_BE_OFF.items():
        if config.get(name) not in off:
            raise CheckpointError(
                f"{folder / CONFIG}: {name} is {config[name]!r}, which is not computed here. "
                "Merge the adapter with PEFT and load the merged model."
            )
    return config


def _read_parts(model: nn.Module, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return for each layer, by our name, its tensors ``lora_a`` and ``lora_b``."""
    path = folder / WEIGHTS
    found = dict(linears(model))
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            for key in handle.keys():
                match = re.fullmatch(r"(.+)\.(lora_A|lora_B)\.weight", key.removeprefix(PREFIX))
                if match is None:
                    _check_is_base(model, path, key, handle.get_tensor(key))
                    continue
                name = (from_published(model, f"{match[1]}.weight") or "").removesuffix(".weight")
                if name not in found:
                    raise CheckpointError(
                        f"{path}: {key} belongs to no linear layer of this {type(model).__name__}. "
                        "The adapter was made for another model."
                    )
                parts.setdefault(name, {})[PARTS[match[2]]] = handle.get_tensor(key)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; an adapter folder holds {CONFIG} and {WEIGHTS}.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}. Fetch or save it again.") from error
    if not parts:
        raise CheckpointError(f"{path} holds no adapter tensors; expected names that end in lora_A.weight.")
    return {name: parts[name] for name in found if name in parts}  # in the model's order


def _check_is_base(model: nn.Module, path: Path, key: str, tensor: Tensor) -> None:
    """PEFT copies embeddings and heads into some adapter files; such a copy must be the weight that is here."""
    published = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    ours = model.state_dict().get(from_published(model, published) or "")
    if ours is None or ours.shape != tensor.shape or not torch.equal(ours.to(tensor.dtype).cpu(), tensor):
        raise CheckpointError(
            f"{path}: {key} is neither a low-rank adapter nor a copy of this model's weight. "
            "The adapter was made for another model, or it trains whole layers, which is not done here."
        )


def _make_layer(
    base: nn.Module, published: str, config: Mapping[str, Any], tensors: dict[str, Tensor], folder: Path
) -> LoraLinear:
    if set(tensors) != set(PARTS.values()):
        raise CheckpointError(f"{folder / WEIGHTS}: {published} has {', '.join(tensors)} alone; expected A and B.")
    rank = _by_pattern(config.get("rank_pattern"), published, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), published, config.get("lora_alpha"))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{folder / CONFIG}: r is {rank!r} and lora_alpha {alpha!r}; expected numbers.")
    options = {"use_rslora": bool(config.get("use_rslora"))}
    layer = LoraLinear(base, rank, alpha, float(config.get("lora_dropout") or 0.0), **options)
    for part, tensor in tensors.items():
        expected = getattr(layer, part)
        if tensor.shape != expected.shape:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {part} of {published} has shape {tuple(tensor.shape)}; expected "
                f"{tuple(expected.shape)} from rank {rank} and this model's layer."
            )
        with torch.no_grad():
            expected.copy_(tensor)
    return layer


def _by_pattern(patterns: Mapping[str, Any] | None, published: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", published):
            return value
    return default
