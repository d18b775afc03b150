"""Reading a request body: a size limit, a time limit, and JSON that is strict about what later code relies on.

Why not the framework's own models: it answers a wrong type with HTTP 422 and its own body, which OpenAI clients
do not understand, and it reads a body of any size into memory.
"""

import asyncio
import json
from typing import Any

from modelwright.base.errors import RequestError
from modelwright.serve.web import Request

DRAIN_FACTOR = 8  # how much of a refused body is still read, so that the client can see the refusal


async def read_json(request: Request, max_bytes: int, timeout_seconds: float) -> dict[str, Any]:
    """Return the body of ``request`` as a JSON object.

    Raises:
        RequestError: The body is too large (413), too slow (408), or not a JSON object of valid text (400).
    """
    return parse_json(await read_body(request, max_bytes, timeout_seconds))


async def read_body(request: Request, max_bytes: int, timeout_seconds: float) -> bytes:
    """Return the body of ``request`` as it is.

    Raises:
        RequestError: The body is too large (413) or too slow (408).
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            return await _read(request, max_bytes)
    except TimeoutError:
        message = f"The body did not arrive within {timeout_seconds:g} seconds. Send it again, or send less."
        raise RequestError(message, code="request_timeout", status=408) from None


async def _read(request: Request, max_bytes: int) -> bytes:
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size <= max_bytes:
            pieces.append(piece)
        else:
            pieces.clear()
        if size > DRAIN_FACTOR * max_bytes:
            break
    if size > max_bytes:
        message = f"The body is larger than {max_bytes} bytes, the most that this server takes. Send less text."
        raise RequestError(message, code="request_too_large", status=413)
    return b"".join(pieces)


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    >>> parse_json(b'{"a": 1}')
    {'a': 1}
    """
    try:
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:
            # JSON can spell half of a surrogate pair; no tokenizer or UTF-8 response could carry it.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise _malformed(f"it is not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise _malformed("a text in it holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise _malformed("it is nested too deeply") from None
    except ValueError as error:
        raise _malformed(str(error)) from None
    if not isinstance(value, dict):
        raise _malformed(f"it is a {type(value).__name__}; expected an object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _malformed(reason: str) -> RequestError:
    return RequestError(f"The body is not the JSON that this server takes: {reason}.", code="malformed_json")
