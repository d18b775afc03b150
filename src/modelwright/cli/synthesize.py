"""``mw synthesize``: training data written by a model, within a budget."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from modelwright.base.artifact import MANIFEST
from modelwright.base.config import load
from modelwright.base.errors import ConfigError
from modelwright.base.progress import console
from modelwright.data.conversation import Conversation
from modelwright.data.convert import detect_format, read_conversation, read_items
from modelwright.data.generate import JOURNAL, Asker, GenerateConfig, Method, save_generated
from modelwright.data.instruct import ask_about, evolve, prefer, run_method, self_instruct, talk_about, task_of
from modelwright.data.read import load_documents
from modelwright.engine.llm import LLM
from modelwright.models.hub import fetch

METHODS = ("self-instruct", "evolve", "questions", "talks", "preferences")


def synthesize(
    context: typer.Context,
    method: Annotated[str, typer.Argument(help=f"{', '.join(METHODS)}.")],
    model: Annotated[str, typer.Option(help="Model folder with a chat template, or a hub id.")],
    out: Annotated[Path, typer.Option(help="Data set to make.")],
    seeds: Annotated[Path | None, typer.Option(help="Conversations to begin with, in any known format.")] = None,
    documents: Annotated[Path | None, typer.Option(help="Folder of documents as mw read them, for questions.")] = None,
    topics: Annotated[str | None, typer.Option(help="What talks are about, parted by commas.")] = None,
) -> None:
    """Let MODEL write training data: new tasks, harder tasks, questions about documents, talks, preference pairs.

    Takes the settings of generation as --field=value, for example --num=200 --max_requests=500 --min_score=4. Started
    again after a kill or a spent budget, it goes on from the answers it has.
    """
    config = load(GenerateConfig, None, context.args)
    known = _read_seeds(seeds) if seeds is not None else []
    ways: dict[str, Callable[[], Method]] = {
        "self-instruct": lambda: self_instruct(known, config),
        "evolve": lambda: evolve(known, config),
        "questions": lambda: ask_about(load_documents(documents) if documents else [], config),
        "talks": lambda: talk_about([topic.strip() for topic in (topics or "").split(",") if topic.strip()], config),
        "preferences": lambda: prefer(known, config),
    }
    if method not in ways:
        raise ConfigError(f"method is {method!r}; known: {', '.join(METHODS)}.")
    chosen = ways[method]()
    work = out.with_name(out.name + ".run")
    asker = Asker(LLM(fetch(model)), config, work / JOURNAL)
    try:
        made = run_method(chosen, asker, config, [] if method == "preferences" else [task_of(seed) for seed in known])
    finally:
        asker.close()
    parents = [path for path in (Path(model), documents) if path is not None and (path / MANIFEST).is_file()]
    save_generated(made, out, config, made_by=model, parents=parents)
    spent = made.spent
    console.print(
        f"[bold]{out}[/bold]  {len(made.kept):,} kept, {len(made.refused):,} refused; {spent.requests:,} requests "
        f"({spent.replayed:,} from the journal), {spent.tokens:,} tokens; ended: {made.ended}"
    )
    for reason, count in made.reasons().items():
        console.print(f"  {count:>6,}  {escape(reason)}")
    if made.ended == "enough":
        shutil.rmtree(work, ignore_errors=True)


def _read_seeds(file: Path) -> list[Conversation]:
    found = []
    for item in read_items(file):
        if item.row is None:
            raise ConfigError(f"{item.where}: {item.reason}. Mend or remove it.")
        found.append(read_conversation(item.row, detect_format(item.row, item.where), item.where))
    return found
