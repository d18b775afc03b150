"""One replica on Ray Serve: the application that serves alone, driven by messages in place of a socket.

The front has read the request and checked its key; here the application gets it as if it came from inside, and what
it would have sent goes back message by message. When the caller goes away Ray cancels the generator, and the
application is told that its client has left. Tokens that a key has spent go back behind the last message, so that the
front, where the limits stand, can count them.

Source: Ray's documentation, "Custom request router". WebSockets, files and batches end at the front.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from typing import Any

from modelwright.base.errors import MissingExtraError
from modelwright.serve.keys import KeyConfig, KeyMeter, current_key, digest_of
from modelwright.serve.placement import SLACK, placed
from modelwright.serve.web import INSIDE, FastAPI, Message

try:
    from ray.serve.request_router import (
        FIFOMixin,
        MultiplexMixin,
        PendingRequest,
        RequestRouter,
        RunningReplica,
    )
except ImportError as error:
    raise MissingExtraError(error.name or "ray", "ray", "Serving with several replicas") from error

SPENT = "modelwright.spent"  # the last message of an answer: how many tokens it cost
GRACE_SECONDS = 5.0  # for the application to notice that its client has left


class PrefixRouter(FIFOMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]
    """Sends a request where `placement.placed` says, by its argument ``key``."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Take the settings of the router."""
        self.slack = float(kwargs.get("slack", SLACK))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas, one a rank, in the order in which they are to be tried."""
        found = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: self.replica_queue_len_cache.get(r.replica_id) or 0 for name, r in found.items()}
        asked = pending_request.kwargs if pending_request is not None else {}
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # wait between rounds when all are full
        slack = float("inf") if asked.get("is_pinned") else self.slack
        return [[found[name]] for name in placed(str(asked.get("key", "")), loads, slack)]


class Replica:
    """One process that serves the model."""

    def __init__(self, build: Callable[[], FastAPI], generation: int = 0):
        self.generation = generation
        self.app = build()
        self._lifespan: Any = None

    async def _start(self) -> None:
        if self._lifespan is None:
            self._lifespan = self.app.router.lifespan_context(self.app)
            await self._lifespan.__aenter__()

    async def ask(
        self, scope: dict[str, Any], body: bytes, key: str = "", tenant: str | None = None, is_pinned: bool = False
    ) -> AsyncGenerator[Message, None]:
        """Answer one request with the messages of the application.

        Args:
            scope: The request without its body.
            body: Its body, whole.
            key: What the router goes by.
            tenant: The name of the key that asks; its cache is kept apart.
            is_pinned: The router may choose no other replica than the first in rank.
        """
        await self._start()
        meter = KeyMeter(KeyConfig(tenant, digest_of(tenant))) if tenant is not None else None  # the key is not here
        gone, mail = asyncio.Event(), asyncio.Queue[Message | None]()
        unread = [body]

        async def receive() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def work() -> None:
            current_key.set(meter)
            try:
                await self.app({**scope, "state": {}, "client": None, INSIDE: True}, receive, mail.put)
            finally:
                await mail.put(None)

        task = asyncio.ensure_future(work())
        try:
            while (message := await mail.get()) is not None:
                yield dict(message)
            await task
            yield {"type": SPENT, "tokens": meter.spent if meter is not None else 0}
        finally:
            gone.set()
            await asyncio.wait([task], timeout=GRACE_SECONDS)
            task.cancel()

    async def describe(self) -> dict[str, Any]:
        """Tell which process this is, what it has done, and its figures in Prometheus' format."""
        served = self.app.state.served
        facts = {"pid": os.getpid(), "generation": self.generation, "models": served.model_names}
        stats = served.engine.stats() if served.engine is not None else None
        told = ("running", "waiting", "free_blocks", "total_blocks", "cached_tokens")
        figures = {name: getattr(stats, name) for name in told} if stats is not None else {}
        return {**facts, **figures, "metrics": served.metrics.render().decode()}

    async def check_health(self) -> None:
        """Fail when the engine has stopped, so that Ray starts another replica in this one's place."""
        engine = self.app.state.served.engine
        if engine is not None and not engine.is_healthy:
            raise RuntimeError(f"the engine has stopped: {engine.error}")
