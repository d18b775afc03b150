"""``mw quantize``: make a model smaller, and say what it lost."""

from pathlib import Path
from typing import Annotated

import typer

from modelwright.base.progress import console, human_bytes
from modelwright.ops.make import make_quantized


def quantize(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    out: Annotated[Path, typer.Option(help="Folder of the quantized model to make.")],
    bits: Annotated[int, typer.Option(help="8, 4 or 2 bits a weight.")] = 8,
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale; else a whole row at 8 bits, 32 below.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Data set on whose held-out part the loss is measured.")] = None,
) -> None:
    """Quantize the weights of MODEL by rounding to nearest; activations stay as they are."""
    figures = make_quantized(model, out, bits, group_size, data)
    sizes = f"{human_bytes(figures['original_size_bytes'])} -> {human_bytes(figures['size_bytes'])}"
    console.print(f"[bold]{out}[/bold]  {bits} bits a weight, {sizes}")
    if data is None:
        console.print("  what it lost was not measured; give --data to know")
        return
    console.print(
        f"  held-out perplexity x {figures['perplexity_ratio']:.4f}, "
        f"KL divergence {figures['kl_divergence']:.5f} nats a token, "
        f"same likeliest token {figures['top1_agreement']:.1%}"
    )
