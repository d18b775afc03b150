"""``mw tokenizer transplant``: another tokenizer for a trained model."""

from pathlib import Path
from typing import Annotated

import typer

from modelwright.base.progress import console
from modelwright.ops.transplant import transplant_model


def transplant(
    model: Annotated[Path, typer.Argument(help="Model folder with its tokenizer.")],
    to: Annotated[Path, typer.Option(help="The other tokenizer: a folder, tokenizer.json, GGUF, .model, ...")],
    out: Annotated[Path, typer.Option(help="Folder of the model to make.")],
    way: Annotated[str, typer.Option(help="How new tokens begin: adapt, pieces, mean or random.")] = "adapt",
    data: Annotated[
        Path | None, typer.Option(help="Texts on which bits per byte are measured, before and after.")
    ] = None,
) -> None:
    """Give MODEL another tokenizer; recipes/pretrain/uptrain.yaml trains it on."""
    figures = transplant_model(model, to, out, way=way, data=data)
    console.print(
        f"[bold]{out}[/bold]  {figures['vocab_size_before']:,} -> {figures['vocab_size_after']:,} tokens: "
        f"{figures['num_shared']:,} keep their rows, {figures['num_composed']:,} are made of old ones, "
        f"{figures['num_strange']:,} begin near the mean"
    )
    if data is None:
        console.print("  what it cost was not measured; give --data to know")
        return
    console.print(
        f"  bits per byte {figures['bits_per_byte_before']:.3f} -> {figures['bits_per_byte_after']:.3f}; train on to "
        "win it back"
    )
