"""Conversations that are kept, and what of them a model is shown.

Every turn is kept in one SQLite file, shared by the terminal and the web page. A model reads only so much, so a memory
chooses: all turns, the last few, as many of the last as fit a number of tokens, or those and a summary of what came
before, which the model itself writes when turns first fall out and carries on from then.

Whole exchanges are dropped, never half of one: what is shown begins with a turn of the user.
Source of the running summary: Wu et al. 2021, arXiv 2109.10862 (summaries of summaries). Not done: retrieval of old
turns by likeness.
"""

import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modelwright.base.errors import ConfigError, DataError, RequestError
from modelwright.base.types import ChatModel, Message, SamplingParams

Kind = Literal["all", "window", "tokens", "summary"]
KINDS: tuple[Kind, ...] = ("all", "window", "tokens", "summary")
CountTokens = Callable[[Sequence[Message]], int]
TITLE_CHARS = 60
SUMMARY_PREFIX = "What was said before, in short: "
ASK_FOR_SUMMARY = (
    "Sum up this conversation for somebody who will carry it on: names, numbers, wishes, decisions and what is open. "
    "Use at most a hundred words and nothing that was not said."
)


@dataclass(frozen=True)
class MemoryConfig:
    """What of a conversation a model is shown."""

    kind: Kind = "tokens"
    num_exchanges: int = 8  # for "window": questions with their answers
    max_tokens: int = 2048  # for "tokens" and "summary": of all that is shown
    summary_tokens: int = 160  # for "summary": the longest that the model may write

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"memory.kind is {self.kind!r}; known: {', '.join(KINDS)}.")
        for name in ("num_exchanges", "max_tokens", "summary_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"memory.{name} is {getattr(self, name)}; it must be at least 1.")


@dataclass(frozen=True)
class Chat:
    """A conversation that is kept."""

    id: int
    title: str  # the beginning of its first question
    system: str  # empty: none
    created: float  # seconds since 1970
    num_turns: int


class Chats:
    """All conversations in one file.

    Args:
        path: The SQLite file, made when it does not exist; None keeps them in memory.

    Raises:
        DataError: The file is no such store.
    """

    def __init__(self, path: Path | None = None):
        self._lock = threading.Lock()
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(":memory:" if path is None else path, check_same_thread=False)
            with self._lock, self._db:
                self._db.execute("PRAGMA foreign_keys = ON")
                self._db.execute(
                    "CREATE TABLE IF NOT EXISTS chats (id INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT, title TEXT, "
                    "system TEXT, created REAL, summary TEXT DEFAULT '', summed INT DEFAULT 0)"
                )
                self._db.execute(
                    "CREATE TABLE IF NOT EXISTS turns (chat INT REFERENCES chats ON DELETE CASCADE, place INT, "
                    "role TEXT, content TEXT, time REAL, PRIMARY KEY (chat, place))"
                )
        except (sqlite3.Error, OSError) as error:
            raise DataError(f"{path} is no store of conversations: {error}. Give another file.") from error
        if path is not None:
            path.chmod(0o600)  # it holds what people said

    def new(self, system: str = "", owner: str = "") -> Chat:
        """Begin a conversation."""
        now = time.time()
        with self._lock, self._db:
            row = self._db.execute(
                "INSERT INTO chats (owner, title, system, created) VALUES (?, '', ?, ?)", (owner, system, now)
            )
            return Chat(int(row.lastrowid or 0), "", system, now, 0)

    def all(self, owner: str = "") -> list[Chat]:
        """Return the conversations of an owner, the newest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT id, title, system, created, (SELECT COUNT(*) FROM turns WHERE chat = id) FROM chats "
                "WHERE owner = ? ORDER BY id DESC",
                (owner,),
            ).fetchall()
        return [Chat(*row) for row in rows]

    def find(self, id: int, owner: str = "") -> Chat:
        """Return a conversation.

        Raises:
            RequestError: The owner has none of that number.
        """
        for chat in self.all(owner):
            if chat.id == id:
                return chat
        raise RequestError(f"There is no conversation {id}.", param="chat", code="not_found", status=404)

    def turns(self, id: int) -> list[Message]:
        """Return all turns, without the system message."""
        with self._lock:
            query = "SELECT role, content FROM turns WHERE chat = ? ORDER BY place"
            return [Message(role, content) for role, content in self._db.execute(query, (id,))]

    def add(self, id: int, turns: Sequence[Message]) -> None:
        """Add turns at the end; a conversation without a title takes it from its first question."""
        with self._lock, self._db:
            (count,) = self._db.execute("SELECT COUNT(*) FROM turns WHERE chat = ?", (id,)).fetchone()
            for place, turn in enumerate(turns, start=count):
                row = (id, place, turn.role, turn.content, time.time())
                self._db.execute("INSERT INTO turns VALUES (?, ?, ?, ?, ?)", row)
            title = next((" ".join(t.content.split())[:TITLE_CHARS] for t in turns if t.role == "user"), "")
            self._db.execute("UPDATE chats SET title = ? WHERE id = ? AND title = ''", (title, id))

    def delete(self, id: int) -> None:
        """Forget a conversation."""
        with self._lock, self._db:
            self._db.execute("DELETE FROM turns WHERE chat = ?", (id,))
            self._db.execute("DELETE FROM chats WHERE id = ?", (id,))

    def summary(self, id: int) -> tuple[str, int]:
        """Return the summary and how many turns it covers."""
        with self._lock:
            found = self._db.execute("SELECT summary, summed FROM chats WHERE id = ?", (id,)).fetchone()
        return (str(found[0]), int(found[1])) if found else ("", 0)

    def keep_summary(self, id: int, text: str, num_turns: int) -> None:
        """Keep a summary of the first ``num_turns`` turns."""
        with self._lock, self._db:
            self._db.execute("UPDATE chats SET summary = ?, summed = ? WHERE id = ?", (text, num_turns, id))

    def close(self) -> None:
        """Close the file."""
        self._db.close()


class Memory:
    """Chooses what of a conversation is shown.

    Args:
        chats: Where conversations are kept.
        config: How it chooses.
        count_tokens: Messages to the tokens of the prompt that they make.
        model: Writes summaries; only for the kind "summary".
    """

    def __init__(self, chats: Chats, config: MemoryConfig, count_tokens: CountTokens, model: ChatModel | None = None):
        if config.kind == "summary" and model is None:
            raise ConfigError("memory.kind is 'summary', which needs a model that writes. Give one.")
        self.chats, self.config, self._count, self._model = chats, config, count_tokens, model

    def recall(self, chat: Chat, question: str) -> list[Message]:
        """Return what the model is shown for a new question, which stands at the end.

        Raises:
            RequestError: The question alone is longer than the memory.
        """
        turns = [*self.chats.turns(chat.id), Message("user", question)]
        system = [Message("system", chat.system)] if chat.system else []
        kind = self.config.kind
        if kind == "all":
            return [*system, *turns]
        if kind == "window":
            starts = _starts(turns)
            return [*system, *turns[starts[-min(len(starts), self.config.num_exchanges)] :]]
        if kind == "tokens":
            return [*system, *turns[self._first_that_fits(system, turns) :]]
        return self._with_summary(chat, system, turns)

    def _first_that_fits(self, system: list[Message], turns: list[Message]) -> int:
        """Return the earliest turn of the user from which all fits; found by bisection, for counting takes time."""
        starts = _starts(turns)
        if not self._fits([*system, *turns[starts[-1] :]]):
            raise RequestError(
                f"The question does not fit into the {self.config.max_tokens} tokens of context that are shown. "
                "Shorten it, or show more.",
                param="messages",
                code="context_length_exceeded",
            )
        low, high = 0, len(starts) - 1
        while low < high:
            middle = (low + high) // 2
            if self._fits([*system, *turns[starts[middle] :]]):
                high = middle
            else:
                low = middle + 1
        return starts[low]

    def _fits(self, messages: list[Message]) -> bool:
        return self._count(messages) <= self.config.max_tokens

    def _with_summary(self, chat: Chat, system: list[Message], turns: list[Message]) -> list[Message]:
        """Show the last turns behind a summary; what newly falls out is summed up first, with the summary so far."""
        summary, covered = self.chats.summary(chat.id)
        shown = _with_note(system, summary)
        if self._fits([*shown, *turns[covered:]]):
            return [*shown, *turns[covered:]]
        # Half of the room is freed at once, so that a summary is written every few turns and not at each.
        room = Memory(self.chats, MemoryConfig("tokens", max_tokens=max(1, self.config.max_tokens // 2)), self._count)
        try:
            first = room._first_that_fits(shown, turns[covered:]) + covered
        except RequestError:  # the question alone takes more than half
            first = len(turns) - 1
        if first > covered:
            summary = self._sum_up(summary, turns[covered:first])
            self.chats.keep_summary(chat.id, summary, first)
        shown = _with_note(system, summary)
        return [*shown, *turns[first + self._first_that_fits(shown, turns[first:]) :]]

    def _sum_up(self, summary: str, turns: list[Message]) -> str:
        assert self._model is not None
        before = [Message("user", SUMMARY_PREFIX + summary)] if summary else []
        said = "\n".join(f"{turn.role}: {turn.content}" for turn in (*before, *turns))
        params = SamplingParams(temperature=0, max_tokens=self.config.summary_tokens)
        return self._model.chat([Message("user", f"{ASK_FOR_SUMMARY}\n\n{said}")], params).text.strip()


def _starts(turns: Sequence[Message]) -> list[int]:
    """Return where exchanges begin: the places of the user's turns."""
    return [place for place, turn in enumerate(turns) if turn.role == "user"]


def _with_note(system: list[Message], summary: str) -> list[Message]:
    if not summary:
        return system
    text = "\n\n".join([*(m.content for m in system), SUMMARY_PREFIX + summary])
    return [Message("system", text)]
