"""A talk in the terminal: questions answered as they stream, and what a line that begins with a slash asks for."""

import sys

from rich.markup import escape

from modelwright.base.errors import RequestError
from modelwright.base.progress import console
from modelwright.base.types import Message, SamplingParams
from modelwright.engine.llm import LLM
from modelwright.serve.chats import Chat, Memory

HELP = (
    "/new begins anew, /list shows what is kept, /open N goes on with one, /system TEXT begins anew with it, "
    "/adapter NAME answers with an adapter (without a name: with the model itself), /quit ends"
)


class Talk:
    """One conversation at a time."""

    def __init__(self, model: LLM, memory: Memory, params: SamplingParams, system: str):
        self.model, self.memory, self.params = model, memory, params
        self.adapter: str | None = None
        self.chat: Chat = memory.chats.new(system)

    def obey(self, command: str, rest: str) -> None:
        """Do what a line that begins with a slash asks for."""
        chats = self.memory.chats
        if command in ("/new", "/system"):
            self.chat = chats.new(rest.strip() if command == "/system" else self.chat.system)
            console.print("[dim]begun anew[/dim]")
        elif command == "/adapter":
            name, there = rest.strip() or None, self.model.engine.adapters.names
            if name is not None and name not in there:
                shown = ", ".join(there) or "none, see --adapter NAME=DIR"
                print(f"error: There is no adapter {name!r}. Loaded: {shown}.", file=sys.stderr)
                return
            self.adapter = name
            console.print(f"[dim]{escape(self.adapter or 'the model itself')} answers from now on[/dim]")
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
            for delta in self.model.stream(shown, self.params, adapter=self.adapter):
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
