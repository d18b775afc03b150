"""``mw data scrape``: pages of a site to rows."""

from pathlib import Path
from typing import Annotated

import typer

from modelwright.base.progress import console
from modelwright.cli.data_run import EXIT_SET_ASIDE, show_asides
from modelwright.data.scrape import read_spec
from modelwright.data.scrape import scrape as run_scraper


def scrape(
    context: typer.Context,
    spec: Annotated[Path, typer.Argument(help="YAML with start_urls and fields; recipes/data/listings.yaml.")],
    out: Annotated[Path, typer.Option(help="The .jsonl or .csv file of rows to write.")],
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an earlier run fetched.")] = False,
) -> None:
    """Fetch pages of a site politely and write their fields as rows; goes on where it was stopped."""
    result = run_scraper(read_spec(spec, tuple(context.args)), out, fresh=fresh)
    console.print(f"[bold]{result.out}[/bold]  {result.num_items:,} rows from {result.num_pages:,} pages")
    rows = [{"id": "", "position": f.path, "step": "scrape", "reason": f.reason} for f in result.failures]
    show_asides(rows, out.with_name(out.name + ".failures.jsonl"))
    if rows:
        raise typer.Exit(EXIT_SET_ASIDE)
