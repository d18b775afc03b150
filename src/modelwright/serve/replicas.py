"""Several replicas behind one address: the front reads and checks requests, Ray Serve keeps the replicas alive.

The front has the doors of a server that stands alone: host names, other sites, keys with their limits, body sizes. It
passes each request to the replica that `placement` names. A replica that dies takes its own requests with it: those
that have not begun get HTTP 503 with ``retry-after``, those in the middle an error event; the rest go on, and Ray
starts another in its place. `Replicas.restart` replaces them one after the other while the others answer.

Files and batches live with the front, which sends a batch's requests to the replicas like any other; a WebSocket ends
at the front too, and each of its requests goes to a replica. Not done: several fronts that share their state.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

from modelwright.base.errors import ConfigError, MissingExtraError, ModelwrightError
from modelwright.base.logs import get_logger
from modelwright.serve.app import SECURITY_HEADERS, hang_doors
from modelwright.serve.batches_api import inner_scope
from modelwright.serve.body import read_body
from modelwright.serve.deadline import DUE, seconds_left, too_late
from modelwright.serve.errors import (
    ANTHROPIC_PATH,
    CLIENT_CLOSED_REQUEST,
    ReplicaLostError,
    anthropic_body,
    describe,
    error_body,
    error_response,
    install_handlers,
)
from modelwright.serve.events import event
from modelwright.serve.keys import KeyMeter, KeyRing, current_key
from modelwright.serve.metrics import Metrics, merged
from modelwright.serve.placement import SLACK, is_pinned, placement_key
from modelwright.serve.replica import SPENT, PrefixRouter, Replica
from modelwright.serve.served import ServeConfig
from modelwright.serve.socket_api import SocketRoutes
from modelwright.serve.state import ServerState
from modelwright.serve.web import FastAPI, JSONResponse, Message, Receive, Request, Response, Scope, Send

try:
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import RequestRouterConfig
    from ray.serve.exceptions import RayServeException
except ImportError as error:
    raise MissingExtraError(error.name or "ray", "ray", "Serving with several replicas") from error

NAME = "modelwright"
CHAT = "/v1/chat/completions"
LOST = (RayError, RayServeException)  # what a request sees of a replica that is gone
PASSED = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "server")
LATE_SECONDS = 5.0  # that the front waits longer than a replica, which can tell a late answer in its API's own form
OWN_HEADERS = frozenset(name for name, _ in SECURITY_HEADERS) | {b"x-request-id"}  # the front's doors add them
log = get_logger(__name__)


@dataclass(frozen=True)
class ReplicaConfig:
    """How many replicas there are, and how work is shared among them."""

    num_replicas: int = 2
    num_cpus: float = 1.0  # that one replica takes
    num_gpus: float = 0.0
    max_ongoing: int = 256  # requests that one replica has at once; the front keeps the rest waiting
    slack: float = SLACK  # how much above the mean a replica's load may be before another takes a request
    address: str | None = None  # of a Ray cluster that runs; None: one is started on this machine

    def __post_init__(self) -> None:
        if self.num_replicas < 1 or self.max_ongoing < 1 or self.slack < 1:
            raise ConfigError(
                f"replicas: {self.num_replicas} replicas, at most {self.max_ongoing} requests each, slack {self.slack};"
                " each must be at least 1. Give larger numbers."
            )


class Replicas:
    """The replicas of one application."""

    def __init__(self, build: Callable[[], FastAPI], config: ReplicaConfig | None = None):
        self.build, self.config = build, config or ReplicaConfig()
        self.generation = 0
        self.handle: Any = None

    def start(self) -> None:
        """Start all replicas and wait until they serve."""
        if not ray.is_initialized():
            ray.init(address=self.config.address, include_dashboard=False, log_to_driver=False)
        serve.start(proxy_location="Disabled")
        self._deploy()

    def restart(self) -> None:
        """Replace the replicas one after the other; those that are left finish what they have begun."""
        self.generation += 1
        self._deploy()

    def stop(self) -> None:
        """End all replicas, and Ray if it was started here."""
        serve.shutdown()
        if self.config.address is None:
            ray.shutdown()

    def _deploy(self) -> None:
        self.handle = serve.run(deployment(self.build, self.config, self.generation), name=NAME, route_prefix=None)

    def ask(self, **asked: Any) -> Any:
        """Pass a request to a replica; returns the stream of its messages."""
        return self.handle.options(stream=True).ask.remote(**asked)

    async def describe(self) -> list[dict[str, Any]]:
        """Return what each living replica tells of itself."""
        asked = {"timeout_s": 10, "return_exceptions": True}  # one that has just died is left out
        told = await asyncio.to_thread(lambda: self.handle.broadcast("describe").results(**asked))
        return [one for one in told if isinstance(one, dict)]


def deployment(build: Callable[[], FastAPI], config: ReplicaConfig, generation: int = 0) -> Any:
    """Return the Ray Serve application of the replicas, without a front."""
    made = serve.deployment(
        name="replica",
        num_replicas=config.num_replicas,
        max_ongoing_requests=config.max_ongoing,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=120,  # an answer that has begun may end
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter,  # type: ignore[arg-type]
            request_router_kwargs={"slack": config.slack},
        ),
    )(Replica)
    return made.bind(build, generation)


def application(build: Callable[[], FastAPI], config: ReplicaConfig, front: ServeConfig) -> Any:
    """Return the Ray Serve application of the replicas with their front, which Ray's own HTTP proxy asks.

    Args:
        build: Makes what one replica serves.
        config: How many there are.
        front: How the front is set up. There is one: limits are counted in it.
    """

    def make_front() -> FastAPI:
        replicas = Replicas(build, config)
        replicas.handle = serve.get_deployment_handle("replica", app_name=serve.get_replica_context().app_name)
        return create_front(replicas, front)

    made = serve.deployment(
        name="front", num_replicas=1, max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0.5}
    )
    return made(serve.ingress(make_front)()).bind(deployment(build, config))


class Relayed(Response):
    """An answer that a replica sends, message by message."""

    def __init__(self, messages: Any, first: Message):
        self.messages = messages
        self.first = {**first, "headers": [(n, v) for n, v in first["headers"] if n not in OWN_HEADERS]}
        self.is_events = any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in first["headers"])
        self.meter = current_key.get()
        self.status_code, self.background = 200, None
        self.raw_headers = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the messages on; stop the replica's work when the client leaves."""
        work = asyncio.ensure_future(self._pass_on(send, scope["path"]))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            ended, _ = await asyncio.wait(
                {work, gone}, timeout=seconds_left(scope), return_when=asyncio.FIRST_COMPLETED
            )
            if work.done():
                work.result()
            elif not ended:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                self.messages.cancel()
                await self._end(too_late(scope[DUE][1]), send, scope["path"])
        finally:
            if not work.done():
                self.messages.cancel()
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _pass_on(self, send: Send, path: str) -> None:
        await send(self.first)
        last: Message | None = None
        try:
            async for message in self.messages:
                if message["type"] == SPENT:
                    if self.meter is not None:
                        self.meter.spend(message["tokens"])
                elif message.get("more_body"):
                    await send(message)
                else:
                    last = message  # held back until the cost is known: behind it the server counts its client as gone
        except LOST as error:
            log.warning("a replica was lost in the middle of an answer: %s", error)
            if last is None:
                await self._end(_lost(), send, path)
        if last is not None:
            await send(last)

    async def _end(self, error: ModelwrightError, send: Send, path: str) -> None:
        """Tell an error as the last event of a stream; of any other answer only the connection's end can tell."""
        if not self.is_events:
            raise error
        status, body = describe(error)
        is_named = path.startswith(ANTHROPIC_PATH)
        last = b"event: error\n" + event(anthropic_body(status, body)) if is_named else event(body)
        async with asyncio.timeout(LATE_SECONDS):
            await send({"type": "http.response.body", "body": last, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _lost() -> ReplicaLostError:
    return ReplicaLostError("The replica that had this request has ended. Another takes its place; send it again.")


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Front:
    """The routes of the front."""

    def __init__(self, replicas: Replicas, config: ServeConfig):
        self.replicas, self.config = replicas, config
        self.metrics = Metrics(None)

    def install(self, app: FastAPI) -> None:
        """Add the routes to ``app``; what is no route of its own goes to a replica."""
        app.add_api_route("/health/live", self.live, methods=["GET"])
        app.add_api_route("/health/ready", self.ready, methods=["GET"])
        app.add_api_route("/metrics", self.show_metrics, methods=["GET"])
        app.add_api_route("/api/replicas", self.show_replicas, methods=["GET"])
        app.add_api_route("/{path:path}", self.relay, methods=["GET", "POST", "DELETE", "PUT", "PATCH", "HEAD"])

    async def live(self) -> JSONResponse:
        """Say that the front answers."""
        return JSONResponse({"status": "live"})

    async def ready(self) -> JSONResponse:
        """Say whether at least one replica answers."""
        found = []
        with contextlib.suppress(Exception):
            found = await self.replicas.describe()
        if not found:
            body = error_body("No replica answers. One is being started.", status=503, code="not_ready")
            return JSONResponse(body, status_code=503, headers={"retry-after": "1"})
        return JSONResponse({"status": "ready", "replicas": len(found)})

    async def show_metrics(self) -> Response:
        """Send the front's counts, and those of each replica with its process id as a label."""
        told = {str(one["pid"]): one["metrics"] for one in await self.replicas.describe()}
        return Response(merged({"front": self.metrics.render().decode(), **told}), media_type="text/plain")

    async def show_replicas(self) -> JSONResponse:
        """Tell which replicas there are and what they do."""
        told = await self.replicas.describe()
        return JSONResponse({"replicas": [{k: v for k, v in one.items() if k != "metrics"} for one in told]})

    async def relay(self, request: Request) -> Response:
        """Pass one request to a replica."""
        data = await read_body(request, self.config.max_body_bytes, self.config.body_timeout_seconds)
        scope = {name: request.scope[name] for name in PASSED if name in request.scope}
        scope["headers"] = [(n, v) for n, v in request.scope["headers"] if n not in (b"authorization", b"x-api-key")]
        return await self._first(request, self._ask(request.url.path, scope, data))

    def _ask(self, path: str, scope: dict[str, Any], data: bytes) -> Any:
        meter = current_key.get()
        tenant = meter.config.name if meter is not None else None
        key = placement_key(path, _object(data), tenant or "")
        return self.replicas.ask(scope=scope, body=data, key=key, tenant=tenant, is_pinned=is_pinned(path))

    async def chat_stream(self, body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        """Send one chat to a replica and return the events of its answer, or its error as the only one.

        Raises:
            ReplicaLostError: The replica ended before it answered.
        """
        messages = self._ask(CHAT, inner_scope(CHAT), json.dumps(body).encode())
        try:
            await _next(messages)
        except LOST as error:
            log.warning("a replica was lost before it answered: %s", error)
            raise _lost() from None
        return _bodies(messages, current_key.get())

    async def _first(self, request: Request, messages: Any) -> Response:
        """Wait for the beginning of an answer while its client listens."""
        first = asyncio.ensure_future(_next(messages))
        gone = asyncio.ensure_future(_until_gone(request.receive))
        try:
            left = seconds_left(request.scope)
            ended, _ = await asyncio.wait({first, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                messages.cancel()
                return (
                    Response(status_code=CLIENT_CLOSED_REQUEST)
                    if ended
                    else error_response(too_late(request.scope[DUE][1]), request.url.path)
                )
            return Relayed(messages, first.result())
        except LOST as error:
            log.warning("a replica was lost before it answered: %s", error)
            return error_response(_lost(), request.url.path)
        finally:
            for task in (first, gone):
                task.cancel()
            await asyncio.gather(first, gone, return_exceptions=True)


async def _bodies(messages: Any, meter: KeyMeter | None) -> AsyncGenerator[bytes, None]:
    """Yield the pieces of an answer's body; closing it ends the replica's work."""
    is_ended = False
    try:
        async for message in messages:
            if message["type"] == SPENT:
                is_ended = True
                if meter is not None:
                    meter.spend(message["tokens"])
            elif message.get("body"):
                yield message["body"]
    except LOST as error:
        is_ended = True
        log.warning("a replica was lost in the middle of an answer: %s", error)
        yield event(describe(_lost())[1])
    finally:
        if not is_ended:
            messages.cancel()


async def _next(messages: AsyncGenerator[Message, None]) -> Message:
    return await messages.__anext__()


def _object(data: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data)
        return value if isinstance(value, dict) else {}
    return {}


def create_front(replicas: Replicas, config: ServeConfig) -> FastAPI:
    """Return the application that stands before the replicas, which must have been started."""
    keys = KeyRing.load(config.api_key_file) if config.api_key_file is not None else None
    front = Front(replicas, config)
    state = ServerState(config, keys)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with state.at_work():
            yield

    app = FastAPI(title="modelwright", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    install_handlers(app)
    state.install(app)
    late = config.answer_timeout_seconds and config.answer_timeout_seconds + LATE_SECONDS
    SocketRoutes(front.chat_stream, config.max_body_bytes, late).install(app)
    front.install(app)
    hang_doors(app, replace(config, answer_timeout_seconds=late), front.metrics, keys)
    return app
