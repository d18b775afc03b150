"""Looking into a model while it reads a text: activations layer by layer, units that never act, attention maps.

Activations are taken where a block's feed-forward part decides what passes (the input of its last matrix), and where
the block ends. A unit is dead on a text when it stays below a thousandth of its layer's typical size at every position;
a short text shows more dead units than a long one.

Not here: models that are compiled, and attention that is not computed by `nn.attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, MissingExtraError
from modelwright.base.files import atomic_file
from modelwright.nn.attention import record_attention

NUM_BINS = 41
DEAD_SHARE = 1e-3  # of the layer's root mean square
MAX_SHOWN = 48  # tokens on an axis that can still be read


@dataclass(frozen=True)
class LayerActivations:
    """What one place of a model held over a text."""

    name: str
    mean: float
    deviation: float
    largest: float
    num_units: int
    num_dead: int
    edges: list[float]  # NUM_BINS + 1
    counts: list[int]  # NUM_BINS


def look_at_activations(model: nn.Module, input_ids: Tensor) -> list[LayerActivations]:
    """Return the activations of each block over a text (1, T), in the order of the blocks.

    Raises:
        ConfigError: The model has no list of blocks called ``layers``.
    """
    blocks = getattr(model, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ConfigError(f"{type(model).__name__} has no list of blocks called layers to look into. Give a decoder.")
    seen: list[tuple[str, Tensor]] = []
    handles = []
    for index, block in enumerate(blocks):
        last = [m for n, m in block.named_modules() if n.rpartition(".")[2] in ("down", "down_proj", "w2")]
        if last:
            name = f"layer {index}, feed-forward units"
            handles.append(
                last[0].register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0].detach())))
            )
        name = f"layer {index}, output"
        handles.append(block.register_forward_hook(lambda _, __, out, name=name: seen.append((name, _first(out)))))
    try:
        with torch.inference_mode():
            model.eval()(input_ids)
    finally:
        for handle in handles:
            handle.remove()
    return [_describe(name, values) for name, values in seen]


def look_at_attention(model: nn.Module, input_ids: Tensor) -> list[Tensor]:
    """Return the attention weights (N, T, S) of every call, in the order of the layers, for a text (1, T).

    Raises:
        ConfigError: The model computes no attention.
    """
    with torch.inference_mode(), record_attention() as maps:
        model.eval()(input_ids)
    if not maps:
        raise ConfigError(f"{type(model).__name__} computed no attention that could be recorded. Give a transformer.")
    return [one[0].float() for one in maps]


def _first(out: Any) -> Tensor:
    return (out[0] if isinstance(out, tuple) else out).detach()


def _describe(name: str, values: Tensor) -> LayerActivations:
    flat = values.float().flatten(0, -2)  # (positions, units)
    size = float(flat.square().mean().sqrt())
    dead = int((flat.abs().amax(0) <= DEAD_SHARE * size).sum())
    reach = float(flat.abs().quantile(0.999)) if flat.numel() < 2**24 else 4 * size
    reach = max(reach, 1e-12)
    counts, edges = np.histogram(flat.clamp(-reach, reach).numpy(), NUM_BINS, (-reach, reach))
    return LayerActivations(
        name,
        float(flat.mean()),
        float(flat.std()) if flat.numel() > 1 else 0.0,
        float(flat.abs().max()),
        flat.shape[1],
        dead,
        edges.tolist(),
        counts.tolist(),
    )


def plot_activations(layers: Sequence[LayerActivations], out: Path) -> None:
    """Draw one histogram a place, with its spread and its dead units, into a PNG."""
    figure_class = _figure_class("Drawing activations")
    columns = 2 if len(layers) > 1 else 1
    rows = -(-len(layers) // columns)
    figure = figure_class(figsize=(4.8 * columns, 1.9 * rows + 0.3))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, layer in zip(panels, layers, strict=False):
        edges = np.array(layer.edges)
        color = "#1f5c54" if "output" in layer.name else "#b3541e"
        panel.bar(edges[:-1], layer.counts, np.diff(edges), align="edge", color=color)
        panel.set_yscale("symlog")
        dead = f", {layer.num_dead} of {layer.num_units} units dead" if "units" in layer.name else ""
        panel.set_title(f"{layer.name}: sd {layer.deviation:.3g}{dead}", fontsize=8, loc="left")
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(layers) :]:
        panel.set_axis_off()
    figure.tight_layout()
    _save(figure, out)


def plot_attention(maps: Sequence[Tensor], tokens: Sequence[str], out: Path, layer: int = 0) -> None:
    """Draw the heads of one layer as maps, queries downwards and keys across, into a PNG.

    Raises:
        ConfigError: There is no such layer.
    """
    if not -len(maps) <= layer < len(maps):
        raise ConfigError(f"layer is {layer}, and the model has {len(maps)}. Give 0 to {len(maps) - 1}.")
    figure_class = _figure_class("Drawing attention")
    heads = maps[layer][:, :MAX_SHOWN, :MAX_SHOWN]
    names = [token.replace("\n", "⏎").replace(" ", "·").replace("$", r"\$") for token in tokens[:MAX_SHOWN]]
    columns = min(4, len(heads))
    rows = -(-len(heads) // columns)
    side = max(2.6, 0.17 * len(names) + 0.9)
    figure = figure_class(figsize=(side * columns, side * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for index, (panel, head) in enumerate(zip(panels, heads, strict=False)):
        panel.imshow(
            head.numpy(), cmap="magma", norm="linear", vmin=0, vmax=float(head[1:].max()) if len(head) > 1 else 1.0
        )
        panel.set_title(f"layer {layer % len(maps)}, head {index}", fontsize=9)
        panel.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        panel.set_yticks(range(len(names)), names, fontsize=6)
    for panel in panels[len(heads) :]:
        panel.set_axis_off()
    _save(figure, out)


def _figure_class(purpose: str) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", purpose) from error
    return Figure


def _save(figure: Any, out: Path) -> None:
    with atomic_file(out, "wb") as handle:
        figure.savefig(handle, format="png", dpi=130)
