"""``mw quickstart``: the whole life, from a folder of documents to a served specialist that cites its sources."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from modelwright.base.progress import Stopwatch, console
from modelwright.cli.ask import print_answer
from modelwright.cli.server import Plan, start
from modelwright.engine.llm import LLM
from modelwright.ops.life import LifeConfig
from modelwright.ops.quickstart import ask_examples, example_questions, run_quickstart
from modelwright.serve.app import ServeConfig
from modelwright.serve.port import Address, check_port


def quickstart(
    docs: Annotated[
        Path | None,
        typer.Argument(help="Folder or file of .md .txt .html .pdf .docx; left out: Python's own reference pages."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Model folder or hub id to fine-tune and answer with; else one is pre-trained.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Budget of pre-training and fine-tuning together.")] = 4.0,
    out: Annotated[Path, typer.Option(help="Run folder; the same one again goes on where it stopped.")] = Path(
        "runs/quickstart"
    ),
    embedder: Annotated[str | None, typer.Option(help="Sentence encoder; else the installed MiniLM package.")] = None,
    no_serve: Annotated[bool, typer.Option("--no-serve", help="Ask three questions, print the answers, end.")] = False,
    port: Annotated[int, typer.Option(help="Port of the server and the page.")] = 8000,
) -> None:
    """Read documents, prepare them, train, compress, index, evaluate, and serve answers that cite them.

    Every step leaves an artifact below the run folder and is done once: the same command again takes up a killed run
    after its last finished step, and training at its last checkpoint.
    """
    if not no_serve:
        check_port("127.0.0.1", port)
    watch = Stopwatch()
    config = LifeConfig(docs=docs, base=base, minutes=minutes, out=out, embedder=embedder)
    report = run_quickstart(config)
    console.print(
        f"[bold]done[/bold] in {watch.seconds:.0f} s; the steps took {report['total_seconds']:.0f} s. "
        f"Report: {out / 'report.md'}"
    )
    if no_serve:
        _ask(config)
        return
    console.print(f"Answers are {'quoted from the documents' if base is None else 'written by the model'}. Serving:")
    served = ServeConfig(answer_mode="extractive" if base is None else "generated", examples=example_questions(config))
    start(Plan(served, str(out / "chat"), out / "index", "quickstart", embedder), Address(port=port))


def _ask(config: LifeConfig) -> None:
    model = LLM(config.out / "chat") if config.base is not None else None
    for question, answer in ask_examples(config, model):
        console.print(f"\n[bold]{escape(question)}[/bold]")
        print_answer(answer)
    if config.base is None:
        console.print(
            "\n[dim]A model trained for minutes cannot write facts, so the answers are quotes. "
            "--base MODEL lets a real model write them.[/dim]"
        )
