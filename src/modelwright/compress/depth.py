"""More layers: a deeper model that starts from the knowledge of a shallower one.

Two ways. `scale_depth` stacks two overlapping copies, the last layers of one and the first of the other left out: the
function changes, and continued pre-training goes on from well below a fresh model's loss. `add_silent_layers` puts
copies between the layers whose outputs are zero: the function stays exactly as it was, and what is trained is new room.

Source: Kim et al. 2023, "SOLAR 10.7B: depth up-scaling", arXiv 2312.15166, section 2; Wu et al. 2024, "LLaMA Pro:
block expansion", arXiv 2401.02415, section 3.2.
"""

from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import nn

from modelwright.base.errors import ConfigError
from modelwright.compress.surgery import dense_state, rebuild

M = TypeVar("M", bound=nn.Module)


def scale_depth(model: M, num_layers: int) -> M:
    """Return a model of ``num_layers``: the first half are the model's first layers, the second half its last.

    32 layers and 48 give 0 .. 23 followed by 8 .. 31, as in the paper.

    Raises:
        ConfigError: ``num_layers`` is not above what there is, or more than twice that.
    """
    before = _check_deeper(model, num_layers)
    if num_layers > 2 * before:
        raise ConfigError(f"num_layers is {num_layers}; two copies of {before} layers give {2 * before} at most.")
    second = num_layers // 2
    return arrange_layers(model, [*range(num_layers - second), *range(before - second, before)])


def add_silent_layers(model: M, num_layers: int) -> M:
    """Return a model of ``num_layers`` that computes the same: the new ones, spread evenly, add nothing yet.

    Raises:
        ConfigError: ``num_layers`` is not above what there is, or the layers cannot be silenced.
    """
    before = _check_deeper(model, num_layers)
    order: list[int] = []
    silent: list[int] = []
    for index in range(before):
        order.append(index)
        # So many copies stand behind this layer that those up to here are in proportion.
        due = (index + 1) * (num_layers - before) // before - index * (num_layers - before) // before
        silent += range(len(order), len(order) + due)
        order += [index] * due
    return arrange_layers(model, order, silent)


def arrange_layers(model: M, order: Sequence[int], silent: Collection[int] = ()) -> M:
    """Return a model whose layer i is the given one's layer ``order[i]``.

    Args:
        model: A decoder with ``layers``.
        order: Indices of its layers; any may stand several times, or not at all.
        silent: Places in the new model whose layers add nothing to the stream: what writes into it is zero.

    Raises:
        ConfigError: The family cannot say such an order in its config, or its layers do not tell what writes.
    """
    state = dense_state(model, "arranging layers")
    config: Any = model.config
    before: Any = model.cache_layout()  # type: ignore[operator]
    outside = {name: tensor for name, tensor in state.items() if not name.startswith("layers.")}
    inside: dict[int, dict[str, torch.Tensor]] = {index: {} for index in range(len(before))}
    for name, tensor in state.items():
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            inside[int(index)][rest] = tensor
    arranged = {f"layers.{i}.{rest}": t for i, old in enumerate(order) for rest, t in inside[old].items()}
    made = rebuild(model, _config_of(config, order, len(before)), outside | arranged)
    after: Any = made.cache_layout()  # type: ignore[operator]
    moved = [i for i, old in enumerate(order) if after[i] != before[old]]
    if moved:
        raise ConfigError(
            f"Layer {moved[0]} would be layer {order[moved[0]]} with {after[moved[0]]} in the place of "
            f"{before[order[moved[0]]]}: the config of a {type(model).__name__} cannot say this order."
        )
    with torch.no_grad():
        for place in silent:
            _silence(made.layers[place], place)  # type: ignore[index, arg-type]
    return made


def _check_deeper(model: nn.Module, num_layers: int) -> int:
    dense_state(model, "adding layers")
    before = len(model.layers)  # type: ignore[arg-type]
    if num_layers <= before:
        raise ConfigError(f"num_layers is {num_layers}; the model has {before} already. Give a larger number.")
    return before


def _config_of(config: Any, order: Sequence[int], num_layers: int) -> Any:
    """Return the config with the new number of layers; what it says layer by layer follows the order."""
    changes: dict[str, Any] = {"num_layers": len(order)}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == "num_full_layers":  # the first so many
            changes[field.name] = next((i for i, old in enumerate(order) if old >= value), len(order))
        elif field.name == "attention_layers":  # their indices
            changes[field.name] = tuple(i for i, old in enumerate(order) if old in value)
        elif isinstance(value, tuple) and len(value) == num_layers:
            changes[field.name] = tuple(value[old] for old in order)
    return replace(config, **changes)


def _silence(layer: nn.Module, place: int) -> None:
    writers = [m for m in layer.modules() if hasattr(m, "init_scale")]
    if not writers:
        raise ConfigError(f"Layer {place}, a {type(layer).__name__}, does not tell what writes into the stream.")
    for writer in writers:
        for parameter in writer.parameters(recurse=False):
            parameter.zero_()
