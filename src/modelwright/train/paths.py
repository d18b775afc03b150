"""Paths of optimizers over surfaces of two variables: what a rule does, seen.

A surface is a function of a 2 x 1 matrix, so that Muon, which turns a matrix's update into an orthogonal one, has what
it works on; on one column that is a step of fixed length along the momentum. The rules are those that training uses.

Source: the surfaces are Rosenbrock's (1960) and Beale's (1958), an ill-conditioned bowl and a saddle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, MissingExtraError
from modelwright.base.files import atomic_file
from modelwright.base.registry import lookup
from modelwright.optim.muon import Muon


@dataclass(frozen=True)
class Surface:
    """A function of two variables, where its picture is cut, and where paths begin."""

    value: Callable[[Tensor, Tensor], Tensor]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    start: tuple[float, float]
    minimum: tuple[float, float] | None


SURFACES = {
    "bowl": Surface(lambda x, y: 0.05 * x**2 + y**2, (-10, 10), (-3, 3), (-8.0, 2.0), (0, 0)),
    "rosenbrock": Surface(lambda x, y: (1 - x) ** 2 + 20 * (y - x**2) ** 2, (-2, 2), (-1, 3), (-1.5, 2.0), (1, 1)),
    "beale": Surface(
        lambda x, y: (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2,
        (-1, 4),
        (-2, 2),
        (1.0, 1.5),
        (3, 0.5),
    ),
    "saddle": Surface(lambda x, y: x**2 - y**2 + 0.05 * y**4, (-3, 3), (-4, 4), (-2.5, 0.02), (0, 10**0.5)),
}

Rule = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
RULES: dict[str, tuple[Rule, float]] = {  # and a rate that suits the surfaces, as a share of the picture's width
    "sgd": (torch.optim.SGD, 0.0005),
    "momentum": (partial(torch.optim.SGD, momentum=0.9), 0.0002),
    "rmsprop": (torch.optim.RMSprop, 0.004),
    "adam": (torch.optim.Adam, 0.02),
    "muon": (partial(Muon, weight_decay=0.0), 0.015),
}
COLORS = {"sgd": "#1f5c54", "momentum": "#b3541e", "rmsprop": "#4a4fa3", "adam": "#a02c5a", "muon": "#111111"}


def optimizer_path(
    rule: str, surface: str, num_steps: int = 200, learning_rate: float | None = None
) -> list[tuple[float, float, float]]:
    """Return (x, y, value) before the first step and after each one; it ends early where a number is not finite.

    Raises:
        ConfigError: The rule or surface is not known, or a figure is out of range.
    """
    shape = _surface(surface)
    if rule not in RULES:
        lookup(dict.fromkeys(RULES, ""), rule, "optimizer")
    if not 1 <= num_steps <= 10_000 or (learning_rate is not None and not 0 < learning_rate < 1e6):
        raise ConfigError(
            f"steps is {num_steps} and learning_rate {learning_rate}; give 1 to 10,000 steps and a rate above 0."
        )
    make, share = RULES[rule]
    point = nn.Parameter(torch.tensor([[shape.start[0]], [shape.start[1]]], dtype=torch.float32))
    optimizer = make([point], learning_rate or share * (shape.x_range[1] - shape.x_range[0]))
    path = []
    for _ in range(num_steps + 1):
        value = shape.value(point[0, 0], point[1, 0])
        figures = (float(point[0, 0].detach()), float(point[1, 0].detach()), float(value.detach()))
        if not all(np.isfinite(figures)) or max(map(abs, figures)) > 1e6:
            break
        path.append(figures)
        optimizer.zero_grad()
        value.backward()
        if optimizer.__class__ is Muon and point.grad is not None and not bool(point.grad.any()):
            break
        with torch.no_grad():
            optimizer.step()
    return path


def surface_heights(surface: str, num: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x (num,), y (num,) and the value on their grid (num, num), rows by y."""
    shape = _surface(surface)
    x, y = (torch.linspace(*ends, num) for ends in (shape.x_range, shape.y_range))
    return x.numpy(), y.numpy(), shape.value(x[None, :], y[:, None]).numpy()


def plot_paths(
    surface: str, rules: Sequence[str], out: Path, num_steps: int = 200, learning_rate: float | None = None
) -> None:
    """Draw paths over the level lines of a surface, and the value by step, into a PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "Drawing the paths of optimizers") from error
    shape = _surface(surface)
    x, y, z = surface_heights(surface, 200)
    figure = Figure(figsize=(11.5, 4.8))
    map_panel, curve_panel = figure.subplots(1, 2, width_ratios=(1.4, 1))
    lifted = np.log1p(z - z.min())
    map_panel.contourf(x, y, lifted, levels=24, cmap="Greys", alpha=0.45)
    map_panel.contour(x, y, lifted, levels=24, colors="#8d867a", linewidths=0.4)
    for rule in rules:
        path = np.array(optimizer_path(rule, surface, num_steps, learning_rate))
        map_panel.plot(path[:, 0], path[:, 1], color=COLORS[rule], linewidth=1.5, alpha=0.85, label=rule)
        map_panel.plot(*path[-1, :2], "o", color=COLORS[rule], markeredgecolor="white", markersize=7)
        curve_panel.plot(path[:, 2] - z.min() + 1e-6, color=COLORS[rule], label=rule)
    map_panel.plot(*shape.start, "s", color="black", markersize=6)
    if shape.minimum is not None:
        map_panel.plot(*shape.minimum, "*", color="#d4a017", markeredgecolor="black", markersize=14)
    map_panel.set_xlim(shape.x_range)
    map_panel.set_ylim(shape.y_range)
    map_panel.set_title(f"{surface}: from the square to the star; dots: where each ended", fontsize=10, loc="left")
    curve_panel.set_yscale("log")
    curve_panel.set_xlabel("step")
    curve_panel.set_title("height above the lowest point of the picture", fontsize=10, loc="left")
    curve_panel.spines[["top", "right"]].set_visible(False)
    curve_panel.legend(frameon=False)
    figure.tight_layout()
    with atomic_file(out, "wb") as handle:
        figure.savefig(handle, format="png", dpi=130)


def _surface(name: str) -> Surface:
    if name not in SURFACES:
        lookup(dict.fromkeys(SURFACES, ""), name, "surface")
    return SURFACES[name]
