"""``mw data run``: the steps of a pipeline file over its sources."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from modelwright.base.errors import ConfigError
from modelwright.base.files import write_jsonl
from modelwright.base.progress import console, human_bytes
from modelwright.data.plan import NamedStep, read_pipeline
from modelwright.data.quality import PerplexityFilter
from modelwright.data.run import RunParams, RunResult, run_pipeline
from modelwright.evaluate.perplexity import TextPerplexity

MAX_SHOWN = 20
EXIT_SET_ASIDE = 3  # done, but something could not be used

Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first thing that cannot be used.")]
Workers = Annotated[int | None, typer.Option(help="Processes side by side; none given: one for each processor.")]


def run(
    context: typer.Context,
    pipeline: Annotated[Path, typer.Argument(help="YAML with source, steps and out; recipes/data/ holds examples.")],
    source: Annotated[Path | None, typer.Option(help="Read this instead of the path that the file names.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the data set; else the one that the file names.")] = None,
    engine: Annotated[str, typer.Option(help="local: processes on this machine; ray: a Ray cluster.")] = "local",
    workers: Workers = None,
    address: Annotated[str | None, typer.Option(help="Of a running Ray cluster; none: one is started here.")] = None,
    strict: Strict = False,
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Keep OUT.work: later runs use what still holds.")] = (
        False
    ),
) -> None:
    """Run the steps of a pipeline file over its sources.

    The same command goes on after a kill, piece by piece. The bytes of the data set depend on the input and the
    settings alone, not on the engine or the number of workers. Settings of the file can be given as --name=value.
    """
    given = [*context.args, *([f"--out={out}"] if out is not None else [])]
    config = read_pipeline(pipeline, given, source)
    config = replace(config, steps=tuple(map(_with_scorer, config.steps)))
    result = run_pipeline(config, RunParams(engine, workers, address, strict, keep_work))
    show_run(result)


def _with_scorer(named: NamedStep) -> NamedStep:
    """Hand a step that judges by perplexity the model that its settings name."""
    step = named.step
    if not isinstance(step, PerplexityFilter):
        return named
    if step.model is None or not step.model.exists():
        raise ConfigError(
            f"{named.name}.model is {step.model}; expected the folder of a language model, or an n-gram model's "
            ".arpa file. Name one that is there."
        )
    return replace(named, step=replace(step, score=TextPerplexity(step.model)))


def show_run(result: RunResult) -> None:
    """Print the funnel of a run and what was set aside; end with status 3 if anything was."""
    table = Table("step", "in", "removed", "set aside", "changed", "out", "size out", box=None, pad_edge=False)
    for name, tally in result.funnel.tallies.items():
        counts = (tally.documents_removed, tally.documents_aside, tally.documents_changed, tally.documents_out)
        table.add_row(
            name, f"{tally.documents_in:,}", *(f"{count:,}" for count in counts), human_bytes(tally.bytes_out)
        )
    console.print(table)
    show_asides(result.asides, result.out / "aside.jsonl")
    figures = result.funnel.measured()
    speed = f"{figures['documents_per_second']:,.0f} documents a second"
    state = "was made by an earlier run from the same input and settings" if result.was_done else speed
    console.print(f"[bold]{result.out}[/bold]  {result.funnel.num_documents:,} documents; {state}")
    console.print(f"why the others went: [bold]{result.out}/funnel.html[/bold]")
    if result.asides:
        raise typer.Exit(EXIT_SET_ASIDE)


def note_aside(asides: list[dict[str, str]], step: str, position: str, reason: str) -> None:
    """Add a line or file that could not be used to a list."""
    asides.append({"id": "", "position": position, "step": step, "reason": reason})


def end_with_asides(asides: list[dict[str, str]], file: Path) -> None:
    """Show and list what a command set aside, and end it with the status that tells so; nothing where all was used."""
    if not asides:
        file.unlink(missing_ok=True)  # of an earlier run
        return
    write_jsonl(file, asides)
    show_asides(asides, file)
    raise typer.Exit(EXIT_SET_ASIDE)


def show_asides(asides: list[dict[str, str]], file: Path) -> None:
    """Print the first things that were set aside, and where the rest is listed."""
    for row in asides[:MAX_SHOWN]:
        place = row["position"] or row["id"]
        console.print(f"[yellow]set aside[/yellow] {escape(place)}: {escape(row['reason'])} ({escape(row['step'])})")
    if len(asides) > MAX_SHOWN:
        console.print(f"and {len(asides) - MAX_SHOWN} more; all are in {file}")
