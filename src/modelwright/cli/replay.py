"""``mw replay``: compute the requests of a trace again and see that the same tokens come out."""

from pathlib import Path
from typing import Annotated

import typer

from modelwright.base.config import build
from modelwright.base.progress import console
from modelwright.cli.server import named_folder
from modelwright.engine.engine import EngineConfig
from modelwright.engine.llm import LLM
from modelwright.models.hub import fetch
from modelwright.serve.trace import engine_settings
from modelwright.serve.trace import replay as replay_trace

MAX_SHOWN = 20


def replay(
    trace: Annotated[Path, typer.Argument(help="What mw serve --trace FILE wrote.")],
    model: Annotated[str, typer.Argument(help="The folder or hub id that was served.")],
    adapters: Annotated[
        list[str] | None, typer.Option(help="LoRA adapters that were served: NAME=DIR NAME=DIR ...")
    ] = None,
) -> None:
    """Compute every completion of TRACE again, with MODEL and the engine's settings of then, and compare the tokens.

    Ends with 1 when a completion differs, and says at which token. An adapter is known by its content: the name may be
    another than it was.
    """
    named = dict(named_folder(text) for text in adapters or ())
    llm = LLM(fetch(model), config=build(EngineConfig, engine_settings(trace)), adapters=named)
    found = replay_trace(trace, llm)
    for one in found.differences[:MAX_SHOWN]:
        console.print(f"[red]line {one.line}[/red]: token {one.at} was {one.was}, now {one.is_now}")
    if found.num_skipped:
        console.print(
            f"[yellow]{found.num_skipped:,} left out: of other weights or adapters, or with pictures[/yellow]"
        )
    same = found.num_completions - len(found.differences)
    console.print(f"{same:,} of {found.num_completions:,} completions are the same, {found.num_tokens:,} tokens")
    if found.differences or not found.num_completions:
        raise typer.Exit(1)
