"""OpenAI's Responses API over the language model: whole, streamed, with functions, and going on from an earlier answer.

A whole response is put together from the events of its stream, so the two cannot disagree. Responses are kept in
memory, the newest of them, each for the key that made it; a restart forgets them.

Source: the OpenAI API reference, "Responses" and "Streaming events". Not done: work in the background, conversations
as objects, built-in tools, reasoning items.
"""

import contextlib
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelwright.base.errors import RequestError
from modelwright.base.types import Usage
from modelwright.serve import fields, language, responses_fields, tools
from modelwright.serve.anthropic_api import named_event
from modelwright.serve.body import read_json
from modelwright.serve.errors import CLIENT_CLOSED_REQUEST, describe
from modelwright.serve.events import ClientGoneError, EventStream, while_connected
from modelwright.serve.keys import current_key
from modelwright.serve.openai_api import NO_USAGE, Pieces, timed
from modelwright.serve.responses_fields import Turn
from modelwright.serve.served import Piece, Served
from modelwright.serve.tool_calls import CallDelta
from modelwright.serve.web import FastAPI, JSONResponse, Request, Response

MAX_STORED = 512
Event = dict[str, Any]


class ResponseEvents:
    """Turns the pieces of one answer into the events of a response.

    ``response`` is the object as it stands; after the last event it is the whole response.
    """

    def __init__(self, response: Event):
        self.response = response
        self._number = 0
        self._text = ""  # of the message that is open
        self._is_message_open = False
        self._arguments = ""  # of the call that is open
        self._is_call_open = False

    async def stream(self, pieces: Pieces) -> AsyncGenerator[Event, None]:
        """Yield the events; the first comes with the first piece, so that a request that fails has its own status."""
        is_begun = False
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                made = [] if is_begun else [self._whole("response.created"), self._whole("response.in_progress")]
                is_begun = True
                for event in [*made, *self._of(piece)]:
                    yield {**event, "sequence_number": self._number}
                    self._number += 1

    def _of(self, piece: Piece) -> list[Event]:
        made: list[Event] = []
        if piece.text:
            if not self._is_message_open:
                made += [*self._close(), *self._open_message()]
            self._text += piece.text
            made.append(self._of_part("response.output_text.delta", {"delta": piece.text, "logprobs": []}))
        for call in piece.calls:
            made += self._call(call)
        if piece.finish_reason is not None:
            is_cut = piece.finish_reason == "length"
            if not self.response["output"]:
                made += self._open_message()  # an answer without a word is an empty message
            made += self._close("incomplete" if is_cut else "completed")
            made.append(self._end(is_cut, piece.usage or NO_USAGE))
        return made

    def _open_message(self) -> list[Event]:
        item = {"id": _id("msg"), "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        made = self._open(item)
        self._is_message_open, self._text = True, ""
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return [*made, self._of_part("response.content_part.added", {"part": part})]

    def _call(self, call: CallDelta) -> list[Event]:
        made: list[Event] = []
        if call.id is not None:
            item = {
                "id": _id("fc"), "type": "function_call", "call_id": call.id, "name": call.name, "arguments": "",
                "status": "in_progress",
            }  # fmt: skip
            made += [*self._close(), *self._open(item)]
            self._is_call_open, self._arguments = True, ""
        if call.arguments:
            self._arguments += call.arguments
            made.append(self._of_item("response.function_call_arguments.delta", {"delta": call.arguments}))
        return made

    def _open(self, item: Event) -> list[Event]:
        self.response["output"].append(item)
        at = len(self.response["output"]) - 1
        return [{"type": "response.output_item.added", "output_index": at, "item": dict(item)}]

    def _close(self, status: str = "completed") -> list[Event]:
        """End the item that is open."""
        if not (self._is_message_open or self._is_call_open):
            return []
        item = self.response["output"][-1]
        item["status"] = status
        if self._is_message_open:
            part = {"type": "output_text", "text": self._text, "annotations": [], "logprobs": []}
            item["content"] = [part]
            made = [
                self._of_part("response.output_text.done", {"text": self._text, "logprobs": []}),
                self._of_part("response.content_part.done", {"part": part}),
            ]
        else:
            item["arguments"] = self._arguments
            made = [self._of_item("response.function_call_arguments.done", {"arguments": self._arguments})]
            made[0]["name"] = item["name"]
        self._is_message_open = self._is_call_open = False
        at = len(self.response["output"]) - 1
        return [*made, {"type": "response.output_item.done", "output_index": at, "item": dict(item)}]

    def _end(self, is_cut: bool, usage: Usage) -> Event:
        status = "incomplete" if is_cut else "completed"
        self.response["status"] = status
        self.response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        self.response["completed_at"] = None if is_cut else time.time()
        self.response["usage"] = usage_object(usage)
        return self._whole(f"response.{status}")

    def _whole(self, kind: str) -> Event:
        return {"type": kind, "response": {**self.response, "output": [dict(i) for i in self.response["output"]]}}

    def _of_item(self, kind: str, more: Event) -> Event:
        at = len(self.response["output"]) - 1
        return {"type": kind, "item_id": self.response["output"][at]["id"], "output_index": at, **more}

    def _of_part(self, kind: str, more: Event) -> Event:
        return self._of_item(kind, {"content_index": 0, **more})


def usage_object(usage: Usage) -> Event:
    """Return the usage in the words of this API."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def answer_turn(output: Sequence[Event]) -> Turn:
    """Return what the assistant said and called, as a turn of the conversation."""
    said = "".join(part["text"] for item in output if item["type"] == "message" for part in item["content"])
    calls = [
        {"id": i["call_id"], "type": "function", "function": {"name": i["name"], "arguments": i["arguments"]}}
        for i in output
        if i["type"] == "function_call"
    ]
    return {"role": "assistant", "content": said, **({"tool_calls": calls} if calls else {})}


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"


@dataclass(frozen=True)
class Stored:
    """A response that a later request may go on from."""

    response: Event
    turns: list[Turn]  # the conversation with its answer, without instructions
    given: Any  # the input, as it came
    owner: str | None  # the key that made it


class Responses:
    """The newest responses, by id."""

    def __init__(self, most: int = MAX_STORED):
        self._kept: OrderedDict[str, Stored] = OrderedDict()
        self._most = most

    def keep(self, stored: Stored) -> None:
        """Keep one; the oldest makes room."""
        self._kept[stored.response["id"]] = stored
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def find(self, name: Any, param: str | None = None) -> Stored:
        """Return a response that the key of this request made.

        Raises:
            RequestError: There is none of that name; another key's are not told of.
        """
        stored = self._kept.get(name) if isinstance(name, str) else None
        if stored is None or stored.owner != _owner():
            message = f"The response {name!r} is not kept here (the newest {self._most} are, until a restart)."
            raise RequestError(message, param=param, code="not_found", status=404 if param is None else 400)
        return stored

    def drop(self, name: str) -> None:
        """Forget one."""
        self.find(name)
        del self._kept[name]


def _owner() -> str | None:
    key = current_key.get()
    return None if key is None else key.config.name


class ResponsesRoutes:
    """The handlers of one application."""

    def __init__(self, served: Served):
        self.served = served
        self.kept = Responses()

    def install(self, app: FastAPI) -> None:
        """Add the routes to ``app``."""
        app.add_api_route("/v1/responses", self.create, methods=["POST"])
        app.add_api_route("/v1/responses/input_tokens", self.count, methods=["POST"])
        app.add_api_route("/v1/responses/{name}", self.show, methods=["GET"])
        app.add_api_route("/v1/responses/{name}", self.delete, methods=["DELETE"])
        app.add_api_route("/v1/responses/{name}/input_items", self.show_input, methods=["GET"])

    async def create(self, request: Request) -> Response:
        """Answer."""
        served = self.served
        body, turns, asked = await self._read(request)
        is_streamed, is_stored = fields.flag(body, "stream"), responses_fields.is_stored(body)
        made = ResponseEvents(response_object(body))
        served.admit()
        _, streams = await language.chat_pieces(served, {**asked, "model": body["model"]})
        events = self._kept_at_end(made, timed(served, body["model"], streams[0]), turns, body, is_stored)
        if is_streamed:
            return EventStream(_encoded(events), lambda e: named_event(error_event(e)))
        try:
            return JSONResponse(await while_connected(request, _last(events)))
        except ClientGoneError:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def count(self, request: Request) -> JSONResponse:
        """Count the tokens of a request's prompt."""
        _, _, asked = await self._read(request)
        shown = tools.read_plan(asked).shown
        ids, _ = await language.chat_prompt(self.served, asked, shown)
        return JSONResponse({"object": "response.input_tokens", "input_tokens": len(ids)})

    async def _read(self, request: Request) -> tuple[dict[str, Any], list[Turn], dict[str, Any]]:
        """Return a request's body, its conversation without instructions, and the chat request that means the same."""
        served = self.served
        body = await read_json(request, served.config.max_body_bytes, served.config.body_timeout_seconds)
        if served.check_writer(body.get("model")) not in (served.model_name, *served.adapter_names):
            message = f"{body['model']} answers on /v1/chat/completions; this route takes a language model."
            raise RequestError(message, param="model", code="unsupported_model")
        responses_fields.check_names(body)
        turns = responses_fields.input_turns(body)
        if body.get("previous_response_id") is not None:
            turns = [*self.kept.find(body["previous_response_id"], "previous_response_id").turns, *turns]
        return body, turns, responses_fields.chat_body(body, turns)

    async def _kept_at_end(
        self, made: ResponseEvents, pieces: Pieces, turns: list[Turn], body: Mapping[str, Any], is_stored: bool
    ) -> AsyncGenerator[Event, None]:
        async with contextlib.aclosing(made.stream(pieces)) as events:
            async for event in events:
                if is_stored and event["type"] in ("response.completed", "response.incomplete"):
                    answered = [*turns, answer_turn(made.response["output"])]
                    self.kept.keep(Stored(event["response"], answered, body["input"], _owner()))
                yield event

    async def show(self, name: str) -> JSONResponse:
        """Tell a kept response again."""
        return JSONResponse(self.kept.find(name).response)

    async def delete(self, name: str) -> JSONResponse:
        """Forget a kept response."""
        self.kept.drop(name)
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    async def show_input(self, name: str) -> JSONResponse:
        """List the items that a response was asked with."""
        given = self.kept.find(name).given
        items = [{"role": "user", "content": given}] if isinstance(given, str) else given
        shown = [{"id": f"item_{i}", "type": "message", **item} for i, item in enumerate(items)]
        for item in shown:
            if isinstance(item.get("content"), str):
                item["content"] = [{"type": "input_text", "text": item["content"]}]
        ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]}
        return JSONResponse({"object": "list", "data": shown, "has_more": False, **ends})


def response_object(body: Mapping[str, Any]) -> Event:
    """Return a response that has no output yet."""
    return {
        "id": _id("resp"),
        "object": "response",
        "created_at": time.time(),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "metadata": responses_fields.metadata(body),
        "model": body["model"],
        "output": [],
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": body.get("previous_response_id"),
        "reasoning": {"effort": None, "summary": None},
        "store": responses_fields.is_stored(body),
        "temperature": fields.number(body, "temperature", 1.0),
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_p": fields.number(body, "top_p", 1.0),
        "truncation": "disabled",
        "usage": None,
        "user": body.get("user"),
    }


def error_event(error: Exception) -> Event:
    """Return the event that ends a stream which fails."""
    told = describe(error)[1]["error"]
    return {"type": "error", "code": told["code"], "message": told["message"], "param": told["param"]}


async def _encoded(events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(events):
        async for made in events:
            yield named_event(made)


async def _last(events: AsyncGenerator[Event, None]) -> Event:
    last: Event = {}
    async with contextlib.aclosing(events):
        async for made in events:
            last = made
    return dict(last["response"])
