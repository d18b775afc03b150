"""``mw train scaling RECIPE``: a scaling-law study on the data of a pre-training recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelwright.base.config import load, read_recipe
from modelwright.base.errors import ConfigError
from modelwright.base.progress import console
from modelwright.train.scaling import ScalingConfig, run_scaling

TAKEN = ("data", "tokenizer", "max_seq_len", "ladder", "loop")


def study(arguments: Sequence[str]) -> None:
    """Run the ladder, fit the law, check its prediction, and print them.

    Raises:
        ConfigError: No recipe is named, or a setting is wrong.
    """
    named = [word for word in arguments if not word.startswith("-")]
    if len(named) != 1:
        raise ConfigError(
            f"`mw train scaling` takes one recipe and was given {named or 'none'}. Name a pre-training recipe, for "
            "example: mw train scaling recipes/pretrain/small.yaml --out=runs/scaling"
        )
    values: dict[str, Any] = {key: value for key, value in read_recipe(Path(named[0])).items() if key in TAKEN}
    loop = {key: value for key, value in (values.get("loop") or {}).items() if key != "num_steps"}
    values |= {"out": "runs/scaling", "loop": {"compile": False, **loop}}
    config = load(ScalingConfig, values, [word for word in arguments if word.startswith("-")])
    result = run_scaling(config)
    figures, last = result.figures, result.held_out
    console.print(f"[bold]{result.out}[/bold]  L = E + A / N^alpha + B / D^beta, with intervals of 90 %:")
    for name, one in figures["law"].items():
        low, high = one["interval_90"]
        console.print(f"  {name:<13} {one['value']:.4g}  ({low:.4g} to {high:.4g})")
    low, high = figures["predicted_interval_90"]
    console.print(
        f"  the larger run: predicted {figures['predicted_loss']:.4f} ({low:.4f} to {high:.4f}), "
        f"measured {last.loss:.4f}; "
        f"off by {figures['prediction_error_fraction']:+.2%}, "
        f"the best rung by {figures['best_rung_error_fraction']:+.2%}"
    )
