"""``mw chat``: talk to a model in the terminal."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from modelwright.base.errors import RequestError
from modelwright.base.progress import console
from modelwright.base.types import ChatModel, Message, SamplingParams
from modelwright.engine.llm import LLM
from modelwright.models.hub import fetch
from modelwright.serve.chats import Chat, Chats, CountTokens, Kind, Memory, MemoryConfig

HELP = (
    "/new begins anew, /list shows what is kept, /open N goes on with one, /system TEXT begins anew with it, /quit ends"
)


def chat(
    model: Annotated[str, typer.Argument(help="Model folder, or a hub id.")],
    system: Annotated[str | None, typer.Option(help="A system message that stands before the conversation.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Probability mass that tokens are drawn from.")] = 0.95,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    seed: Annotated[int | None, typer.Option(help="Makes answers repeatable.")] = None,
    store: Annotated[Path | None, typer.Option(help="SQLite file that keeps conversations; none: forgotten.")] = None,
    memory: Annotated[str, typer.Option(help="What is shown of the past: all, window, tokens or summary.")] = "tokens",
    remember: Annotated[int | None, typer.Option(help="Exchanges (window) or tokens that are shown.")] = None,
) -> None:
    """Talk to MODEL; answers stream in and the conversation is remembered.

    Begins with /help for what can be asked beside questions. Lines piped in are taken as turns.
    """
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    llm = LLM(fetch(model))
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


def _counter(llm: LLM) -> CountTokens:
    return lambda messages: len(llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def _read_turn() -> str | None:
    try:
        return input("you> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


class Talk:
    """One conversation at a time."""

    def __init__(self, model: ChatModel, memory: Memory, params: SamplingParams, system: str):
        self.model, self.memory, self.params = model, memory, params
        self.chat: Chat = memory.chats.new(system)

    def obey(self, command: str, rest: str) -> None:
        """Do what a line that begins with a slash asks for."""
        chats = self.memory.chats
        if command in ("/new", "/system"):
            self.chat = chats.new(rest.strip() if command == "/system" else self.chat.system)
            console.print("[dim]forgotten[/dim]" if command == "/new" else "[dim]begun anew[/dim]")
        elif command == "/list":
            for one in reversed([c for c in chats.all() if c.num_turns]):
                console.print(f"{one.id:>4}  {one.title}  ({one.num_turns // 2} exchanges)", markup=False)
        elif command == "/open" and rest.strip().isdecimal():
            try:
                self.chat = chats.find(int(rest))
            except RequestError as error:
                print(f"error: {error} /list shows what there is.", file=sys.stderr)
                return
            for turn in chats.turns(self.chat.id):
                console.print(f"{'you' if turn.role == 'user' else 'model'}> {turn.content}", markup=False, style="dim")
        else:
            console.print(f"[dim]{HELP}[/dim]")

    def answer(self, question: str) -> None:
        """Stream the answer and keep the exchange; a question that cannot be served is not kept."""
        pieces: list[str] = []
        try:
            shown = self.memory.recall(self.chat, question)
            for delta in self.model.stream(shown, self.params):
                pieces.append(delta.text)
                print(delta.text, end="", flush=True)
        except RequestError as error:
            print(f"error: {error} /new forgets the conversation and makes room.", file=sys.stderr)
            return
        except KeyboardInterrupt:  # stops the answer, not the conversation
            if not sys.stdin.isatty():
                raise
        print()
        self.memory.chats.add(self.chat.id, [Message("user", question), Message("assistant", "".join(pieces))])
