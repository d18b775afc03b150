"""Server-sent events, and what happens when the client goes away: the work behind the answer stops.

The first event is made before the answer's status is sent, so a request that fails at once gets its real HTTP
status. A failure later can only be told inside the stream, as ``data: {"error": ...}``; OpenAI clients raise it.
Starlette cancels a stream when the client leaves, but not a handler that builds a whole answer, and it leaves the
closing of generators to the garbage collector; here both are done at once, because a request holds cache blocks.

Source: the HTML standard, section 9.2 (server-sent events).
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from modelwright.serve.deadline import answering
from modelwright.serve.errors import describe
from modelwright.serve.web import Receive, Request, Response, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
LAST_WORD_SECONDS = 5.0  # for a client to take the error that ends its stream


class ClientGoneError(Exception):
    """The client closed the connection before the answer was ready; nobody reads what is returned."""


def event(value: Any) -> bytes:
    r"""Return one server-sent event.

    >>> event({"a": 1})
    b'data: {"a":1}\n\n'
    """
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n\n"


async def until_gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first_of(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Return the result of ``work``, or cancel it and raise `ClientGoneError` when the client leaves first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do ``work`` as long as the client of a fully read ``request`` listens, and as its answer may take.

    Raises:
        ClientGoneError: The client has left.
        RequestError: The answer took too long.
    """

    async def work_in_time() -> T:
        async with answering(request.scope):
            return await work

    return await _first_of(work_in_time(), request.receive)


class EventStream(Response):
    """An answer sent event by event; ``events`` is closed when it ends, fails, or the client leaves."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        failure: Callable[[Exception], bytes] = lambda error: event(describe(error)[1]),
    ):
        self.events = events
        self.failure = failure  # the last event of a stream that fails
        self.status_code = 200
        self.background = None
        # X-Accel-Buffering: a proxy such as nginx would otherwise hold the events back.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as the server asks."""
        with contextlib.suppress(ClientGoneError):
            await _first_of(self._send_all(scope, send), receive)

    async def _send_all(self, scope: Scope, send: Send) -> None:
        is_started = False
        async with contextlib.aclosing(self.events) as events:
            try:
                async with answering(scope):
                    async for data in events:
                        if not is_started:
                            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                            is_started = True
                        await send({"type": "http.response.body", "body": data, "more_body": True})
            except OSError:
                raise ClientGoneError from None
            except Exception as error:
                if not is_started:
                    raise
                try:
                    async with asyncio.timeout(LAST_WORD_SECONDS):
                        await send({"type": "http.response.body", "body": self.failure(error), "more_body": True})
                except OSError:  # it has left, or does not read
                    raise ClientGoneError from None
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def gather_streams(streams: list[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yield ``(number of the stream, item)`` from all streams as items come; closing it closes them all."""
    queue: asyncio.Queue[tuple[int, T | None, BaseException | None]] = asyncio.Queue(maxsize=2 * len(streams))

    async def pump(number: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with contextlib.aclosing(stream) as items:
                async for item in items:
                    await queue.put((number, item, None))
            await queue.put((number, None, None))
        except Exception as error:
            await queue.put((number, None, error))

    tasks = [asyncio.ensure_future(pump(i, s)) for i, s in enumerate(streams)]
    try:
        remaining = len(tasks)
        while remaining:
            number, item, error = await queue.get()
            if error is not None:
                raise error
            if item is None:
                remaining -= 1
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
