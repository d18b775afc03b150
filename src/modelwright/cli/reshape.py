"""``mw reshape``: fewer key/value heads, more layers or more tokens, and what that cost."""

from pathlib import Path
from typing import Annotated

import typer

from modelwright.base.errors import DataError
from modelwright.base.progress import console, human_count
from modelwright.ops.reshape import reshape_model


def reshape(
    model: Annotated[Path, typer.Argument(help="Model folder with its tokenizer.")],
    out: Annotated[Path, typer.Argument(help="Folder of the changed model to make.")],
    kv_heads: Annotated[int | None, typer.Option(help="Key/value heads to share; 1: multi-query.")] = None,
    depth: Annotated[int | None, typer.Option(help="Layers to grow to.")] = None,
    way: Annotated[str, typer.Option(help="Of growing: silent (the same function) or stack (two copies).")] = "silent",
    add_tokens: Annotated[Path | None, typer.Option(help="Text file of new tokens, one a line.")] = None,
    data: Annotated[Path | None, typer.Option(help="Data set on whose held-out part the cost is measured.")] = None,
) -> None:
    """Change the shape of a trained MODEL; recipes/pretrain/uptrain.yaml trains it on."""
    tokens: list[str] = []
    if add_tokens is not None:
        try:
            tokens = [line for line in add_tokens.read_text(encoding="utf-8").splitlines() if line]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{add_tokens} cannot be read: {error}. Give a text file with one token a line.") from error
    cost = reshape_model(model, out, num_kv_heads=kv_heads, num_layers=depth, way=way, tokens=tokens, data=data)
    console.print(
        f"[bold]{out}[/bold]  {human_count(cost['parameters_before'])} -> {human_count(cost['parameters_after'])} "
        f"parameters, {cost['cache_before']:,} -> {cost['cache_after']:,} numbers a token in the cache"
    )
    if data is None:
        console.print("  what it cost was not measured; give --data to know")
        return
    console.print(
        f"  largest difference of a logit {cost['max_logit_difference']:.4g}, held-out perplexity "
        f"{cost['perplexity_before']:.3f} -> {cost['perplexity_after']:.3f}"
    )
