"""The application: every route, the checks at the front door, and the server that runs it.

It listens on this machine only unless told otherwise, answers no other site's scripts, and reads no file on request.
Without a key file whoever can reach the address can ask.
"""

import contextlib
import functools
import ipaddress
import secrets
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright.base.errors import ConfigError, RequestError
from modelwright.serve.adapters_api import AdapterRoutes
from modelwright.serve.anthropic_api import AnthropicRoutes
from modelwright.serve.chats import Chats
from modelwright.serve.chats_api import ChatRoutes
from modelwright.serve.deadline import HEAD_SECONDS, AnswerClock, Listener
from modelwright.serve.errors import error_body, error_response, install_handlers, refuse_socket
from modelwright.serve.gate import Gate
from modelwright.serve.keys import KeyRing
from modelwright.serve.metrics import Metrics
from modelwright.serve.openai_api import OpenAIRoutes
from modelwright.serve.page import CONTENT_SECURITY_POLICY, PageRoutes
from modelwright.serve.port import check_port
from modelwright.serve.responses_api import ResponsesRoutes
from modelwright.serve.schema import describe_routes
from modelwright.serve.served import Allowed, ServeConfig, Served
from modelwright.serve.socket_api import SocketRoutes
from modelwright.serve.state import ServerState
from modelwright.serve.telemetry import current_headers
from modelwright.serve.tokenizers_api import TokenizerRoutes
from modelwright.serve.vectors import Encoders, VectorRoutes
from modelwright.serve.web import (
    INSIDE,
    ASGIApp,
    ClientDisconnect,
    CORSMiddleware,
    FastAPI,
    JSONResponse,
    Message,
    Receive,
    Response,
    Scope,
    Send,
    uvicorn,
)

if TYPE_CHECKING:  # a server of documents alone needs no engine, so importing this room loads none
    from modelwright.engine.stream import AsyncEngine
    from modelwright.rag.index import Index
    from modelwright.tokenizer.bpe import Tokenizer

__all__ = ["Allowed", "ServeConfig", "check_port", "create_app", "serve"]

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
SECURITY_HEADERS = [
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


def create_app(
    config: ServeConfig,
    engine: "AsyncEngine | None",
    tokenizer: "Tokenizer | None",
    model_name: str,
    index: "Index | None",
    page: Path | None,
    encoders: Encoders | None = None,
) -> FastAPI:
    """Return the application over an engine, an index of documents, or both.

    Args:
        engine: None serves the documents alone; answers are then quotes.
        tokenizer: The engine's.
        model_name: What clients call the language model; the documents answer under it with ``-documents`` added.
        page: Folder of the web page's files; None serves no page.
        encoders: Sentence encoders and rerankers, each under a name of its own.

    Raises:
        ConfigError: There is nothing to serve, or the parts contradict each other.
    """
    served = Served(config, engine, tokenizer, model_name, index, encoders)

    keys = KeyRing.load(config.api_key_file) if config.api_key_file is not None else None

    state = ServerState(config, keys)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with state.at_work():
            yield
        await served.close()

    # The framework's own documentation pages load scripts from another host; only the plain document is kept.
    app = FastAPI(title="modelwright", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.served = served
    install_handlers(app)
    openai_routes = OpenAIRoutes(served)
    openai_routes.install(app)
    SocketRoutes(openai_routes.chat_stream, config.max_body_bytes, config.answer_timeout_seconds).install(app)
    AnthropicRoutes(served).install(app)
    ResponsesRoutes(served).install(app)
    AdapterRoutes(served).install(app)
    VectorRoutes(served).install(app)
    if engine is not None and index is None:
        ChatRoutes(served, Chats(state.folder / "chats.sqlite")).install(app)
    state.install(app)
    PageRoutes(served, page).install(app)
    TokenizerRoutes({model_name: tokenizer} if tokenizer is not None else {}).install(app)
    HealthRoutes(served).install(app)
    describe_routes(app)
    hang_doors(app, config, served.metrics, keys)
    return app


def hang_doors(app: FastAPI, config: ServeConfig, metrics: Metrics, keys: KeyRing | None) -> None:
    """Add what a request passes before the routes; the last one added is the first it meets."""
    app.add_middleware(AnswerClock, seconds=config.answer_timeout_seconds)  # type: ignore[arg-type]
    if keys is not None:
        app.add_middleware(Gate, keys=keys)  # type: ignore[arg-type]
    origins = config.allowed.origins
    app.add_middleware(
        FrontDoor,  # type: ignore[arg-type]
        metrics=metrics,
        allowed_hosts=config.allowed.hosts,
        allowed_origins=origins,
    )
    if origins:
        methods = ["GET", "POST", "DELETE"]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=["*"])  # type: ignore[arg-type]


class HealthRoutes:
    """What an operator's probes ask."""

    def __init__(self, served: Served):
        self.served = served

    def install(self, app: FastAPI) -> None:
        """Add the routes to ``app``."""
        app.add_api_route("/health/live", self.live, methods=["GET"])
        app.add_api_route("/health/ready", self.ready, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])

    async def live(self) -> JSONResponse:
        """Say that the process answers."""
        return JSONResponse({"status": "live"})

    async def ready(self) -> JSONResponse:
        """Say whether requests are being worked on: the engine runs, and it moves while there is work."""
        served = self.served
        silence, limit = served.silence_seconds(), served.config.stall_seconds
        problem = None
        if served.engine is not None and not served.engine.is_healthy:
            problem = f"The engine has stopped: {served.engine.error or 'it was told to'}"
        elif silence > limit:
            problem = f"Requests run, but nothing has moved for {silence:.0f} seconds; {limit:g} are allowed."
        if problem is not None:
            body = error_body(problem, status=503, code="not_ready")
            return JSONResponse(body, status_code=503, headers={"retry-after": "1"})
        stats = served.engine.stats() if served.engine is not None else None
        facts = {"running": stats.running, "waiting": stats.waiting, "steps": stats.num_steps} if stats else {}
        return JSONResponse({"status": "ready", "silent_seconds": round(silence, 3), **facts})

    async def metrics(self) -> Response:
        """Send all counts in Prometheus' text format."""
        return Response(self.served.metrics.render(), media_type="text/plain; version=0.0.4")


