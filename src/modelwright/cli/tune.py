"""``mw tune``: search a recipe's settings by short runs."""

import functools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from modelwright.base.config import read_recipe
from modelwright.base.errors import ConfigError
from modelwright.base.files import write_json
from modelwright.base.progress import console
from modelwright.base.registry import lookup
from modelwright.cli.recipe import read_training_recipe
from modelwright.train import METHODS
from modelwright.train.tune import Report, read_space, search, search_on_ray

LAST_SHARE = 0.1  # of the steps, over which the training loss is taken where there is no validation loss


def tune(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="The recipe that mw train would be given; it should be short.")],
    space: Annotated[Path, typer.Option(help="YAML: a setting's path to {low, high, log} or {choices}.")],
    trials: Annotated[int, typer.Option(help="Runs in all; a killed search goes on.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder of the search.")] = Path("runs/tune"),
    sampler: Annotated[str, typer.Option(help="tpe or random.")] = "tpe",
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    ray: Annotated[bool, typer.Option(help="Run trials side by side on a Ray cluster; draws are random.")] = False,
) -> None:
    """Run RECIPE with settings drawn from the space, and print the best; --section.field=value fixes others."""
    ranges = read_space(read_recipe(space))
    read_training_recipe(recipe, context.args)  # a wrong recipe is refused before the first trial
    out.mkdir(parents=True, exist_ok=True)
    objective = functools.partial(run_trial, recipe.resolve(), tuple(context.args), out.resolve())
    if ray:
        found = search_on_ray(objective, ranges, trials, seed=seed)
    else:
        found = search(objective, ranges, trials, storage=out / "trials.sqlite", seed=seed, sampler=sampler)
    rows = [vars(trial) for trial in found.trials]
    write_json(out / "search.json", {"recipe": str(recipe), "best": vars(found.best), "trials": rows})
    for trial in sorted(found.trials, key=lambda one: math.inf if one.loss is None else one.loss):
        shown = trial.state if trial.loss is None else f"{trial.loss:.4f}"
        console.print(f"  {shown:>9}  {json.dumps(trial.settings)}")
    best = " ".join(f"--{path}={value}" for path, value in found.best.settings.items())
    console.print(f"[bold]best[/bold] {found.best.loss:.4f}: mw train {recipe} {best}")


def run_trial(recipe: Path, arguments: Sequence[str], out: Path, settings: dict[str, Any], report: Report) -> float:
    """Return the loss that the recipe ends with under some settings; its model is thrown away."""
    name = "trial-" + "-".join(f"{value}" for value in settings.values()).replace("/", "_")
    target = out / name
    drawn = [f"--{path}={value}" for path, value in settings.items()]
    method, config = read_training_recipe(recipe, [*arguments, *drawn, f"--out={target}"])
    losses: list[float] = []

    def watch(run: Any, step: Any) -> None:
        losses.append(step.loss)
        if step.step % 10 == 0 and math.isfinite(step.loss) and not report(step.step, sum(losses[-10:]) / 10):
            raise _StoppedError

    try:
        result = lookup(METHODS, method, "method")(config, hooks=[watch])
    except _StoppedError:
        return math.inf
    finally:
        for folder in (target, target.with_name(name + ".run"), target.with_name(name + "-adapter")):
            shutil.rmtree(folder, ignore_errors=True)
    if "validation_loss" in result.figures:
        return float(result.figures["validation_loss"])
    last = losses[-max(1, int(len(losses) * LAST_SHARE)) :]
    return sum(last) / len(last)


class _StoppedError(ConfigError):
    """The search has seen enough of a trial."""
