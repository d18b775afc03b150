"""``mw index``: make documents searchable."""

from pathlib import Path
from typing import Annotated

import typer

from modelwright.base.config import load
from modelwright.base.progress import Stopwatch, console
from modelwright.rag.index import Index, IndexConfig


def index(
    context: typer.Context,
    docs: Annotated[
        Path, typer.Argument(help="A folder or file of .md .txt .html .pdf .docx, or a documents artifact.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the index to make.")],
    embedder: Annotated[str | None, typer.Option(help="Sentence encoder: a folder or hub id; else MiniLM.")] = None,
) -> None:
    """Index the documents in DOCS: BM25 and sentence vectors side by side.

    Takes the settings of an index as --section.field=value, for example --chunk.max_chars=800 or --has_vectors=false.
    """
    config = load(IndexConfig, None, context.args)
    watch = Stopwatch()
    made = Index.build(docs, out, embedder=embedder, config=config)
    parts = "BM25 and vectors" if made.has_vectors else "BM25 alone"
    console.print(
        f"[bold]{out}[/bold]  {len(made.documents):,} documents, {len(made.chunks):,} passages, {parts}, "
        f"{watch.seconds:.1f} s"
    )
    for failure in made.failures:
        console.print(f"  [yellow]not read[/yellow] {failure.path}: {failure.reason}", markup=True)
