"""Errors as OpenAI clients read them, ``{"error": {"message", "type", "param", "code"}}``; Anthropic's on its routes.

One rule above all: a client's mistake is never 5xx, because clients retry 5xx. What the house raises on purpose
keeps its own words; anything else is a fault of ours, is logged with its traceback and told without details.
"""

import logging
from typing import Any

from modelwright.base.errors import CapacityError, DataError, ModelwrightError, RequestError
from modelwright.serve.web import FastAPI, HTTPException, JSONResponse, Receive, Request, Response, Send

LOG = logging.getLogger(__name__)
RETRY_AFTER_SECONDS = "1"
CLIENT_CLOSED_REQUEST = 499  # nginx's name for an answer that nobody waits for
# What OpenAI calls the kind of error, by HTTP status.
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "service_unavailable"}
ANTHROPIC_PATH = "/v1/messages"
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class EngineDownError(ModelwrightError):
    """The engine has stopped; no request can be answered until the server is started again."""


class ReplicaLostError(CapacityError):
    """The process that worked on the request has ended; another one may answer it."""


def error_body(message: str, *, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return the OpenAI error body for a status."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status and the error body that tell a client what happened."""
    if isinstance(error, RequestError):
        return error.status, error_body(str(error), status=error.status, code=error.code, param=error.param)
    if isinstance(error, CapacityError):
        found = "replica_lost" if isinstance(error, ReplicaLostError) else "overloaded"
        return 503, error_body(str(error), status=503, code=found)
    if isinstance(error, EngineDownError):
        return 503, error_body(str(error), status=503, code="engine_down")
    if isinstance(error, DataError):
        return 400, error_body(str(error), status=400, code="invalid_data")
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return error.status_code, error_body(str(error.detail), status=error.status_code, code=code)
    LOG.exception("A request failed for a reason of ours.", exc_info=error)
    message = (
        "The server failed to answer; the reason is in its log. This is a fault of the server, not of the request."
    )
    return 500, error_body(message, status=500, code="internal_error")


def anthropic_body(status: int, body: dict[str, Any]) -> dict[str, Any]:
    """Return an error body in Anthropic's form."""
    kind = ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": body["error"]["message"]}}


def error_response(error: Exception, path: str = "") -> Response:
    """Return the HTTP answer to a failed request to ``path``."""
    status, body = describe(error)
    if path.startswith(ANTHROPIC_PATH):
        body = anthropic_body(status, body)
    headers = {"retry-after": str(getattr(error, "retry_after", RETRY_AFTER_SECONDS))} if status in (429, 503) else {}
    if status == 504:
        headers["x-should-retry"] = "false"  # the same request would take as long again
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, HTTPException) and error.headers:
        headers.update(error.headers)
    return JSONResponse(body, status_code=status, headers=headers)


async def refuse_socket(receive: Receive, send: Send) -> None:
    """Close a WebSocket before it opens, which its client sees as HTTP 403."""
    await receive()  # the wish to connect
    await send({"type": "websocket.close", "code": 1008})


async def _handle(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 404:
        error = HTTPException(404, f"There is nothing at {request.method} {request.url.path}.")
    if isinstance(error, HTTPException) and error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{request.url.path} does not take {request.method}; use {allowed}."
        error = HTTPException(405, message, headers=error.headers)
    return error_response(error, request.url.path)


def install_handlers(app: FastAPI) -> None:
    """Make the errors that ``app`` raises on purpose leave in the form of the API that was asked."""
    for kind in (ModelwrightError, HTTPException):
        app.add_exception_handler(kind, _handle)
