"""``mw shards``: the texts of data sets as token ids on disk."""

from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from modelwright.base.artifact import MANIFEST
from modelwright.base.progress import console
from modelwright.cli.data_run import Strict, end_with_asides, note_aside
from modelwright.data.blend import read_difficulties
from modelwright.data.shards import read_texts
from modelwright.data.token_shards import SHARD_TOKENS, PackedRows, TokenShards, write_token_shards
from modelwright.tokenizer.formats import load_tokenizer


def shards(
    sources: Annotated[list[Path], typer.Argument(help="Data sets that mw data made, or JSON lines with text.")],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer of the model that will read them.")],
    out: Annotated[Path, typer.Option(help="Folder of the shards to make.")],
    shard_tokens: Annotated[int, typer.Option(help="A shard is closed when it holds so many.")] = SHARD_TOKENS,
    difficulty: Annotated[str | None, typer.Option(help="Keep this number of each document, for a curriculum.")] = None,
    row_len: Annotated[int | None, typer.Option(help="Say how well documents fit into rows of this length.")] = None,
    strict: Strict = False,
) -> None:
    """Encode the texts of SOURCES once; training runs and their ranks then read them through memory maps."""
    known = load_tokenizer(tokenizer)
    parents = [path for path in (*sources, tokenizer) if (path / MANIFEST).is_file()]
    asides: list[dict[str, str]] = []
    must_fit = strict or difficulty is not None  # numbers of documents go by their order: none may be missing
    set_aside = None if must_fit else partial(note_aside, asides, "shards")
    texts = chain.from_iterable(read_texts(source, set_aside=set_aside) for source in sources)
    numbers = None if difficulty is None else chain.from_iterable(read_difficulties(s, difficulty) for s in sources)
    write_token_shards(texts, known, out, shard_tokens=shard_tokens, parents=parents, difficulties=numbers)
    made = TokenShards(out, known)
    console.print(f"[bold]{out}[/bold]  {made.num_tokens:,} tokens of {made.num_documents:,} documents")
    if row_len is not None:
        packed = PackedRows(made, row_len)
        console.print(
            f"  in rows of {row_len}: {len(packed):,} rows, {packed.used_fraction:.1%} of them used, "
            f"{packed.num_pieces - packed.num_documents:,} cuts through documents"
        )
    end_with_asides(asides, out.with_name(out.name + ".aside.jsonl"))
