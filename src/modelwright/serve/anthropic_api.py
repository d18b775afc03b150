"""Anthropic's Messages API over the language model: whole, streamed, with tools; and its count of tokens.

A whole message is put together from the events of its stream, so the two cannot disagree.

Source: the Anthropic API reference, "Messages" and "Streaming messages". Not done: batches, thinking, files.
"""

import contextlib
import json
import secrets
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from modelwright.base.errors import RequestError
from modelwright.base.types import Usage
from modelwright.serve import anthropic_fields, fields, language, tools
from modelwright.serve.body import read_json
from modelwright.serve.errors import CLIENT_CLOSED_REQUEST, anthropic_body, describe
from modelwright.serve.events import ClientGoneError, EventStream, event, while_connected
from modelwright.serve.openai_api import NO_USAGE, Pieces, timed
from modelwright.serve.served import Piece, Served
from modelwright.serve.tool_calls import CallDelta
from modelwright.serve.web import FastAPI, JSONResponse, Request, Response

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
Event = dict[str, Any]


class MessageEvents:
    """Turns the pieces of one answer into the events of a message.

    Args:
        model: The name that the message carries.
        num_prompt: Tokens of the prompt.
        tokenizer: To find the stop sequence that ended the answer.
        stops: The stop sequences of the request.
    """

    def __init__(self, model: str, num_prompt: int, tokenizer: Any, stops: list[str]):
        self._tokenizer = tokenizer
        self._stops = stops
        self._ids: list[int] = []
        self._index = -1  # of the newest block
        self._kind: str | None = None  # of the block that is open
        self.message: Event = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Usage(num_prompt, 0)),
        }

    async def stream(self, pieces: Pieces) -> AsyncGenerator[Event, None]:
        """Yield the events; the first comes with the first piece, so that a request that fails has its own status."""
        is_begun = False
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                if not is_begun:
                    yield {"type": "message_start", "message": self.message}
                    yield {"type": "ping"}
                    is_begun = True
                for made in self._of(piece):
                    yield made

    def _of(self, piece: Piece) -> list[Event]:
        self._ids += piece.token_ids
        made: list[Event] = []
        if piece.text:
            if self._kind != "text":
                made += self._open("text", {"type": "text", "text": ""})
            made.append(self._delta({"type": "text_delta", "text": piece.text}))
        for call in piece.calls:
            made += self._call(call)
        if piece.finish_reason is not None:
            stop = self._matched() if piece.finish_reason == "stop" else None
            reason = "stop_sequence" if stop is not None else REASONS.get(piece.finish_reason, "end_turn")
            ending = {"stop_reason": reason, "stop_sequence": stop}
            made += self._close()
            made.append({"type": "message_delta", "delta": ending, "usage": _usage(piece.usage or NO_USAGE)})
            made.append({"type": "message_stop"})
        return made

    def _call(self, call: CallDelta) -> list[Event]:
        made: list[Event] = []
        if call.id is not None:
            made += self._open("tool_use", {"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        if call.arguments:
            made.append(self._delta({"type": "input_json_delta", "partial_json": call.arguments}))
        return made

    def _open(self, kind: str, block: Event) -> list[Event]:
        made = self._close()
        self._index += 1
        self._kind = kind
        return [*made, {"type": "content_block_start", "index": self._index, "content_block": block}]

    def _delta(self, delta: Event) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> list[Event]:
        if self._kind is None:
            return []
        self._kind = None
        return [{"type": "content_block_stop", "index": self._index}]

    def _matched(self) -> str | None:
        """Return the stop sequence that ended the answer: it stands in what the model wrote."""
        text = self._tokenizer.decode(self._ids) if self._stops else ""
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        return min(found)[2] if found else None


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


async def whole_message(events: AsyncGenerator[Event, None]) -> Event:
    """Return the message that a stream of events builds up; a call that was cut off is left out."""
    message: Event = {}
    blocks: list[Event] = []
    written: list[str] = []
    async with contextlib.aclosing(events):
        async for made in events:
            if made["type"] == "message_start":
                message = dict(made["message"])
            elif made["type"] == "content_block_start":
                blocks.append(dict(made["content_block"]))
                written.append("")
            elif made["type"] == "content_block_delta":
                delta = made["delta"]
                written[-1] += delta.get("text", "") + delta.get("partial_json", "")
            elif made["type"] == "message_delta":
                message |= {**made["delta"], "usage": made["usage"]}
    filled = [_filled(block, text) for block, text in zip(blocks, written, strict=True)]
    return {**message, "content": [block for block in filled if block is not None]}


def _filled(block: Event, text: str) -> Event | None:
    if block["type"] == "text":
        return {**block, "text": text}
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return {**block, "input": value} if isinstance(value, dict) else None


async def _encoded(events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(events):
        async for made in events:
            yield named_event(made)


def named_event(value: Event) -> bytes:
    r"""Return one event with its name.

    >>> named_event({"type": "ping"})
    b'event: ping\ndata: {"type":"ping"}\n\n'
    """
    return f"event: {value['type']}\n".encode() + event(value)


class AnthropicRoutes:
    """The handlers of one application."""

    def __init__(self, served: Served):
        self.served = served

    def install(self, app: FastAPI) -> None:
        """Add the routes to ``app``."""
        app.add_api_route("/v1/messages", self.create, methods=["POST"])
        app.add_api_route("/v1/messages/count_tokens", self.count, methods=["POST"])

    async def _read(self, request: Request, implemented: frozenset[str]) -> dict[str, Any]:
        served = self.served
        body = await read_json(request, served.config.max_body_bytes, served.config.body_timeout_seconds)
        if served.check_writer(body.get("model")) not in (served.model_name, *served.adapter_names):
            message = f"{body['model']} answers on /v1/chat/completions; this route takes a language model."
            raise RequestError(message, param="model", code="unsupported_model")
        anthropic_fields.check_names(body, implemented)
        return body

    async def create(self, request: Request) -> Response:
        """Answer a conversation."""
        served = self.served
        body = await self._read(request, anthropic_fields.IMPLEMENTED)
        is_streamed = fields.flag(body, "stream")
        asked = anthropic_fields.chat_body(body)
        served.admit()
        num_prompt, streams = await language.chat_pieces(served, {**asked, "model": body["model"]})
        made = MessageEvents(body["model"], num_prompt, served.tokenizer, asked["stop"])
        events = made.stream(timed(served, body["model"], streams[0]))
        if is_streamed:
            return EventStream(_encoded(events), lambda e: named_event(anthropic_body(*describe(e))))
        try:
            return JSONResponse(await while_connected(request, whole_message(events)))
        except ClientGoneError:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def count(self, request: Request) -> Response:
        """Count the tokens of a prompt."""
        body: Mapping[str, Any] = await self._read(request, anthropic_fields.PROMPT)
        asked = anthropic_fields.prompt_body(body)
        shown = tools.read_plan(asked).shown
        ids, _ = await language.chat_prompt(self.served, asked, shown)
        return JSONResponse({"input_tokens": len(ids)})
