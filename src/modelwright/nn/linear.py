"""Finding and exchanging the linear layers of a model, dense or low-bit, by name.

A layer counts as linear when it has ``in_features`` and ``out_features``. Low-rank adapters and low-bit weights are
put in place through these few functions, so that both follow the same rules for names and tied weights.
"""

import difflib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from modelwright.base.errors import ConfigError

ALL_LINEAR = "all-linear"


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (dotted name, layer) for every linear layer, outermost first; a wrapped layer's inside is not visited."""
    outer: list[str] = []
    for name, module in model.named_modules():
        if outer and name.startswith(outer[-1] + "."):
            continue
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            outer.append(name)
            yield name, module


def select_linears(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """Return the linear layers that ``targets`` name.

    A target is a layer's dotted name or the end of it: ``q`` and ``attention.q`` both match
    ``layers.0.attention.q``. The single target ``all-linear`` stands for every linear layer whose weight is its own;
    an output head tied to the embedding is not.

    Raises:
        ConfigError: A target matches nothing, or matches a tied layer; the message lists what exists.
    """
    return _select(model, targets, dict(linears(model)))


def select_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """Return what `select_linears` returns, and embeddings that are named: a change beside one ties nothing.

    Raises:
        ConfigError: Those of `select_linears`.
    """
    found = dict(linears(model))
    if list(targets) != [ALL_LINEAR]:
        wanted = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
        order = [name for name, _ in model.named_modules()]
        found = dict(sorted({**wanted, **found}.items(), key=lambda item: order.index(item[0])))
    return _select(model, targets, found)


def _select(model: nn.Module, targets: Sequence[str], found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    tied = shared_parameters(model)
    is_tied = {
        name: not isinstance(layer, nn.Embedding) and any(id(p) in tied for p in layer.parameters())
        for name, layer in found.items()
    }
    if list(targets) == [ALL_LINEAR]:
        return {name: layer for name, layer in found.items() if not is_tied[name]}
    if not targets:
        raise ConfigError(f"No target layers were given. Name ends of layer names, or {ALL_LINEAR!r}.")
    chosen: dict[str, nn.Module] = {}
    for target in targets:
        names = [name for name in found if name == target or name.endswith(f".{target}")]
        if not names:
            ends = sorted({name.rsplit(".", 1)[-1] for name, layer in found.items() if hasattr(layer, "in_features")})
            near = difflib.get_close_matches(target, [*ends, *found], 3, 0.5)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(
                f"Target {target!r} matches no linear layer.{hint} The model has: {', '.join(ends) or 'none'}. "
                f"Name some of these, a longer dotted name, or {ALL_LINEAR!r}."
            )
        for name in names:
            if is_tied[name]:
                raise ConfigError(
                    f"Target {target!r} matches {name}, whose weight is tied to another layer: changing one would "
                    "change both. Leave it out, or use a model with tie_embeddings=False."
                )
            chosen[name] = found[name]
    return {name: layer for name, layer in found.items() if name in chosen}  # in the model's order


def shared_parameters(model: nn.Module) -> set[int]:
    """``id`` of every parameter that stands in the model under more than one name."""
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` stands in ``model``."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def dense_weight(layer: nn.Module) -> Tensor:
    """Return the layer's weight (out, in) as a dense tensor, dequantized where it is low-bit."""
    dequantize = getattr(layer, "dequantize", None)
    return dequantize() if dequantize is not None else layer.weight  # type: ignore[return-value]
