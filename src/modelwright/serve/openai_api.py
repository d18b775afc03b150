"""OpenAI's API over whatever is served: models, chat completions, text completions, tokenize, detokenize.

A streamed answer and a whole one are made from the same pieces, so they are the same text. The work behind an
answer stops when its client goes away, streaming or not.

Source: the OpenAI API reference; vLLM for /tokenize and /detokenize.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from modelwright.base.errors import RequestError
from modelwright.base.types import Usage
from modelwright.serve import documents, fields, language
from modelwright.serve.body import read_json
from modelwright.serve.events import DONE, ClientGoneError, EventStream, event, gather_streams, while_connected
from modelwright.serve.metrics import Timer
from modelwright.serve.replies import Reply, sum_usage, usage_object
from modelwright.serve.served import Piece, Served
from modelwright.serve.web import FastAPI, JSONResponse, Request, Response

Pieces = AsyncGenerator[Piece, None]
CLIENT_CLOSED_REQUEST = 499  # nginx's name for an answer that nobody waits for
NO_USAGE = Usage(0, 0)


async def timed(served: Served, model: str, pieces: Pieces) -> Pieces:
    """Pass pieces on while counting and timing them."""
    timer = Timer(served.metrics, model)
    gauge = served.metrics.running.labels(model)
    gauge.inc()
    served.pulse.start()
    try:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                timer.lap()
                served.pulse.beat()
                yield piece
                if piece.usage is not None:
                    served.metrics.count_usage(piece.usage)
                    timer.finish()
    except (asyncio.CancelledError, GeneratorExit):
        served.metrics.cut_off.inc()
        raise
    finally:
        gauge.dec()
        served.pulse.stop()


async def chat_events(reply: Reply, pieces: Pieces, how: fields.Streaming) -> AsyncGenerator[bytes, None]:
    """Yield the server-sent events of a chat answer."""
    is_first, usage = True, NO_USAGE
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            if is_first:
                yield _chunk(reply.chat_chunk({"role": "assistant", "content": ""}), how)
                is_first = False
            if piece.text:
                yield _chunk(reply.chat_chunk({"content": piece.text}), how)
            if piece.finish_reason is not None:
                usage = piece.usage or NO_USAGE
                yield _chunk(reply.chat_chunk(piece.extra, piece.finish_reason), how)
    if how.include_usage:
        yield event(reply.usage_chunk("chat.completion.chunk", usage))
    yield DONE


def _chunk(chunk: dict[str, Any], how: fields.Streaming) -> bytes:
    # With include_usage every chunk but the last says "usage": null, as the reference has it.
    return event({**chunk, "usage": None} if how.include_usage else chunk)


async def whole_chat(reply: Reply, pieces: Pieces) -> dict[str, Any]:
    """Return a chat answer as one object."""
    texts, last = [], Piece("")
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            texts.append(piece.text)
            last = piece
    body = reply.chat("".join(texts), last.finish_reason, last.extra)
    return {**body, "usage": usage_object(last.usage or NO_USAGE)}


async def completion_events(reply: Reply, streams: list[Pieces], how: fields.Streaming) -> AsyncGenerator[bytes, None]:
    """Yield the server-sent events of a completion of one or many prompts, interleaved as they come."""
    usages = []
    async with contextlib.aclosing(gather_streams(streams)) as items:
        async for index, piece in items:
            choice = reply.text_choice(index, piece.text, piece.finish_reason)
            yield _chunk(reply.frame("text_completion", [choice]), how)
            if piece.usage is not None:
                usages.append(piece.usage)
    if how.include_usage:
        yield event(reply.usage_chunk("text_completion", sum_usage(usages)))
    yield DONE


async def whole_completion(reply: Reply, streams: list[Pieces]) -> dict[str, Any]:
    """Return the completion of one or many prompts as one object."""
    texts = [""] * len(streams)
    reasons: list[str | None] = [None] * len(streams)
    usages = []
    async with contextlib.aclosing(gather_streams(streams)) as items:
        async for index, piece in items:
            texts[index] += piece.text
            reasons[index] = piece.finish_reason
            if piece.usage is not None:
                usages.append(piece.usage)
    choices = [reply.text_choice(i, t, r) for i, (t, r) in enumerate(zip(texts, reasons, strict=True))]
    return {**reply.frame("text_completion", choices), "usage": usage_object(sum_usage(usages))}


class OpenAIRoutes:
    """The handlers of one application."""

    def __init__(self, served: Served):
        self.served = served

    def install(self, app: FastAPI) -> None:
        """Add the routes to ``app``."""
        app.add_api_route("/v1/models", self.list_models, methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", self.show_model, methods=["GET"])
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_api_route("/v1/completions", self.complete, methods=["POST"])
        app.add_api_route("/tokenize", self.tokenize, methods=["POST"])
        app.add_api_route("/detokenize", self.detokenize, methods=["POST"])

    async def _read(self, request: Request) -> dict[str, Any]:
        return await read_json(request, self.served.config.max_body_bytes, self.served.config.body_timeout_seconds)

    def _model_object(self, name: str) -> dict[str, Any]:
        served = self.served
        described = {"id": name, "object": "model", "created": served.created, "owned_by": "modelwright"}
        if served.engine is not None and name == served.model_name:
            described["max_model_len"] = served.max_context
        return described

    async def list_models(self) -> JSONResponse:
        """List what can be asked."""
        return JSONResponse({"object": "list", "data": [self._model_object(n) for n in self.served.model_names]})

    async def show_model(self, name: str) -> JSONResponse:
        """Describe one model."""
        return JSONResponse(self._model_object(self.served.check_model(name)))

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        served = self.served
        body = await self._read(request)
        name = served.check_model(body.get("model"))
        fields.check_names(body, fields.CHAT)
        how = fields.streaming(body)
        served.admit()
        answer = documents.answer_pieces if name == served.documents_name else language.chat_pieces
        pieces = timed(served, name, await answer(served, body))
        reply = Reply(name, "chatcmpl")
        if how.is_on:
            return EventStream(chat_events(reply, pieces, how))
        return await self._whole(request, whole_chat(reply, pieces))

    async def complete(self, request: Request) -> Response:
        """Continue one prompt or many."""
        served = self.served
        body = await self._read(request)
        name = served.check_model(body.get("model"))
        if name != served.model_name:
            message = f"{name} answers questions; it does not continue texts. Use /v1/chat/completions."
            raise RequestError(message, param="model", code="unsupported_model")
        fields.check_names(body, fields.COMPLETIONS)
        how = fields.streaming(body)
        served.admit()
        prompts = fields.prompts(body, served.config.max_prompts)
        streams = [timed(served, name, await language.completion_pieces(served, p, body)) for p in prompts]
        reply = Reply(name, "cmpl")
        if how.is_on:
            return EventStream(completion_events(reply, streams, how))
        return await self._whole(request, whole_completion(reply, streams))

    async def _whole(self, request: Request, work: Any) -> Response:
        try:
            return JSONResponse(await while_connected(request, work))
        except ClientGoneError:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def tokenize(self, request: Request) -> JSONResponse:
        """Return the ids of a text (``prompt``) or of a conversation (``messages``)."""
        body = await self._read(request)
        served = self._check_tokenizer(body)
        fields.check_names(body, frozenset({"model", "prompt", "messages", "add_special_tokens"}))
        if "messages" in body:
            ids = await language.chat_ids(served, fields.messages(body))
        else:
            if not isinstance(body.get("prompt"), str):
                fields.refuse("prompt", body.get("prompt"), "a text; or send messages")
            ids = await language.encode(served, body["prompt"])
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": served.max_context})

    async def detokenize(self, request: Request) -> JSONResponse:
        """Return the text of token ids."""
        body = await self._read(request)
        served = self._check_tokenizer(body)
        fields.check_names(body, frozenset({"model", "tokens"}))
        assert served.tokenizer is not None
        ids = language.check_ids(body.get("tokens"), "tokens", served.tokenizer.vocab_size)
        return JSONResponse({"prompt": served.tokenizer.decode(ids, skip_special_tokens=False)})

    def _check_tokenizer(self, body: Mapping[str, Any]) -> Served:
        if body.get("model") is not None:
            self.served.check_model(body["model"])
        if self.served.engine is None:
            raise RequestError("No language model is served here, so there are no tokens.", code="unsupported_model")
        return self.served
