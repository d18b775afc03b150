"""``mw chat``: talk to a model in the terminal."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from modelwright.base.errors import ConfigError
from modelwright.base.progress import console
from modelwright.base.types import SamplingParams
from modelwright.cli.talk import HELP, Talk
from modelwright.engine.llm import LLM
from modelwright.models.hub import fetch
from modelwright.serve.chats import Chats, CountTokens, Kind, Memory, MemoryConfig


def chat(
    model: Annotated[str, typer.Argument(help="Model folder, or a hub id.")],
    system: Annotated[str | None, typer.Option(help="A system message that stands before the conversation.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Probability mass that tokens are drawn from.")] = 0.95,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    seed: Annotated[int | None, typer.Option(help="Makes answers repeatable.")] = None,
    store: Annotated[Path | None, typer.Option(help="SQLite file that keeps conversations; none: forgotten.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="A LoRA adapter, NAME=DIR; repeatable. /adapter NAME answers with it.")
    ] = None,
    memory: Annotated[str, typer.Option(help="What is shown of the past: all, window, tokens or summary.")] = "tokens",
    remember: Annotated[int | None, typer.Option(help="Exchanges (window) or tokens that are shown.")] = None,
) -> None:
    """Talk to MODEL; answers stream in and the conversation is remembered.

    Begins with /help for what can be asked beside questions. Lines piped in are taken as turns.
    """
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    llm = LLM(fetch(model), adapters=read_adapters(adapter or []))
    room = max(1, llm.engine.max_context - max_tokens)
    kind: Kind = memory  # type: ignore[assignment]
    config = MemoryConfig(kind, num_exchanges=remember or 8, max_tokens=min(remember or room, room))
    talk = Talk(llm, Memory(Chats(store), config, _counter(llm), llm), params, system or "")
    if sys.stdin.isatty():
        console.print(f"[dim]{model}; {HELP}[/dim]")
    while (line := _read_turn()) is not None:
        if line == "/quit":
            return
        if line.startswith("/"):
            talk.obey(*line.partition(" ")[::2])
        elif line:
            talk.answer(line)


def read_adapters(given: list[str]) -> dict[str, str]:
    """Return {name: folder} of what was given as NAME=DIR.

    Raises:
        ConfigError: One is written otherwise.
    """
    pairs = [entry.partition("=") for entry in given]
    wrong = next(("".join(pair) for pair in pairs if not (pair[0] and pair[2])), None)
    if wrong is not None:
        raise ConfigError(f"--adapter is {wrong!r}; expected NAME=DIR, such as law=runs/law-lora.")
    return {name: folder for name, _, folder in pairs}


def _counter(llm: LLM) -> CountTokens:
    return lambda messages: len(llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def _read_turn() -> str | None:
    try:
        return input("you> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
