"""``mw costs``: what the gateway has spent."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from modelwright.base.errors import DataError
from modelwright.base.files import atomic_file
from modelwright.base.progress import console
from modelwright.serve.ledger import Ledger
from modelwright.serve.ledger_page import render


def costs(
    ledger: Annotated[Path, typer.Argument(help="The file named by `ledger` in the gateway's settings.")],
    html: Annotated[Path | None, typer.Option(help="Write a page with the same table and a bar a day.")] = None,
) -> None:
    """Show the calls, tokens, seconds and dollars in LEDGER by tenant and endpoint."""
    if not ledger.is_file():
        raise DataError(f"{ledger} does not exist. Name it as `ledger` in the gateway's settings and ask something.")
    book = Ledger(ledger)
    table = Table("tenant", "endpoint", "calls", "failed", "cached", "tokens in", "out", "seconds", "dollars", box=None)
    for row in book.table():
        counts = (row.num_calls, row.num_failed, row.num_cached, row.prompt_tokens, row.completion_tokens)
        dollars = f"{row.dollars:.4f}" + (f" and {row.num_unpriced} unpriced" if row.num_unpriced else "")
        table.add_row(row.tenant, row.endpoint, *(f"{n:,}" for n in counts), f"{row.seconds:.1f}", dollars)
    console.print(table)
    console.print(f"[bold]{book.dollars():.4f} dollars[/bold]")
    if html is not None:
        with atomic_file(html) as handle:
            handle.write(render(book))
        console.print(f"[bold]{html}[/bold]")
