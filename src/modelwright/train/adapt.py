"""A frozen model and a method of few parameters, put together the same way from a recipe and from `FastModel`.

Layers may be named as they are published (``q_proj``) or by our own names (``q``). Weights are rounded to 4 bits before
the method is attached, except for LoftQ and PiSSA, which must see the dense weight and round their layers themselves.

Source: Dettmers et al. 2023, arXiv:2305.14314 (QLoRA). The methods stand in `modelwright.nn.ADAPTERS`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from modelwright.models.weights import to_published
from modelwright.nn.adapters import AdapterMethod, attach_adapter, merge_adapters
from modelwright.nn.linear import linears, replace_module
from modelwright.nn.lora import LoraConfig, with_weight
from modelwright.nn.nf4 import NF4Linear, to_nf4
from modelwright.train.adalora import with_budget
from modelwright.train.objective import CausalLanguageModeling, Objective


def adapt(model: nn.Module, method: AdapterMethod, *, load_in_4bit: bool = False) -> list[str]:
    """Freeze the model, add the method's trained parts, and return the names of the changed layers.

    Args:
        method: Settings of one of `modelwright.nn.ADAPTERS`.
        load_in_4bit: Put the frozen linear layers into NF4.

    Raises:
        ConfigError: The settings do not fit the model.
    """
    if load_in_4bit and isinstance(method, LoraConfig) and method.init == "pissa":
        method = dataclasses.replace(method, init="qpissa")
    rounds_itself = needs_dense(method)
    if load_in_4bit and not rounds_itself:
        to_nf4(model)
    names = attach_adapter(model, with_own_names(model, method))
    if load_in_4bit and rounds_itself:
        to_nf4(model)  # the layers without an adapter
    return names


def needs_dense(method: AdapterMethod) -> bool:
    """Tell whether a method begins from what rounding loses, and so must see the weights before it."""
    return isinstance(method, LoraConfig) and method.init in ("pissa", "qpissa", "loftq")


def merge_dense(model: nn.Module) -> None:
    """Merge the adapters and make every other layer of few bits dense too: the folder has one kind of weights.

    Raises:
        ConfigError: Those of `merge_adapters`.
    """
    merge_adapters(model)
    for name, layer in list(linears(model)):
        if isinstance(layer, NF4Linear):
            replace_module(model, name, with_weight(layer, layer.dequantize(torch.float32)).requires_grad_(True))
            model.quantization_config = None  # type: ignore[assignment]


def objective_for(model: nn.Module) -> Objective:
    """Return next-token prediction, with the budget of ranks where the model has AdaLoRA."""
    return with_budget(model, CausalLanguageModeling())


def with_own_names(model: nn.Module, method: AdapterMethod) -> AdapterMethod:
    """Return the method with its targets by our names."""
    changes = {
        field.name: own_names(model, getattr(method, field.name))
        for field in dataclasses.fields(method)  # type: ignore[arg-type]
        if field.name in ("targets", "input_targets")
    }
    return dataclasses.replace(method, **changes) if changes else method  # type: ignore[type-var]


def own_names(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Return our ends of layer names for published ones; what is ours already stays.

    >>> from modelwright.models.llama import Llama, LlamaConfig
    >>> model = Llama(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2))
    >>> own_names(model, ["q_proj", "down_proj", "v"])
    ('q', 'down', 'v')
    """
    if isinstance(names, str):
        return (names,)
    found: dict[str, str] = {}
    for name, _ in linears(model):
        published: Any = to_published(model, f"{name}.weight").removesuffix(".weight")
        found[published.rsplit(".", 1)[-1]] = name.rsplit(".", 1)[-1]
    return tuple(found.get(name, name) for name in names)
