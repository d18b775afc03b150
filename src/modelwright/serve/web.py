"""The web framework, in one place: FastAPI is an optional extra, and its absence is told in words.

The rest of this room imports these names from here.
"""

from modelwright.base.errors import MissingExtraError

try:
    import prometheus_client
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response
    from prometheus_client.parser import text_string_to_metric_families
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from starlette.websockets import WebSocket, WebSocketDisconnect
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise MissingExtraError(error.name or "fastapi", "serve", "The server") from error

# Marks a request that the server makes to itself, which has passed the doors before; no client can set it.
INSIDE = "modelwright.inside"

__all__ = [
    "INSIDE",
    "ASGIApp",
    "CORSMiddleware",
    "ClientDisconnect",
    "FastAPI",
    "H11Protocol",
    "HTTPException",
    "JSONResponse",
    "Message",
    "Receive",
    "Request",
    "Response",
    "Scope",
    "Send",
    "WebSocket",
    "WebSocketDisconnect",
    "prometheus_client",
    "text_string_to_metric_families",
    "uvicorn",
]
