"""How long a request may take: its head and what a refused client goes on sending (`Listener`), and its whole answer.

A body has its own limit where it is read (`body.read_body`). An answer's time runs from the head of its request to its
last word, the queue and a slow reader included. An answer that is late is HTTP 504, or an error event where a stream
has begun, in the form of the API that was asked; its work is dropped and its blocks are free. It says
``x-should-retry: false``, because clients would otherwise ask for the same long answer again.

uvicorn's only limit is the idle time between two requests, and a byte ends that, so `Listener` stands in for its
protocol. Not here: a limit on how slowly an open WebSocket sends, and on the TLS handshake (asyncio has one of 60 s).

Source: RFC 9110, sections 15.5.9 and 15.6.5; https://github.com/Kludex/uvicorn/issues/157.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

from modelwright.base.errors import ConfigError, RequestError
from modelwright.serve.errors import error_body
from modelwright.serve.web import ASGIApp, H11Protocol, Receive, Scope, Send

DUE = "modelwright.due"  # in the scope of a request: by when (the loop's clock), and how long that was
HEAD_SECONDS = 10.0


class AnswerClock:
    """Notes when each request's answer is due; what waits for it looks at that."""

    def __init__(self, app: ASGIApp, seconds: float | None):
        self.app, self.seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start the clock of one request."""
        if self.seconds is not None and scope["type"] == "http":
            scope[DUE] = (asyncio.get_running_loop().time() + self.seconds, self.seconds)
        await self.app(scope, receive, send)


def seconds_left(scope: MutableMapping[str, Any]) -> float | None:
    """Return how long a request's answer may still take; None: as long as it likes."""
    due = scope.get(DUE)
    return None if due is None else max(0.0, due[0] - asyncio.get_running_loop().time())


@contextlib.asynccontextmanager
async def in_time(seconds: float | None, whole: float | None = None) -> AsyncIterator[None]:
    """Let what stands below take so many seconds, and cancel it then.

    Args:
        seconds: None: as many as it likes.
        whole: What the message calls the limit, where some of it has passed.

    Raises:
        RequestError: It took longer.
    """
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise too_late(whole or seconds or 0.0) from None


@contextlib.asynccontextmanager
async def answering(scope: MutableMapping[str, Any]) -> AsyncIterator[None]:
    """Let what stands below take as long as the request of ``scope`` may still take."""
    async with in_time(seconds_left(scope), scope.get(DUE, (0.0, None))[1]):
        yield


def too_late(seconds: float) -> RequestError:
    """Return the error of an answer that took longer than it may."""
    message = (
        f"The answer was not whole within {seconds:g} seconds, the most that this server takes for one. Ask for fewer"
        " tokens, or later."
    )
    return RequestError(message, code="answer_timeout", status=504)


class Listener(H11Protocol):
    """uvicorn's protocol, whose connections are closed when a head is not there in time.

    The time runs from the connection's opening, and later from the first byte that belongs to no request in work: the
    beginning of the next head, or the rest of a body whose answer (a refusal) has been sent. An unfinished first head
    is told HTTP 408.
    """

    head_seconds = HEAD_SECONDS
    _timer: asyncio.TimerHandle | None = None
    _has_begun = False

    @classmethod
    def within(cls, seconds: float) -> "type[Listener]":
        """Return the protocol with another time for heads."""
        if not seconds > 0:
            raise ConfigError(f"head_seconds is {seconds:g}; it must be above 0. Give the seconds to wait for a head.")
        return type(cls.__name__, (cls,), {"head_seconds": seconds})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Take in bytes, and see whether they made a head whole."""
        self._has_begun = True
        super().data_received(data)
        is_upgraded = self.transport.get_protocol() is not self
        if is_upgraded or (self.cycle is not None and not self.cycle.response_complete):
            self._rest()
        else:
            self._wait()

    def on_response_complete(self) -> None:
        """Leave an idle connection to uvicorn, which closes it after five seconds."""
        self._rest()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._rest()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.head_seconds, self._give_up)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None and self._has_begun:
            message = f"The request's head did not arrive within {self.head_seconds:g} seconds. Send it again."
            body = json.dumps(error_body(message, status=408, code="request_timeout")).encode()
            self.transport.write(
                b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(body), body)
            )
        self.transport.close()
