"""``mw ask``: one question, one answer with numbered citations."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from modelwright.base.progress import console
from modelwright.engine.llm import LLM
from modelwright.models.hub import fetch
from modelwright.rag.answer import Answer
from modelwright.rag.answer import ask as answer_question
from modelwright.rag.index import Index


def ask(
    index: Annotated[Path, typer.Argument(help="The folder of an index.")],
    question: Annotated[str, typer.Argument(help="The question, in quotes.")],
    model: Annotated[str | None, typer.Option(help="Model folder that writes the answer; else it is quoted.")] = None,
    k: Annotated[int, typer.Option(min=1, max=100, help="Passages that the answer may draw on.")] = 5,
    embedder: Annotated[str | None, typer.Option(help="Sentence encoder, where the index's own has moved.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Answer QUESTION from INDEX and cite every passage that was used."""
    opened = Index.open(index, embedder=embedder)
    answer = answer_question(opened, question, model=LLM(fetch(model)) if model else None, k=k)
    if as_json:
        print(json.dumps(asdict(answer), indent=2, ensure_ascii=False))
    else:
        print_answer(answer)


def print_answer(answer: Answer) -> None:
    """Print an answer with its citations: number, document, span and quote."""
    console.print(escape(answer.text), soft_wrap=True)
    for citation in answer.citations:
        place = f"{citation.doc}, characters {citation.start} to {citation.end}"
        console.print(f"\n[bold]{escape(f'[{citation.number}]')}[/bold] {escape(place)}", soft_wrap=True)
        console.print(f"[dim]{escape(citation.quote)}[/dim]", soft_wrap=True)
    if answer.mode == "extractive" and answer.citations:
        console.print("\n[dim]quoted from the documents, not written by a model[/dim]")
    if answer.mode == "generated" and not answer.is_supported:
        console.print("\n[yellow]written by the model; no passage of the documents was cited for it[/yellow]")
