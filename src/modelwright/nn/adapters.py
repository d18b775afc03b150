"""Adapters: small trained parts beside a frozen model, whatever the method, by one contract.

A method is its settings, a frozen dataclass with ``attach(model) -> names``; the table is `modelwright.nn.ADAPTERS`.
What it puts in place of a layer is an `AdapterLayer`: the frozen layer under ``base``, the trained parts as its own
parameters, and, where the method is a change of weights, ``merged()``. Adding a method is one file with these two.

Source of the contract: Mangrulkar et al. 2022, PEFT; the papers of the methods stand in their files.
"""

from typing import Protocol

from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.nn.linear import replace_module


class AdapterMethod(Protocol):
    """The settings of one method."""

    def attach(self, model: nn.Module) -> list[str]:
        """Put the trained parts into a frozen model; return the names of what was changed."""
        ...


class AdapterLayer(nn.Module):
    """A frozen layer with a trained part beside it; everything but ``base`` is the trained part."""

    base: nn.Module

    def merged(self) -> nn.Module:
        """Return a layer that computes the same without an adapter.

        Raises:
            ConfigError: The method is no change of the layer's weights.
        """
        raise ConfigError(
            f"A {type(self).__name__} cannot be merged: it computes what no weight of the layer can. Keep it beside "
            "the model: save_adapter writes it, load_adapter puts it back."
        )

    def own_state(self) -> dict[str, Tensor]:
        """Return the tensors that make the adapter, by their names within the layer."""
        return {n: p.detach() for n, p in self.named_parameters() if not n.startswith("base.")}


def attach_adapter(model: nn.Module, method: AdapterMethod) -> list[str]:
    """Freeze the whole model, add a method's trained parts, and return the names of the changed layers.

    Raises:
        ConfigError: The model has adapters already, or the settings do not fit it. The model is then as it was.
    """
    if has_adapters(model):
        raise ConfigError("The model already has adapters. Merge them, or remove them, before adding others.")
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        return method.attach(model)
    except Exception:
        remove_adapters(model)
        for parameter in trained:
            parameter.requires_grad_(True)
        raise


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return the adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def has_adapters(model: nn.Module) -> bool:
    """Tell whether a model has adapters of any kind."""
    return getattr(model, "virtual", None) is not None or bool(adapter_layers(model))


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained."""
    return [p for p in model.parameters() if p.requires_grad]


def merge_adapters(model: nn.Module) -> list[str]:
    """Write every adapter into its layer, take the wrappers away, make the model trainable again; return the names.

    Raises:
        ConfigError: There is nothing to merge (it was done before), or a method that cannot be merged. Nothing is
            changed then.
    """
    layers = adapter_layers(model)
    if getattr(model, "virtual", None) is not None:
        raise ConfigError(
            "Virtual tokens (prefix and prompt tuning) are no change of weights and cannot be merged. Keep them beside "
            "the model: save_adapter writes them, load_adapter puts them back."
        )
    if not layers:
        raise ConfigError("The model has no adapters to merge: none were added, or they were merged before.")
    for name, layer in layers.items():
        if type(layer).merged is AdapterLayer.merged:
            layer.merged()
        check_mergeable(model, name, layer)
    for name, layer in layers.items():
        replace_module(model, name, layer.merged())
    if not any(hasattr(module, "dequantize") for module in model.modules()):
        model.quantization_config = None  # type: ignore[assignment]
    model.requires_grad_(True)
    return list(layers)


def can_merge(model: nn.Module) -> bool:
    """Tell whether the model's adapters are a change of weights; virtual tokens and bottlenecks are none."""
    layers = adapter_layers(model).values()
    is_virtual = getattr(model, "virtual", None) is not None
    return not is_virtual and all(type(layer).merged is not AdapterLayer.merged for layer in layers)


def check_mergeable(model: nn.Module, name: str, layer: AdapterLayer) -> None:
    """Refuse to write a change into a weight that other layers use too.

    Raises:
        ConfigError: The weight is tied.
    """
    tied: dict[str, str] = model.tied_names() if hasattr(model, "tied_names") else {}  # type: ignore[operator]
    if f"{name}.weight" in {*tied, *tied.values()}:
        raise ConfigError(
            f"{name} has an adapter, and its weight is tied to another layer: merging would change both. Keep the "
            "adapter beside the model, or use a model with tie_embeddings=False."
        )


def remove_adapters(model: nn.Module) -> list[str]:
    """Take every adapter away and leave the model as it was before; return the names."""
    layers = adapter_layers(model)
    for name, layer in layers.items():
        undo = getattr(layer, "undo", None)
        if undo is not None:
            undo()
        replace_module(model, name, layer.base)
    virtual = getattr(model, "virtual", None)
    if virtual is not None:
        getattr(virtual, "detach_from", lambda _: None)(model)
        model.virtual = None  # type: ignore[assignment]
    return list(layers)


def check_rank(rank: int, in_features: int, out_features: int, where: str = "the layer") -> None:
    """Refuse a rank that is no rank, or larger than the layer has.

    Raises:
        ConfigError: With what the layer allows.
    """
    largest = min(in_features, out_features)
    if rank < 1:
        raise ConfigError(f"rank is {rank}; a low-rank adapter needs at least 1.")
    if rank > largest:
        raise ConfigError(
            f"rank is {rank}, but {where} is {out_features} x {in_features}: a change of it has rank {largest} at "
            f"most. Use a rank from 1 to {largest}, or leave the layer out of targets."
        )
