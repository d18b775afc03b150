"""``mw shards``: the texts of data sets as token ids on disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from modelwright.base.artifact import MANIFEST
from modelwright.base.errors import DataError
from modelwright.base.files import read_jsonl
from modelwright.base.progress import console
from modelwright.data.token_shards import SHARD_TOKENS, PackedRows, TokenShards, write_token_shards
from modelwright.tokenizer.formats import load_tokenizer


def shards(
    sources: Annotated[list[Path], typer.Argument(help="Data sets that mw data made, or JSON lines with text.")],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer of the model that will read them.")],
    out: Annotated[Path, typer.Option(help="Folder of the shards to make.")],
    shard_tokens: Annotated[int, typer.Option(help="A shard is closed when it holds so many.")] = SHARD_TOKENS,
    row_len: Annotated[int | None, typer.Option(help="Say how well documents fit into rows of this length.")] = None,
) -> None:
    """Encode the texts of SOURCES once; training runs and their ranks then read them through memory maps."""
    known = load_tokenizer(tokenizer)
    parents = [path for path in (*sources, tokenizer) if (path / MANIFEST).is_file()]
    write_token_shards(_texts(sources), known, out, shard_tokens=shard_tokens, parents=parents)
    made = TokenShards(out, known)
    console.print(f"[bold]{out}[/bold]  {made.num_tokens:,} tokens of {made.num_documents:,} documents")
    if row_len is not None:
        packed = PackedRows(made, row_len)
        console.print(
            f"  in rows of {row_len}: {len(packed):,} rows, {packed.used_fraction:.1%} of them used, "
            f"{packed.num_pieces - packed.num_documents:,} cuts through documents"
        )


def _texts(sources: list[Path]) -> Iterator[str]:
    for source in sources:
        file = source / "train.jsonl" if source.is_dir() else source
        for number, row in enumerate(read_jsonl(file), start=1):
            if not isinstance(row.get("text"), str):
                raise DataError(f"{file}, entry {number}: text is {row.get('text')!r:.60}; expected a text.")
            yield row["text"]
