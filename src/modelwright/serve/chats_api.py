"""The page's conversations with the language model: kept on the server, shown to the model through a memory.

A browser that is closed loses nothing, and the same file can be opened by ``mw chat --store``. With keys, each sees
its own conversations. The routes are the page's, not OpenAI's.
"""

import asyncio
import contextlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from modelwright.base.errors import RequestError
from modelwright.base.types import Message
from modelwright.serve import fields, language
from modelwright.serve.body import read_json
from modelwright.serve.chats import Chat, Chats, Memory, MemoryConfig
from modelwright.serve.events import EventStream
from modelwright.serve.files_api import owner
from modelwright.serve.openai_api import Pieces, chat_events, timed
from modelwright.serve.replies import Reply
from modelwright.serve.web import FastAPI, JSONResponse, Request, Response

if TYPE_CHECKING:
    from modelwright.serve.served import Served

ANSWER_FRACTION = 0.25  # of the context, left for the answer
MAX_SYSTEM_CHARS = 20_000
SETTINGS = ("temperature", "top_p", "seed", "max_tokens")


class ChatRoutes:
    """The handlers of one application."""

    def __init__(self, served: "Served", chats: Chats):
        self.served, self.chats = served, chats

    def install(self, app: FastAPI) -> None:
        """Add the routes to ``app``."""
        app.add_api_route("/api/chats", self.list, methods=["GET"])
        app.add_api_route("/api/chats", self.create, methods=["POST"])
        app.add_api_route("/api/chats/{id}", self.show, methods=["GET"])
        app.add_api_route("/api/chats/{id}", self.delete, methods=["DELETE"])
        app.add_api_route("/api/chats/{id}/ask", self.ask, methods=["POST"])

    async def list(self) -> JSONResponse:
        """List the conversations that have a turn, the newest first."""
        found = await asyncio.to_thread(self.chats.all, _owner())
        return JSONResponse({"chats": [asdict(chat) for chat in found if chat.num_turns]})

    async def create(self, request: Request) -> JSONResponse:
        """Begin a conversation, perhaps with a system message."""
        body = await self._read(request, frozenset({"system"}))
        system = body.get("system") or ""
        if not isinstance(system, str) or len(system) > MAX_SYSTEM_CHARS:
            fields.refuse("system", system, f"a text of at most {MAX_SYSTEM_CHARS} characters")
        return JSONResponse(asdict(await asyncio.to_thread(self.chats.new, system, _owner())))

    async def show(self, id: str) -> JSONResponse:
        """Tell the turns of a conversation."""
        chat = await self._find(id)
        turns = await asyncio.to_thread(self.chats.turns, chat.id)
        return JSONResponse({**asdict(chat), "turns": [{"role": t.role, "content": t.content} for t in turns]})

    async def delete(self, id: str) -> JSONResponse:
        """Forget a conversation."""
        chat = await self._find(id)
        await asyncio.to_thread(self.chats.delete, chat.id)
        return JSONResponse({"id": chat.id, "deleted": True})

    async def ask(self, request: Request, id: str) -> Response:
        """Answer a question, streamed as a chat completion is; the exchange is kept when the answer ends or stops."""
        served = self.served
        body = await self._read(request, frozenset({"question", *SETTINGS}))
        question = body.get("question")
        if not isinstance(question, str) or not question.strip():
            fields.refuse("question", question, "a non-empty text")
        chat = await self._find(id)
        served.admit()
        shown = await asyncio.to_thread(self._memory().recall, chat, question)
        turns = [{"role": m.role, "content": m.content} for m in shown]
        settings = {name: body[name] for name in SETTINGS if body.get(name) is not None}
        _, streams = await language.chat_pieces(served, {"messages": turns, **settings})
        pieces = self._kept(chat, question, timed(served, served.model_name, streams[0]))
        return EventStream(
            chat_events(Reply(served.model_name, "chatcmpl"), [pieces], fields.Streaming(True, False), None)
        )

    async def _kept(self, chat: Chat, question: str, pieces: Pieces) -> Pieces:
        text, is_begun = "", False
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    text, is_begun = text + piece.text, True
                    yield piece
        finally:
            if is_begun:  # also when the reader stops it: what was read is part of the conversation
                self.chats.add(chat.id, [Message("user", question), Message("assistant", text)])

    def _memory(self) -> Memory:
        served = self.served
        assert served.tokenizer is not None and served.engine is not None
        count = served.tokenizer.apply_chat_template
        room = max(1, int(served.max_context * (1 - ANSWER_FRACTION)))
        config = MemoryConfig(served.config.memory, max_tokens=room)
        return Memory(self.chats, config, lambda m: len(count(m, add_generation_prompt=True)), served.engine)

    async def _find(self, id: str) -> Chat:
        if not id.isdecimal() or len(id) > 18:
            raise RequestError(f"There is no conversation {id!r}.", param="id", code="not_found", status=404)
        return await asyncio.to_thread(self.chats.find, int(id), _owner())

    async def _read(self, request: Request, known: frozenset[str]) -> dict[str, Any]:
        config = self.served.config
        body = await read_json(request, config.max_body_bytes, config.body_timeout_seconds)
        for name in body:
            if name not in known:
                raise RequestError(f"Unrecognized field: {name}.", param=name, code="unknown_parameter")
        return body


def _owner() -> str:
    return owner() or ""
