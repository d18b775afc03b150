"""Read low-rank adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

What a folder says is checked against a model here, once for training (which puts the layers into the model) and for
the engine (which keeps many adapters beside it). Nothing but safetensors is opened: a pickle is refused by its name.
Source: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from modelwright.base.errors import CheckpointError, DataError
from modelwright.base.files import read_json
from modelwright.models.layout import from_published, to_published
from modelwright.nn.linear import linears

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}
# What training reads beside these: DoRA's lengths, and changes of an embedding.
MORE_PARTS = {"lora_magnitude_vector": "magnitude", "lora_embedding_A": "lora_a", "lora_embedding_B": "lora_b"}
# First values that leave the base as it is, or (pissa) that are made again by training.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "pissa")
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


def read_adapter_config(folder: Path, kinds: Sequence[str] = ("LORA",), allowed: Sequence[str] = ()) -> dict[str, Any]:
    """Return ``adapter_config.json``.

    Args:
        kinds: Values of ``peft_type`` that the caller computes.
        allowed: Of the fields that must be off, those that the caller computes, and values of ``init_lora_weights``.

    Raises:
        CheckpointError: It is missing or damaged, or describes an adapter that is not computed here.
    """
    try:
        config = read_json(folder / CONFIG)
    except (DataError, OSError) as error:
        raise CheckpointError(f"{folder} is not a readable adapter folder: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") not in kinds:
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        only = "only 'LORA' adapters are loaded here" if list(kinds) == ["LORA"] else f"known: {', '.join(kinds)}"
        raise CheckpointError(f"{folder / CONFIG}: peft_type is {kind!r}; {only}.")
    first = config.get("init_lora_weights") if config["peft_type"] == "LORA" else None
    if first not in _INITS or (first == "pissa" and "pissa" not in allowed):
        raise CheckpointError(
            f"{folder / CONFIG}: init_lora_weights is {first!r}, which changed the base as well. "
            "Merge the adapter with PEFT and load the merged model."
        )
    for name, off in _MUST_BE_OFF.items():
        if config.get(name) not in off and name not in allowed:
            raise CheckpointError(
                f"{folder / CONFIG}: {name} is {config[name]!r}, which is not computed here. "
                "Merge the adapter with PEFT and load the merged model."
            )
    return config


def read_adapter_parts(
    model: nn.Module, folder: Path, places: Mapping[str, nn.Module] | None = None
) -> dict[str, dict[str, Tensor]]:
    """Return for each layer, by our name and in the model's order, its tensors ``lora_a`` and ``lora_b``.

    Args:
        places: Layers by name that may have them, and may have `MORE_PARTS`; None: linear layers with plain LoRA.

    Raises:
        CheckpointError: The file is missing or damaged, or a tensor is of another model; the message names it.
    """
    path = folder / WEIGHTS
    found = dict(linears(model)) if places is None else places
    known = PARTS if places is None else {**PARTS, **MORE_PARTS}
    pattern = rf"(.+)\.({'|'.join(map(re.escape, known))})"
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            for key in handle.keys():
                match = re.fullmatch(pattern, key.removeprefix(PREFIX))
                if match is None:
                    _check_is_base(model, path, key, handle.get_tensor(key))
                    continue
                name = (from_published(model, f"{match[1]}.weight") or "").removesuffix(".weight")
                if name not in found:
                    raise CheckpointError(
                        f"{path}: {key} belongs to no linear layer of this {type(model).__name__}. "
                        "The adapter was made for another model."
                    )
                parts.setdefault(name, {})[known[match[2]]] = handle.get_tensor(key)
    except FileNotFoundError:
        pickled = (
            " Pickled weights (adapter_model.bin) are not opened: they can run code." if _has_pickle(folder) else ""
        )
        raise CheckpointError(
            f"{path} does not exist; an adapter folder holds {CONFIG} and {WEIGHTS}.{pickled}"
        ) from None
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


def adapter_size(config: Mapping[str, Any], published: str, folder: Path) -> tuple[int, float]:
    """Return rank and alpha of a layer, given its published name.

    Raises:
        CheckpointError: They are no numbers.
    """
    rank = _by_pattern(config.get("rank_pattern"), published, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), published, config.get("lora_alpha"))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{folder / CONFIG}: r is {rank!r} and lora_alpha {alpha!r}; expected numbers.")
    return rank, alpha


def check_parts(tensors: Mapping[str, Tensor], sizes: tuple[int, int, int], published: str, folder: Path) -> None:
    """Hold a layer's two tensors against its rank, inputs and outputs.

    Raises:
        CheckpointError: One is missing or has another shape.
    """
    if set(tensors) != set(PARTS.values()):
        raise CheckpointError(f"{folder / WEIGHTS}: {published} has {', '.join(tensors)} alone; expected A and B.")
    rank, num_ins, num_outs = sizes
    for part, shape in (("lora_a", (rank, num_ins)), ("lora_b", (num_outs, rank))):
        if tensors[part].shape != shape:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {part} of {published} has shape {tuple(tensors[part].shape)}; expected "
                f"{shape} from rank {rank} and this model's layer."
            )


def published_layer(model: nn.Module, layer_name: str) -> str:
    """Return the name under which a layer is published."""
    return to_published(model, f"{layer_name}.weight").removesuffix(".weight")


def _has_pickle(folder: Path) -> bool:
    return (folder / "adapter_model.bin").exists()


def _by_pattern(patterns: Mapping[str, Any] | None, published: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", published):
            return value
    return default
