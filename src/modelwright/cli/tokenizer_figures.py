"""``mw tokenizer compare`` and ``mw tokenizer audit``: figures of tokenizers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from modelwright.base.errors import ConfigError
from modelwright.base.progress import console
from modelwright.evaluate.glitch import find_glitches
from modelwright.evaluate.repeat import check_repeats
from modelwright.models.weights import load_model
from modelwright.ops.fixed_compute import ComputeConfig
from modelwright.ops.make import read_texts
from modelwright.ops.texts import stream_texts
from modelwright.ops.tokenizers import compare_tokenizers, name_tokenizers, plot_comparison
from modelwright.tokenizer.compare import audit as look_at
from modelwright.tokenizer.formats import load_tokenizer

_SHOWN_IDS = 12
AsJson = Annotated[bool, typer.Option("--json", help="Print figures as JSON.")]


def compare(
    tokenizers: Annotated[list[Path], typer.Argument(help="Tokenizers: folders, tokenizer.json, GGUF, .model, ...")],
    on: Annotated[list[str], typer.Option(help="Texts to cut: [NAME=]PATH, such as de=german.txt; may be repeated.")],
    train_on: Annotated[
        list[Path] | None, typer.Option(help="Texts that small models learn, for bits per byte.")
    ] = None,
    flops: Annotated[float, typer.Option(help="FLOPs of each small model's training.")] = 1e12,
    plot: Annotated[Path | None, typer.Option(help="PNG to draw the figures into.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show bytes per token, fertility (tokens per word between spaces) and bits per byte of each on each text."""
    named = [entry.partition("=") if "=" in entry else (Path(entry).name, "", entry) for entry in on]
    rows = compare_tokenizers(
        name_tokenizers(tokenizers),
        {name: read_texts(Path(path)) for name, _, path in named},
        training=list(stream_texts(train_on)) if train_on else (),
        compute=ComputeConfig(flops=flops),
    )
    if plot is not None:
        plot_comparison(rows, plot)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("tokenizer", "tokens known", "on", "tokens", "bytes per token", "fertility", "bits per byte")
    for row in rows:
        figures = (f"{row['num_tokens']:,}", f"{row['bytes_per_token']:.2f}", f"{row['fertility']:.2f}")
        bits = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.3f}"
        table.add_row(row["tokenizer"], f"{row['vocab_size']:,}", row["on"], *figures, bits)
    console.print(table)
    if plot is not None:
        console.print(f"drawn: {plot}")


def audit(
    path: Annotated[Path, typer.Argument(help="A tokenizer, or a model folder with one.", metavar="TOKENIZER")],
    model: Annotated[Path | None, typer.Option(help="Model folder in which to look for glitch tokens.")] = None,
    ask: Annotated[
        str, typer.Option(help="Have the model repeat tokens: found (glitch tokens), all (of the vocabulary), none.")
    ] = "found",
    as_json: AsJson = False,
) -> None:
    """Find tokens that no text gives, that are no characters, that say the same, or that a model never learned."""
    if ask not in ("found", "all", "none"):
        raise ConfigError(f"--ask is {ask!r}; known: found, all, none.")
    one = load_tokenizer(path)
    found = look_at(one)
    loaded = None if model is None else load_model(model)
    glitches = None if loaded is None else find_glitches(loaded, one, known=found)
    asked = None if ask == "all" else glitches.found if glitches and ask == "found" else []
    repeats = check_repeats(loaded, one, asked) if loaded is not None and asked != [] else None
    if as_json:
        told = {"glitches": glitches, "repeats": repeats}
        print(json.dumps(asdict(found) | {name: asdict(some) for name, some in told.items() if some}, indent=2))
        return
    console.print(f"[bold]{path}[/bold]  {found.vocab_size:,} tokens")
    doubled = [index for group in found.duplicates for index in group]
    named = {"unreachable": found.unreachable, "no UTF-8": found.invalid_utf8, "duplicates": doubled}
    if glitches is not None:
        named["glitch tokens"] = glitches.found
    if repeats is not None and repeats.failed is not None:
        named["cannot be repeated"] = repeats.failed
    for name, ids in named.items():
        shown = ", ".join(f"{index} {one.token_bytes(index)!r}" for index in ids[:_SHOWN_IDS])
        console.print(f"{name}: {len(ids):,}  {shown}", markup=False)
    if glitches is not None and glitches.line is None:
        console.print(
            f"  the rows of tokens that are unused for certain do not agree ({glitches.agreement:.2f}), so the model "
            "shows no sign of glitch tokens: it is untrained, or all its tokens were trained"
        )
    if repeats is not None and repeats.failed is None:
        console.print(
            f"  the model does not repeat ordinary tokens either (probability {repeats.copied:.4f}), so asking it for "
            "single ones tells nothing"
        )