class FrontDoor:
    """What every request passes: request ids, security headers, and a refusal of other sites' scripts.

    A page of another site may send requests to this machine from a visitor's browser. Its ``Origin`` gives it away;
    a name that it made point here (DNS rebinding) shows in ``Host``, which must be this machine's own name when the
    request came over the loopback address. Programs send no ``Origin`` and are not concerned.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        allowed_hosts: tuple[str, ...],
        allowed_origins: tuple[str, ...] = (),
    ):
        self.app = app
        self.metrics = metrics
        self.allowed_hosts = frozenset(h.lower() for h in allowed_hosts)
        self.allowed_origins = frozenset(o.lower() for o in allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or refuse it."""
        if scope["type"] == "websocket":
            await self._let_socket_in(scope, receive, send)
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        request_id = headers.get(b"x-request-id", "")
        if not (request_id.isascii() and request_id.isprintable() and 0 < len(request_id) <= 128):
            request_id = secrets.token_hex(12)
        scope["path"] = _single_slashes(scope["path"])
        if b"traceparent" in headers:
            current_headers.set({name: headers.get(name.encode(), "") for name in ("traceparent", "tracestate")})

        is_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                own = [*SECURITY_HEADERS, (b"x-request-id", request_id.encode())]
                message["headers"] = [*message.get("headers", []), *own]
                route = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        server = (scope.get("server") or ("",))[0] or ""
        refusal = None
        if INSIDE not in scope:
            refusal = self._refusal(server, headers.get(b"host", ""), headers.get(b"origin"))
        if refusal is not None:
            await error_response(refusal, scope["path"])(scope, receive, send_with_headers)
            return
        try:
            await self.app(scope, receive, send_with_headers)
        except ClientDisconnect:
            pass  # it left while sending its body
        except Exception as error:
            if is_started:
                raise
            await error_response(error, scope["path"])(scope, receive, send_with_headers)

    async def _let_socket_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        server = (scope.get("server") or ("",))[0] or ""
        if self._refusal(server, headers.get(b"host", ""), headers.get(b"origin")) is None:
            await self.app(scope, receive, send)
        else:
            await refuse_socket(receive, send)

    def _refusal(self, server: str, host: str, origin: str | None) -> RequestError | None:
        names = self.allowed_hosts | (LOOPBACK_NAMES if _is_loopback(server) else frozenset())
        if names and _host_name(host) not in names:
            message = f"This server is not called {host!r}. Use one of: {', '.join(sorted(names))}."
            return RequestError(message, code="unknown_host", status=403)
        is_own = origin is None or origin.partition("://")[2].lower() == host.lower()
        if origin is not None and not is_own and origin.lower() not in self.allowed_origins:
            message = f"A page of {origin} may not use this server; only its own page may."
            return RequestError(message, code="foreign_origin", status=403)
        return None


def _single_slashes(path: str) -> str:
    # A base URL configured with a slash at its end makes clients ask for /v1//models.
    while "//" in path:
        path = path.replace("//", "/")
    return path


def _host_name(host: str) -> str:
    """Return the name in a Host header, without its port.

    >>> _host_name("localhost:8000"), _host_name("[::1]:8000"), _host_name("Example.org")
    ('localhost', '[::1]', 'example.org')
    """
    if host.startswith("["):
        return host.partition("]")[0].lower() + "]"
    return host.partition(":")[0].lower()


@functools.cache
def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def serve(
    app: FastAPI,
    host: str = "127.0.0.1",
    port: int = 8000,
    tls: tuple[Path, Path | None] | None = None,
    head_seconds: float = HEAD_SECONDS,
) -> None:
    """Run the application until it is interrupted.

    Args:
        app: What `create_app` returned.
        host: Address to listen on.
        port: Port to listen on.
        tls: A certificate chain and its key in PEM (None: the key stands in the same file); None: plain HTTP.
        head_seconds: How long the head of a request may take to arrive.

    Raises:
        ConfigError: The certificate or its key cannot be read, or they do not belong together.
        DeviceError: The port is in use.
    """
    check_port(host, port)
    files: dict[str, Any] = {}
    if tls is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(*tls)
        except (OSError, ssl.SSLError) as error:
            message = (
                f"The certificate {tls[0]} with the key {tls[1] or tls[0]} cannot be used: {error}. Give both as PEM."
            )
            raise ConfigError(message) from error
        files = {"ssl_certfile": str(tls[0]), "ssl_keyfile": str(tls[1]) if tls[1] else None}
    # Open streams would hold a shutdown up for as long as they last.
    http = Listener.within(head_seconds)
    config = uvicorn.Config(
        app, host=host, port=port, http=http, log_level="warning", timeout_graceful_shutdown=5, **files
    )
    uvicorn.Server(config).run()
