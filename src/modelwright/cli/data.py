"""``mw data``: documents -> a data set that can be learned from, whole or one step at a time."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from modelwright.base.config import load
from modelwright.base.progress import console, human_bytes
from modelwright.cli.data_run import EXIT_SET_ASIDE, Strict, run
from modelwright.cli.data_scrape import scrape
from modelwright.cli.data_steps import clean, decontaminate, dedup, scrub
from modelwright.data.pipeline import PrepareConfig
from modelwright.ops.make import make_data

MAX_SHOWN = 20
DEFAULT = "prepare"


class _Group(TyperGroup):
    """Takes a folder where a command is expected: ``mw data DOCS --out DIR`` is ``mw data prepare DOCS --out DIR``."""

    default_part = DEFAULT

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0] not in (*self.commands, "--help"):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)  # type: ignore[arg-type]


data = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    help="From documents to a data set that can be learned from; every removal has its reason.\n\n"
    "[bold]mw data DOCS --out DIR[/bold] does the usual things to a folder. "
    "[bold]mw data run PIPELINE.yaml[/bold] does what a file says, on all processors or a Ray cluster, and goes on "
    "where it was killed. The others do one step to a file of JSON lines with id and text.\n\n"
    "Exit status: 0 all went well; 1 an error that the message explains; 2 written wrongly; 3 done, but something "
    "could not be used and was set aside with its place and reason.",
)
_OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}
data.command(context_settings=_OPEN)(run)
for step in (clean, dedup, scrub, decontaminate):
    data.command()(step)
data.command(context_settings=_OPEN)(scrape)


@data.command(context_settings=_OPEN)
def prepare(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the data set; documents and pairs go beside it.")],
    docs: Annotated[
        Path | None, typer.Argument(help="Folder or file of .md .txt .html .pdf .docx; none: Python's reference.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For the choice of instruction pairs.")] = 0,
    strict: Strict = False,
) -> None:
    """Read, clean, deduplicate, redact and split the documents in DOCS, and make instruction pairs from them.

    Takes the settings of preparation as --field=value, for example --min_chars=200 or --redact=email,phone.
    """
    config = load(PrepareConfig, None, context.args)
    made = make_data(docs, out, config, seed, is_strict=strict)
    table = Table("stage", "documents in", "removed", "out", "size out", "", box=None, pad_edge=False)
    for row in made.prepared.funnel:
        counts = (f"{n:,}" for n in (row.documents_in, row.documents_removed, row.documents_out))
        table.add_row(row.stage, *counts, human_bytes(row.bytes_out), row.note)
    console.print(table)
    for failure in made.failures[:MAX_SHOWN]:
        console.print(f"[yellow]not read[/yellow] {escape(failure.path)}: {escape(failure.reason)}")
    if len(made.failures) > MAX_SHOWN:
        console.print(f"and {len(made.failures) - MAX_SHOWN} more; all are in {made.documents}/failures.jsonl")
    console.print(f"[bold]{made.documents}[/bold]  {made.num_documents:,} documents as they were read")
    num_train, num_held_out = len(made.prepared.train), len(made.prepared.validation)
    console.print(f"[bold]{out}[/bold]  {num_train:,} to learn from, {num_held_out:,} held out, every removal noted")
    if made.pairs is not None:
        console.print(f"[bold]{made.pairs}[/bold]  {made.num_pairs:,} instruction pairs")
    else:
        console.print("no instruction pairs: the documents hold nothing that the templates can ask about")
    if made.failures:
        raise typer.Exit(EXIT_SET_ASIDE)
