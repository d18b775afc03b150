"""Chats over a WebSocket: a request comes as one text message, its chunks go out as text messages, then the next.

For clients that hold one connection open, a page for example. A request has the body of ``/v1/chat/completions``; its
answer is the chunks of a stream and then ``[DONE]``, an error is ``{"error": ...}`` and leaves the connection open.
A new message while an answer is being written ends that answer. The doors of HTTP stand here too: keys, host names,
and no pages of other sites; each message is a request to its key's limits, the connection one of those open at a time.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from modelwright.base.errors import RequestError
from modelwright.serve.body import parse_json
from modelwright.serve.deadline import in_time
from modelwright.serve.errors import describe
from modelwright.serve.keys import LimitError, current_key
from modelwright.serve.web import FastAPI, WebSocket, WebSocketDisconnect

PATH = "/v1/chat/completions/ws"
TOO_BIG = 1009  # the protocol's number for a message beyond the limit


class SocketRoutes:
    """The handler of one application.

    Args:
        chat_stream: Checks a chat request and returns the events of its answer.
        max_body_bytes: The longest message that is read.
        answer_seconds: How long one answer may take; None: as long as it likes.
    """

    def __init__(
        self,
        chat_stream: Callable[[dict[str, Any]], Awaitable[AsyncGenerator[bytes, None]]],
        max_body_bytes: int,
        answer_seconds: float | None = None,
    ):
        self.chat_stream = chat_stream
        self.max_body_bytes = max_body_bytes
        self.answer_seconds = answer_seconds

    def install(self, app: FastAPI) -> None:
        """Add the route to ``app``."""
        app.add_api_websocket_route(PATH, self.chat)

    async def chat(self, socket: WebSocket) -> None:
        """Answer the requests of one connection, one at a time."""
        await socket.accept()
        answering: asyncio.Task[None] | None = None
        try:
            while True:
                text = await socket.receive_text()
                await _end(answering)
                if len(text.encode()) > self.max_body_bytes:
                    await socket.close(TOO_BIG, "the message is larger than max_body_bytes")
                    return
                answering = asyncio.ensure_future(self._answer(socket, text))
        except WebSocketDisconnect:
            pass
        finally:
            await _end(answering)

    async def _answer(self, socket: WebSocket, text: str) -> None:
        meter = current_key.get()
        try:
            if meter is not None:
                meter.take_turn()
            body = parse_json(text.encode())
            if body.get("stream") is False:
                message = "stream is false; over a WebSocket every answer streams. Leave it out, or ask over HTTP."
                raise RequestError(message, param="stream", code="unsupported_parameter")
            async with in_time(self.answer_seconds):
                async with contextlib.aclosing(await self.chat_stream({**body, "stream": True})) as events:
                    async for event in events:
                        await socket.send_text(event.decode().removeprefix("data: ").rstrip("\n"))
        except (WebSocketDisconnect, OSError):
            pass
        except Exception as error:
            if meter is not None and isinstance(error, RequestError) and not isinstance(error, LimitError):
                meter.give_back()
            with contextlib.suppress(WebSocketDisconnect, OSError, RuntimeError):
                await socket.send_text(json.dumps(describe(error)[1]))


async def _end(task: "asyncio.Task[Any] | None") -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
