"""``mw convert-chat``: conversations, preference pairs and labels from one format to another."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from modelwright.base.files import write_jsonl
from modelwright.base.progress import console
from modelwright.data import FORMATS
from modelwright.data.convert import convert_file, summarize

_NAMES = ", ".join(FORMATS)


def convert_chat(
    source: Annotated[Path, typer.Argument(help="JSON lines or one JSON array, plain or .gz.")],
    out: Annotated[Path, typer.Argument(help="File to write: .jsonl, or .json for one array.")],
    to: Annotated[str, typer.Option(help=f"Format to write: {_NAMES}.")],
    source_format: Annotated[str | None, typer.Option("--from", help="Format of IN; none: told by its keys.")] = None,
    take: Annotated[
        str | None, typer.Option(help="Pairs and labels to a plain format: chosen (the good answers) or both.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Write the format's own keys alone.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first wrong entry.")] = False,
    removed: Annotated[
        Path | None, typer.Option(help="JSON lines of what was set aside, with place and reason.")
    ] = None,
) -> None:
    """Convert conversations between formats; every row written reads back as the same conversation.

    Exit code 3: done, but some entries were set aside.
    """
    made = convert_file(source, out, to, source_format=source_format, take=take, plain=plain, strict=strict)
    if removed is not None:
        write_jsonl(removed, ({"where": a.where, "reason": a.reason, "row": a.row} for a in made.set_aside))
    console.print(
        f"[bold]{out}[/bold]  {made.num_written:,} of {made.num_read:,} entries, "
        f"{made.source_format} to {made.target_format}"
    )
    for line in summarize(made.set_aside):
        console.print(f"[yellow]set aside[/yellow] {escape(line)}")
    if made.set_aside:
        raise typer.Exit(3)
