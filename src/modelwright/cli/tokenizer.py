"""``mw tokenizer``: train byte-level BPE on prepared data."""

from pathlib import Path
from typing import Annotated

import typer

from modelwright.base.progress import console
from modelwright.ops.make import make_tokenizer


def tokenizer(
    data: Annotated[Path, typer.Argument(help="A data set that mw data made.")],
    out: Annotated[Path, typer.Option(help="Folder of the tokenizer to make.")],
    vocab_size: Annotated[int, typer.Option(help="Pieces in all: the 256 bytes and 3 special tokens included.")] = 4096,
) -> None:
    """Train byte-level BPE on the training part of DATA and measure it on the held-out part."""
    figures = make_tokenizer(data, out, vocab_size)
    console.print(
        f"[bold]{out}[/bold]  {figures['vocab_size']:,} tokens, {figures['bytes_per_token']:.2f} bytes a token "
        f"on {figures['measured_on']} text (raw bytes: 1.00)"
    )
