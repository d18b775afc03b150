"""``mw train``: pre-train or fine-tune as a recipe says; one process, or those that torchrun has started."""

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from modelwright.base import distributed
from modelwright.base.errors import ConfigError, OutOfMemoryError
from modelwright.base.progress import console, human_bytes, human_count
from modelwright.base.registry import lookup
from modelwright.cli.recipe import read_training_recipe
from modelwright.cli.train_scaling import study
from modelwright.cli.train_tracking import read_tracking, tell, tracked
from modelwright.train import METHODS
from modelwright.train.forecast import verdict
from modelwright.train.plan import what_fits
from modelwright.train.ray_engine import train_on_ray


def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A .yaml file, see recipes/; or: scaling RECIPE, for a scaling law.")],
    resume: Annotated[bool, typer.Option(help="Go on with the unfinished run of this recipe.")] = False,
    restart: Annotated[bool, typer.Option(help="Throw the unfinished run away and begin anew.")] = False,
    engine: Annotated[str, typer.Option(help="here: this process, or torchrun's; ray: workers on Ray.")] = "here",
    workers: Annotated[int, typer.Option(help="How many workers of Ray, with --engine ray.")] = 2,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; without it one is started here.")] = None,
) -> None:
    """Train a model as RECIPE says; --section.field=value changes one of its settings, for example --loop.seed=1.

    Several processes train together when torchrun starts them, torchrun --nproc-per-node 2 -m modelwright
    train RECIPE, or with --engine ray --workers 2; loop.parallel says how they share the work.
    """
    if recipe == Path("scaling"):  # a study of several runs
        study(context.args)
        return
    tracking, arguments = read_tracking(recipe, context.args)
    method, config = read_training_recipe(recipe, arguments)
    if engine not in ("here", "ray"):
        raise ConfigError(f"--engine is {engine!r}; known: here, ray. Leave it out to train in this process.")
    if engine == "ray":
        _settle_unfinished(config.out, is_wanted=resume, is_unwanted=restart)
        train_on_ray(method, config, workers, address=address)
        console.print(f"[bold]{config.out}[/bold]  {method}, {workers} workers on Ray")
        return
    with distributed.join():
        if distributed.rank() > 0:
            console.quiet = True
        _settle_together(config.out, is_wanted=resume, is_unwanted=restart)
        with tracked(config, tracking) as hooks:
            try:
                result = lookup(METHODS, method, "method")(config, hooks=[tell, *hooks])
            except OutOfMemoryError as error:
                raise OutOfMemoryError(f"{error} {what_fits(config)}".strip()) from error
        _show_result(method, result)


def _show_result(method: str, result: Any) -> None:
    console.print(f"[bold]{result.out}[/bold]  {method}, {result.figures['seconds']:.0f} s")
    for name, value in result.figures.items():
        console.print(f"  {name:<24} {_show(name, value)}")
    if method == "forecast":
        console.print(verdict(result.figures))


def _settle_together(out: Path, *, is_wanted: bool, is_unwanted: bool) -> None:
    """Let the first of several processes decide what becomes of an unfinished run; a restarted launch goes on."""
    said = None
    if distributed.rank() == 0:
        is_back = distributed.is_restarted() and out.with_name(out.name + ".run").is_dir()
        try:
            _settle_unfinished(out, is_wanted=is_wanted or is_back, is_unwanted=is_unwanted and not is_back)
        except ConfigError as error:
            said = str(error)
    said = distributed.share(said)
    if said is not None:
        raise ConfigError(said)


def _settle_unfinished(out: Path, *, is_wanted: bool, is_unwanted: bool) -> None:
    work = out.with_name(out.name + ".run")
    if is_wanted and is_unwanted:
        raise ConfigError("--resume and --restart contradict each other; give one of them.")
    if is_wanted and not work.is_dir():
        raise ConfigError(f"There is no unfinished run for {out} to go on with. Leave --resume out to begin one.")
    if is_unwanted:
        shutil.rmtree(work, ignore_errors=True)
    elif work.is_dir() and not is_wanted:
        raise ConfigError(f"{work} holds an unfinished run. Add --resume to go on with it, or --restart to begin anew.")


def _show(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return human_bytes(value)
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e6 else human_count(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
