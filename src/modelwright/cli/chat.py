"""``mw chat``: talk to a model in the terminal."""

import sys
from typing import Annotated

import typer

from modelwright.base.errors import RequestError
from modelwright.base.progress import console
from modelwright.base.types import Message, SamplingParams
from modelwright.engine.llm import LLM
from modelwright.models.hub import fetch


def chat(
    model: Annotated[str, typer.Argument(help="Model folder, or a hub id.")],
    system: Annotated[str | None, typer.Option(help="A system message that stands before the conversation.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Probability mass that tokens are drawn from.")] = 0.95,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    seed: Annotated[int | None, typer.Option(help="Makes answers repeatable.")] = None,
) -> None:
    """Talk to MODEL; answers stream in and the conversation is remembered.

    /new forgets the conversation, /quit (or Ctrl-D) ends it. Lines piped in are taken as turns.
    """
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    llm = LLM(fetch(model))
    start = [Message("system", system)] if system else []
    history = list(start)
    if sys.stdin.isatty():
        console.print(f"[dim]{model}; /new forgets, /quit ends[/dim]")
    while (line := _read_turn()) is not None:
        if line == "/quit":
            return
        if line == "/new":
            history = list(start)
            console.print("[dim]forgotten[/dim]")
        elif line:
            history = _answer(llm, [*history, Message("user", line)], params)


def _read_turn() -> str | None:
    try:
        return input("you> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _answer(llm: LLM, history: list[Message], params: SamplingParams) -> list[Message]:
    """Stream the answer and return the conversation with it; a turn that cannot be served is taken back."""
    pieces: list[str] = []
    try:
        for delta in llm.stream(history, params):
            pieces.append(delta.text)
            print(delta.text, end="", flush=True)
    except RequestError as error:
        print(f"error: {error} /new forgets the conversation and makes room.", file=sys.stderr)
        return history[:-1]
    except KeyboardInterrupt:  # stops the answer, not the conversation
        if not sys.stdin.isatty():
            raise
    print()
    return [*history, Message("assistant", "".join(pieces))]
