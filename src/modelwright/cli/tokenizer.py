"""``mw tokenizer``: train a tokenizer, compare several on the same texts, audit one."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from modelwright.base.progress import console
from modelwright.cli.transplant import transplant
from modelwright.evaluate.glitch import find_glitches
from modelwright.models.weights import load_model
from modelwright.ops.make import make_tokenizer, read_texts
from modelwright.tokenizer.compare import audit as look_at
from modelwright.tokenizer.compare import measure
from modelwright.tokenizer.formats import load_tokenizer

_SHOWN_IDS = 12
AsJson = Annotated[bool, typer.Option("--json", help="Print figures as JSON.")]

tokenizer = typer.Typer(help="Train a tokenizer, compare several on the same texts, audit one.", no_args_is_help=True)
tokenizer.command()(transplant)


@tokenizer.command()
def train(
    sources: Annotated[list[Path], typer.Argument(help="Data sets that mw data made, files or folders of documents.")],
    out: Annotated[Path, typer.Option(help="Folder of the tokenizer to make.")],
    vocab_size: Annotated[int, typer.Option(help="Pieces in all, bytes and special tokens included.")] = 4096,
    algorithm: Annotated[str, typer.Option(help="bpe (byte-level), unigram or wordpiece (as BERT's).")] = "bpe",
) -> None:
    """Train on SOURCES; a data set's held-out part is what it is measured on."""
    figures = make_tokenizer(sources, out, vocab_size, algorithm)
    console.print(
        f"[bold]{out}[/bold]  {figures['vocab_size']:,} tokens, {figures['bytes_per_token']:.2f} bytes a token "
        f"on {figures['measured_on']} text (raw bytes: 1.00)"
    )


@tokenizer.command()
def compare(
    tokenizers: Annotated[list[Path], typer.Argument(help="Tokenizers: folders, tokenizer.json, GGUF, .model, ...")],
    on: Annotated[list[Path], typer.Option(help="Texts to cut: a file, folder or data set; may be given again.")],
    as_json: AsJson = False,
) -> None:
    """Show bytes per token and fertility (tokens per word between spaces) of each tokenizer on each text."""
    texts = {str(path): read_texts(path) for path in on}
    loaded = {str(path): load_tokenizer(path) for path in tokenizers}
    rows = [
        {"tokenizer": name, "vocab_size": one.vocab_size, "on": file, **asdict(measure(one, cut))}
        for name, one in loaded.items()
        for file, cut in texts.items()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("tokenizer", "tokens known", "on", "tokens", "bytes per token", "fertility")
    for row in rows:
        figures = (f"{row['num_tokens']:,}", f"{row['bytes_per_token']:.2f}", f"{row['fertility']:.2f}")
        table.add_row(row["tokenizer"], f"{row['vocab_size']:,}", row["on"], *figures)
    console.print(table)


@tokenizer.command()
def audit(
    path: Annotated[Path, typer.Argument(help="A tokenizer, or a model folder with one.", metavar="TOKENIZER")],
    model: Annotated[Path | None, typer.Option(help="Model folder in which to look for glitch tokens.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find tokens that no text gives, that are no characters, that say the same, or that a model never learned."""
    one = load_tokenizer(path)
    found = look_at(one)
    glitches = None if model is None else find_glitches(load_model(model), one, known=found)
    if as_json:
        print(json.dumps(asdict(found) | ({"glitches": asdict(glitches)} if glitches else {}), indent=2))
        return
    console.print(f"[bold]{path}[/bold]  {found.vocab_size:,} tokens")
    doubled = [index for group in found.duplicates for index in group]
    named = {"unreachable": found.unreachable, "no UTF-8": found.invalid_utf8, "duplicates": doubled}
    if glitches is not None:
        named["glitch tokens"] = glitches.found
    for name, ids in named.items():
        shown = ", ".join(f"{index} {one.token_bytes(index)!r}" for index in ids[:_SHOWN_IDS])
        console.print(f"{name}: {len(ids):,}  {shown}", markup=False)
    if glitches is not None and glitches.line is None:
        console.print(
            f"  the rows of tokens that are unused for certain do not agree ({glitches.agreement:.2f}), so the model "
            "shows no sign of glitch tokens: it is untrained, or all its tokens were trained"
        )
