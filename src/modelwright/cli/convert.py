"""``mw convert``: write a model in another format of the ecosystem."""

from pathlib import Path
from typing import Annotated

import typer

from modelwright.base.progress import console, human_bytes, human_count
from modelwright.ops import convert as conversion


def convert(
    source: Annotated[Path, typer.Argument(help="A model's folder, a GGUF file, or a llama2.c checkpoint (.bin).")],
    out: Annotated[Path, typer.Argument(help="Folder to make; for GGUF, a file that ends with .gguf will do.")],
    to: Annotated[str, typer.Option(help="hf (a folder that transformers loads) or gguf.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="f32, f16 or bf16; for GGUF also q8_0, q6_k, q5_k, q4_k, q4_0, q4_1. Else the source's."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The tokenizer's folder or file; else the one in or beside the source.")
    ] = None,
) -> None:
    """Write SOURCE as OUT in another format; its tokenizer comes along."""
    made = conversion.convert(source, out, to, dtype, tokenizer)
    words = f"a tokenizer of {made.vocab_size:,} tokens" if made.vocab_size else "no tokenizer"
    sizes = f"{human_bytes(made.original_size_bytes)} -> {human_bytes(made.size_bytes)}"
    count = human_count(made.num_parameters)
    console.print(
        f"[bold]{made.path}[/bold]  {made.architecture}, {count} parameters in {made.dtype}, {words}, {sizes}"
    )
