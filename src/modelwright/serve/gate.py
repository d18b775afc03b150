"""The gate behind the front door: with keys, nobody asks anything without one.

Open without a key: the page's own files and the liveness probe, which tell nothing. The key goes with the request in a
context variable, so that the engine's cache is kept apart by key and tokens are counted where usage is known.
"""

from modelwright.base.errors import RequestError
from modelwright.serve.errors import CLIENT_CLOSED_REQUEST, error_response, refuse_socket
from modelwright.serve.keys import KeyMeter, KeyRing, current_key
from modelwright.serve.web import INSIDE, ASGIApp, Message, Receive, Scope, Send

OPEN = frozenset({"/health/live", "/health/ready"})
SCOPE_OF = {
    "/metrics": "metrics",
    "/openapi.json": "inference",
    "/v1/load_lora_adapter": "admin",
    "/v1/unload_lora_adapter": "admin",
}
GUARDED = ("/v1/", "/v2/", "/api/", "/rerank", "/score", "/tokenize", "/detokenize", "/metrics", "/openapi.json")


class Gate:
    """Lets requests with a key through, within the key's scopes and limits."""

    def __init__(self, app: ASGIApp, keys: KeyRing):
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or refuse it."""
        path = scope.get("path", "")
        if (
            scope["type"] not in ("http", "websocket")
            or INSIDE in scope
            or path in OPEN
            or not path.startswith(GUARDED)
        ):
            await self.app(scope, receive, send)
            return
        is_socket = scope["type"] == "websocket"
        is_counted = is_socket or scope.get("method") == "POST"
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            meter = self._check(scope, path)
            if is_counted:
                # Over a socket each message is a request, and has its turn where it is read.
                (meter.take_place if is_socket else meter.enter)()
        except RequestError as error:
            if is_socket:
                await refuse_socket(receive, send)
            else:
                await error_response(error, path)(scope, receive, send)
            return
        token = current_key.set(meter)
        try:
            await self.app(scope, receive, send_on)
        finally:
            current_key.reset(token)
            if is_counted:
                meter.leave()
                if 400 <= status < CLIENT_CLOSED_REQUEST:  # for that one work was done
                    meter.give_back()
                if self.keys.has_budgets:
                    self.keys.save_usage()

    def _check(self, scope: Scope, path: str) -> KeyMeter:
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"").decode("latin-1")
        kind, _, secret = given.partition(" ")
        secret = secret.strip() if kind.lower() == "bearer" else headers.get(b"x-api-key", b"").decode("latin-1")
        if not secret:
            message = "This server asks for an API key. Send it as 'Authorization: Bearer KEY'."
            raise RequestError(message, code="missing_api_key", status=401)
        meter = self.keys.find(secret)
        if meter is None:
            raise RequestError("The API key is not known here. Check it.", code="invalid_api_key", status=401)
        wanted = SCOPE_OF.get(path, "inference")
        if wanted not in meter.config.scopes and "admin" not in meter.config.scopes:
            message = f"The key {meter.config.name!r} may not use {path}; it lacks the scope {wanted!r}."
            raise RequestError(message, code="insufficient_scope", status=403)
        return meter
