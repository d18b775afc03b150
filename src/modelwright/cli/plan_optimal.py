"""What ``mw plan`` says without a recipe: sizes and tokens that suit each other; and what hours cost."""

import json
from pathlib import Path

from rich.table import Table

from modelwright.base.config import read_recipe
from modelwright.base.errors import ConfigError
from modelwright.base.progress import console, human_count
from modelwright.train.scaling_law import CHINCHILLA, CHINCHILLA_AS_PUBLISHED


def read_prices(file: Path, seconds: float) -> dict[str, float]:
    """Return what so many seconds cost on each machine of a price table.

    Raises:
        ConfigError: A price is not a number of at least 0.
    """
    costs = {}
    for name, price in read_recipe(file).items():
        if isinstance(price, bool) or not isinstance(price, (int, float)) or not price >= 0:
            raise ConfigError(f"The price of {name} in {file} is {price!r}; give a number an hour, for example 2.5.")
        costs[str(name)] = price * seconds / 3600
    return costs


def show_optimal(asked: dict[str, float], *, as_json: bool) -> None:
    """Print size, tokens, FLOPs and loss that belong together, by the corrected fit and as published."""
    (kind, value), rows = next(iter(asked.items())), {}
    for name, law in (("corrected", CHINCHILLA), ("as published", CHINCHILLA_AS_PUBLISHED)):
        if kind == "flops":
            size, seen = law.size_for_flops(value)
        elif kind == "parameters":
            size, seen = value, law.tokens_for_size(value)
        else:
            size, seen = law.size_for_tokens(value), value
        rows[name] = {
            "parameters": size,
            "tokens": seen,
            "tokens_per_parameter": seen / size,
            "flops": 6 * size * seen,
            "loss": law.loss(size, seen),
        }
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("law", "parameters", "tokens", "tokens a parameter", "FLOPs", "loss", box=None, pad_edge=False)
    for name, row in rows.items():
        ratio, loss = f"{row['tokens_per_parameter']:.1f}", f"{row['loss']:.3f}"
        counts = human_count(row["parameters"]), human_count(row["tokens"])
        table.add_row(name, *counts, ratio, f"{row['flops']:.2e}", loss)
    console.print(table)
    console.print("corrected: Besiroglu et al. 2024, arXiv:2404.10102; as published: Hoffmann et al. 2022, approach 3")
