"""How each method but LoRA stands in PEFT's files: its tensors' names and shapes, and the fields of its config.

A format is two functions: ``write(model, published)`` returns tensors and config fields, and ``read(model, config,
tensors, ours)`` puts them beside a model. Keys of layers come without PEFT's prefix. Bottleneck adapters are none of
PEFT's methods; they are kept in the same two files under a type of their own.

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint, and the sources of PEFT 0.21.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.errors import CheckpointError
from modelwright.nn.adalora import AdaLoraLinear
from modelwright.nn.adapters import adapter_layers
from modelwright.nn.bottleneck import BottleneckLinear
from modelwright.nn.ia3 import IA3Linear
from modelwright.nn.linear import linears, replace_module
from modelwright.nn.virtual_tokens import Prefix, PrefixConfig, PromptConfig, SoftPrompt

Name = Callable[[str], str | None]  # of a layer: ours to published, or back
Written = tuple[dict[str, Tensor], dict[str, Any]]


def write_ia3(model: nn.Module, published: Name) -> Written:
    """Return the vectors of IA3."""
    tensors, inputs, targets = {}, [], []
    for name, layer in adapter_layers(model).items():
        assert isinstance(layer, IA3Linear)
        theirs = str(published(name))
        factor = layer.factor.detach()
        tensors[f"{theirs}.ia3_l"] = factor[None] if layer.scales_input else factor[:, None]
        targets.append(theirs)
        inputs += [theirs] if layer.scales_input else []
    config = {"peft_type": "IA3", "target_modules": targets, "feedforward_modules": inputs, "fan_in_fan_out": False}
    return tensors, {**config, "modules_to_save": None, "init_ia3_weights": True}


def read_ia3(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], ours: Name) -> list[str]:
    """Put the vectors of IA3 in place."""
    made: dict[str, nn.Module] = {}
    for name, base, parts in _by_layer(model, tensors, ("ia3_l",), ours):
        factor = parts["ia3_l"]
        layer = IA3Linear(base, scales_input=factor.shape[0] == 1 and factor.shape[1] != 1)
        _fill(layer.factor, factor.reshape(-1), f"ia3_l of {name}")
        made[name] = layer
    return _replace(model, made)


def write_adalora(model: nn.Module, published: Name) -> Written:
    """Return A, E and B of AdaLoRA; silenced triplets stand there as zeros of E."""
    tensors, targets = {}, []
    layers = {name: x for name, x in adapter_layers(model).items() if isinstance(x, AdaLoraLinear)}
    for name, layer in layers.items():
        theirs = str(published(name))
        targets.append(theirs)
        for part, ending in (("lora_a", "lora_A"), ("lora_e", "lora_E"), ("lora_b", "lora_B")):
            tensors[f"{theirs}.{ending}"] = getattr(layer, part).detach()
    config = {
        "peft_type": "ADALORA",
        "target_modules": targets,
        "init_r": layer.rank,
        "r": layer.rank,
        "target_r": layer.rank,
        "lora_alpha": layer.alpha,
        "lora_dropout": float(layer.dropout.p),
        "tinit": 0,
        "tfinal": 0,
        "deltaT": 1,
        "total_step": 1,
        "bias": "none",
    }
    return tensors, config


def read_adalora(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], ours: Name) -> list[str]:
    """Put A, E and B of AdaLoRA in place; of triplets that were cut away nothing is needed."""
    made: dict[str, nn.Module] = {}
    for name, base, parts in _by_layer(model, tensors, ("lora_A", "lora_E", "lora_B"), ours):
        rank = parts["lora_A"].shape[0]
        dropout = float(config.get("lora_dropout") or 0.0)
        layer = AdaLoraLinear(base, rank, float(config["lora_alpha"]), dropout, divisor=float(config["init_r"]))
        for part, ending in (("lora_a", "lora_A"), ("lora_e", "lora_E"), ("lora_b", "lora_B")):
            _fill(getattr(layer, part), parts[ending], f"{ending} of {name}")
        made[name] = layer
    return _replace(model, made)


def write_bottleneck(model: nn.Module, published: Name) -> Written:
    """Return the small feed-forwards."""
    tensors = {}
    for name, layer in adapter_layers(model).items():
        for part, tensor in layer.own_state().items():
            tensors[f"{published(name)}.bottleneck.{part}"] = tensor
    return tensors, {"peft_type": "BOTTLENECK"}


def read_bottleneck(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], ours: Name
) -> list[str]:
    """Put the small feed-forwards in place."""
    parts = ("down.weight", "down.bias", "up.weight", "up.bias")
    made: dict[str, nn.Module] = {}
    for name, base, found in _by_layer(model, tensors, tuple(f"bottleneck.{part}" for part in parts), ours):
        layer = BottleneckLinear(base, found["bottleneck.down.weight"].shape[0])
        for part in parts:
            _fill(layer.get_parameter(part), found[f"bottleneck.{part}"], f"{part} of {name}")
        made[name] = layer
    return _replace(model, made)


def write_prompt(model: nn.Module, published: Name) -> Written:
    """Return the trained embeddings."""
    virtual = model.virtual
    assert isinstance(virtual, SoftPrompt)
    fields = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "token_dim": virtual.embeddings.shape[1]}
    return {"prompt_embeddings": virtual.embeddings.detach()}, {**fields, **_virtual_fields(model, virtual.num_tokens)}


def read_prompt(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], ours: Name) -> list[str]:
    """Put trained embeddings before the text."""
    names = PromptConfig(int(config["num_virtual_tokens"])).attach(model)
    assert isinstance(model.virtual, SoftPrompt)
    _fill(model.virtual.embeddings, _the_embeddings(tensors), "prompt_embeddings")
    return names


def write_prefix(model: nn.Module, published: Name) -> Written:
    """Return the trained keys and values, one row a virtual token."""
    virtual = model.virtual
    assert isinstance(virtual, Prefix)
    num_layers, _, num_tokens, num_heads, size = virtual.keys_values.shape
    rows = virtual.keys_values.detach().permute(2, 0, 1, 3, 4).reshape(num_tokens, -1)  # (N, L*2*K*H)
    fields = {
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "token_dim": num_heads * size,
        "encoder_hidden_size": num_heads * size,
    }
    return {"prompt_embeddings": rows.contiguous()}, {
        **fields,
        **_virtual_fields(model, num_tokens),
        "num_attention_heads": num_heads,
        "num_layers": num_layers,
    }


def read_prefix(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], ours: Name) -> list[str]:
    """Put trained keys and values before the text."""
    if config.get("prefix_projection"):
        raise CheckpointError("The prefix goes through a feed-forward (prefix_projection), which is not computed here.")
    names = PrefixConfig(int(config["num_virtual_tokens"])).attach(model)
    assert isinstance(model.virtual, Prefix)
    target = model.virtual.keys_values
    num_layers, _, num_tokens, num_heads, size = target.shape
    rows = _the_embeddings(tensors)
    if rows.numel() != target.numel():
        raise CheckpointError(
            f"prompt_embeddings has shape {tuple(rows.shape)}; this model needs ({num_tokens}, "
            f"{num_layers * 2 * num_heads * size}). The adapter was made for another model."
        )
    _fill(target, rows.view(num_tokens, num_layers, 2, num_heads, size).permute(1, 2, 0, 3, 4), "prompt_embeddings")
    return names


def _virtual_fields(model: nn.Module, num_tokens: int) -> dict[str, Any]:
    layouts = model.cache_layout()  # type: ignore[operator]
    return {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": num_tokens,
        "num_transformer_submodules": 1,
        "num_attention_heads": layouts[0].num_kv_heads,
        "num_layers": len(layouts),
    }


def _the_embeddings(tensors: Mapping[str, Tensor]) -> Tensor:
    if set(tensors) != {"prompt_embeddings"}:
        raise CheckpointError(f"The file holds {', '.join(tensors) or 'nothing'}; expected prompt_embeddings alone.")
    return tensors["prompt_embeddings"]


def _by_layer(
    model: nn.Module, tensors: Mapping[str, Tensor], endings: tuple[str, ...], ours: Name
) -> list[tuple[str, nn.Module, dict[str, Tensor]]]:
    """Return (our name, layer, tensors by ending) in the model's order, or say which tensor has no place."""
    found = dict(linears(model))
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        ending = next((e for e in endings if key.endswith(f".{e}")), None)
        name = None if ending is None else ours(key.removesuffix(f".{ending}"))
        if ending is None or name not in found:
            raise CheckpointError(
                f"{key} belongs to no linear layer of this {type(model).__name__}. The adapter was made for another "
                "model."
            )
        parts.setdefault(name, {})[ending] = tensor
    for name, have in parts.items():
        if set(have) != set(endings):
            raise CheckpointError(f"{name} has {', '.join(have)} alone; expected {', '.join(endings)}.")
    return [(name, found[name], parts[name]) for name in found if name in parts]


@torch.no_grad()
def _fill(target: Tensor, tensor: Tensor, what: str) -> None:
    if target.shape != tensor.shape:
        raise CheckpointError(
            f"{what} has shape {tuple(tensor.shape)}; this model needs {tuple(target.shape)}. The adapter was made for "
            "another model."
        )
    target.copy_(tensor)


def _replace(model: nn.Module, made: Mapping[str, nn.Module]) -> list[str]:
    for name, layer in made.items():
        replace_module(model, name, layer)
    return list(made)
