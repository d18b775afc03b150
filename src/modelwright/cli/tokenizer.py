"""``mw tokenizer``: train a tokenizer, compare several on the same texts, audit one."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from modelwright.base.progress import console
from modelwright.base.registry import lookup
from modelwright.cli.data_run import Strict, end_with_asides, note_aside
from modelwright.cli.tokenizer_figures import audit, compare
from modelwright.cli.transplant import transplant
from modelwright.ops.make import make_tokenizer

_PAGE = {"page": "modelwright.cli.tokenizer_page:show_page"}  # imported when asked for: the server is an extra

tokenizer = typer.Typer(help="Train a tokenizer, compare several on the same texts, audit one.", no_args_is_help=True)
tokenizer.command()(transplant)


@tokenizer.command()
def train(
    sources: Annotated[list[Path], typer.Argument(help="Data sets that mw data made, files or folders of documents.")],
    out: Annotated[Path, typer.Option(help="Folder of the tokenizer to make.")],
    vocab_size: Annotated[int, typer.Option(help="Pieces in all, bytes and special tokens included.")] = 4096,
    algorithm: Annotated[str, typer.Option(help="bpe (byte-level), unigram or wordpiece (as BERT's).")] = "bpe",
    strict: Strict = False,
) -> None:
    """Train on SOURCES; a data set's held-out part is what it is measured on."""
    asides: list[dict[str, str]] = []
    set_aside = None if strict else partial(note_aside, asides, "tokenizer")
    figures = make_tokenizer(sources, out, vocab_size, algorithm, set_aside)
    console.print(
        f"[bold]{out}[/bold]  {figures['vocab_size']:,} tokens, {figures['bytes_per_token']:.2f} bytes a token "
        f"on {figures['measured_on']} text (raw bytes: 1.00)"
    )
    end_with_asides(asides, out.with_name(out.name + ".aside.jsonl"))


tokenizer.command()(compare)
tokenizer.command()(audit)


@tokenizer.command()
def page(
    tokenizers: Annotated[list[Path], typer.Argument(help="Tokenizers: folders, tokenizer.json, GGUF, .model, ...")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
) -> None:
    """Serve a web page that shows how TOKENIZERS split what is typed, side by side."""
    lookup(_PAGE, "page", "page")(tokenizers, host, port)
