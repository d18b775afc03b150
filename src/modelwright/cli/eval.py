"""``mw eval``: measure a model or an index."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from modelwright.base.artifact import MANIFEST, read_manifest
from modelwright.base.errors import ConfigError
from modelwright.base.progress import console
from modelwright.ops.make import score_model
from modelwright.ops.retrieval import score_index

MAX_SHOWN = 10


def evaluate(
    path: Annotated[Path, typer.Argument(help="Model folder, or an index.")],
    data: Annotated[Path | None, typer.Option(help="Data set whose held-out part is measured on.")] = None,
    num_questions: Annotated[int, typer.Option(min=1, help="Questions asked of an index.")] = 300,
    embedder: Annotated[str | None, typer.Option(help="Sentence encoder, where the index's own has moved.")] = None,
    check_contamination: Annotated[
        bool, typer.Option("--check-contamination", help="Look for the held-out part in the training part of --data.")
    ] = False,
    trained_on: Annotated[
        list[Path] | None, typer.Option(help="Look in this data set or file too; may repeat.")
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="Index to look with, shared with mw data's step decontaminate; made if missing.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure PATH: bits per byte of a model beside unigram and 5-gram models; recall and MRR of an index."""
    is_index = (path / MANIFEST).is_file() and read_manifest(path).kind == "index"
    if (trained_on or index) and not check_contamination:
        raise ConfigError("--trained-on and --index say how to look for contamination. Add --check-contamination.")
    if check_contamination and is_index:
        raise ConfigError(f"{path} is an index, which was not trained. Leave --check-contamination out.")
    if is_index:
        figures = score_index(path, data=data, num_questions=num_questions, embedder=embedder)
    elif data is None:
        raise ConfigError(f"{path} is not an index, and a model is measured on text. Give a data set with --data.")
    else:
        figures = score_model(path, data, trained_on=(trained_on or []) if check_contamination else None, index=index)
    if as_json:
        print(json.dumps(figures, indent=2))
    elif is_index:
        _print_retrieval(figures)
    else:
        _print_model(figures)


def _print_model(figures: dict[str, Any]) -> None:
    table = Table("model", "bits per byte", box=None, pad_edge=False)
    rows = [("this model", figures["bits_per_byte"])]
    rows += [(name, figures[f"{key}_bits_per_byte"]) for name, key in (("unigram", "unigram"), ("5-gram", "ngram5"))]
    for name, value in sorted(rows, key=lambda row: row[1]):
        table.add_row(name, f"{value:.4f}")
    console.print(table)
    console.print(f"perplexity a token {figures['perplexity']:.3f} over {figures['num_tokens']:,} held-out tokens")
    if "contamination" in figures:
        _print_contamination(figures["contamination"])
    if figures["bits_per_byte"] >= figures["ngram5_bits_per_byte"]:
        console.print("[yellow]the model does not beat the 5-gram model of the same text[/yellow]")


def _print_contamination(found: dict[str, Any]) -> None:
    clean = found["bits_per_byte_of_unseen"]
    console.print(
        f"{found['num_items_seen']:,} of {found['num_items']:,} held-out documents were seen in training by half of "
        f"their words or more ({found['num_items_too_short']:,} are too short to tell); "
        + ("none is left" if clean is None else f"the others: {clean:.4f} bits per byte")
    )
    for row in found["items"][:MAX_SHOWN]:
        console.print(f"  {row['covered_fraction']:.0%} of {escape(row['item'])} stands in {escape(row['document'])}")


def _print_retrieval(figures: dict[str, Any]) -> None:
    table = Table("search", "recall@1", "recall@5", "recall@10", "MRR", "questions", box=None, pad_edge=False)
    for mode, scores in figures["retrieval"].items():
        values = (f"{scores[name]:.3f}" for name in ("recall_at_1", "recall_at_5", "recall_at_10", "mrr"))
        table.add_row(mode, *values, f"{scores['num_questions']:,}")
    console.print(table)
    cited = figures["citations"]
    console.print(f"{cited['exact']:,} of {cited['checked']:,} citations equal the text they point at")
