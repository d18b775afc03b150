"""OpenAI's API over whatever is served: models, chat completions, text completions, tokenize, detokenize.

A streamed answer and a whole one are made from the same pieces, so they are the same text. The work behind an
answer stops when its client goes away, streaming or not.

Source: the OpenAI API reference; vLLM for /tokenize and /detokenize.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelwright.base.errors import RequestError
from modelwright.base.types import Usage
from modelwright.serve import documents, fields, language, tools
from modelwright.serve.body import read_json
from modelwright.serve.errors import CLIENT_CLOSED_REQUEST
from modelwright.serve.events import DONE, ClientGoneError, EventStream, event, gather_streams, while_connected
from modelwright.serve.keys import current_key
from modelwright.serve.metrics import Timer
from modelwright.serve.probabilities import Spelling, chat_logprobs, text_logprobs
from modelwright.serve.replies import Collected, Reply, call_chunk, sum_usage, thought, usage_object
from modelwright.serve.served import Piece, Served, Token
from modelwright.serve.web import FastAPI, JSONResponse, Request, Response

Pieces = AsyncGenerator[Piece, None]
NO_USAGE = Usage(0, 0)


async def timed(served: Served, model: str, pieces: Pieces, *, is_first: bool = True) -> Pieces:
    """Pass pieces on while counting and timing them; a prompt counts with the first of its completions.

    Of an answer that its client leaves, the key pays for the tokens that were written.
    """
    timer, key, num_written = Timer(served.metrics, model), current_key.get(), 0
    gauge = served.metrics.running.labels(model)
    gauge.inc()
    served.pulse.start()
    try:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                timer.lap()
                served.pulse.beat()
                num_written += len(piece.token_ids)
                yield piece
                if piece.usage is not None:
                    usage = piece.usage if is_first else Usage(0, piece.usage.completion_tokens)
                    served.metrics.count_usage(usage)
                    if key is not None:
                        key.spend(usage.prompt_tokens + usage.completion_tokens)
                    timer.finish()
    except (asyncio.CancelledError, GeneratorExit):
        served.metrics.cut_off.inc()
        if key is not None:
            key.spend(num_written)
        raise
    finally:
        gauge.dec()
        served.pulse.stop()


async def chat_events(
    reply: Reply, streams: list[Pieces], how: fields.Streaming, spelling: Spelling | None
) -> AsyncGenerator[bytes, None]:
    """Yield the server-sent events of a chat answer, of several choices as they come."""
    usages: list[Usage] = []
    begun: set[int] = set()
    async with contextlib.aclosing(gather_streams(streams)) as items:
        async for index, piece in items:
            if index not in begun:
                yield _chunk(reply.chat_chunk(index, {"role": "assistant", "content": ""}), how)
                begun.add(index)
            if piece.reasoning:
                yield _chunk(reply.chat_chunk(index, thought(piece.reasoning)), how)
            if piece.text or piece.tokens:
                told = chat_logprobs(spelling, piece.tokens) if spelling is not None and piece.tokens else None
                yield _chunk(reply.chat_chunk(index, {"content": piece.text}, logprobs=told), how)
            for call in piece.calls:
                yield _chunk(reply.chat_chunk(index, {"tool_calls": [call_chunk(call)]}), how)
            if piece.finish_reason is not None:
                usages.append(piece.usage or NO_USAGE)
                yield _chunk(reply.chat_chunk(index, piece.extra, piece.finish_reason), how)
    if how.include_usage:
        yield event(reply.usage_chunk("chat.completion.chunk", _shared_usage(usages)))
    yield DONE


def _chunk(chunk: dict[str, Any], how: fields.Streaming) -> bytes:
    # With include_usage every chunk but the last says "usage": null, as the reference has it.
    return event({**chunk, "usage": None} if how.include_usage else chunk)


def _shared_usage(usages: list[Usage]) -> Usage:
    """Return the usage of several completions of one prompt, which counts once."""
    if not usages:
        return NO_USAGE
    written = sum(u.completion_tokens for u in usages)
    return Usage(usages[0].prompt_tokens, written, max(u.cached_tokens for u in usages))


def _whole_usage(usages: list[Usage], num_each: int) -> Usage:
    """Return the usage of several prompts, of each of which so many completions stand together."""
    return sum_usage([_shared_usage(usages[i : i + num_each]) for i in range(0, len(usages), num_each)])


async def collect(streams: list[Pieces]) -> list[Collected]:
    """Return the whole answer of each stream."""
    answers = [Collected() for _ in streams]
    async with contextlib.aclosing(gather_streams(streams)) as items:
        async for index, piece in items:
            answers[index].add(piece)
    return answers


async def whole_chat(reply: Reply, streams: list[Pieces], spelling: Spelling | None) -> dict[str, Any]:
    """Return a chat answer as one object."""
    answers = await collect(streams)
    told = [None if spelling is None else chat_logprobs(spelling, answer.tokens) for answer in answers]
    choices = [reply.chat_choice(i, answer, told[i]) for i, answer in enumerate(answers)]
    usage = _shared_usage([answer.last.usage or NO_USAGE for answer in answers])
    return {**reply.frame("chat.completion", choices), "usage": usage_object(usage)}


async def completion_events(
    reply: Reply, streams: list[Pieces], how: fields.Streaming, told: "Told | None", num_each: int
) -> AsyncGenerator[bytes, None]:
    """Yield the server-sent events of ``num_each`` completions of one or many prompts, interleaved as they come."""
    usages = [NO_USAGE] * len(streams)
    offsets = [0] * len(streams)
    async with contextlib.aclosing(gather_streams(streams)) as items:
        async for index, piece in items:
            if not (piece.text or piece.tokens or piece.finish_reason):
                continue
            logprobs = None if told is None else told.of(piece.tokens, offsets[index])
            offsets[index] += sum(len(text) for text in (logprobs or {}).get("tokens", ()))
            choice = reply.text_choice(index, piece.text, piece.finish_reason, logprobs)
            yield _chunk(reply.frame("text_completion", [choice]), how)
            if piece.usage is not None:
                usages[index] = piece.usage
    if how.include_usage:
        yield event(reply.usage_chunk("text_completion", _whole_usage(usages, num_each)))
    yield DONE


async def whole_completion(reply: Reply, streams: list[Pieces], told: "Told | None", num_each: int) -> dict[str, Any]:
    """Return ``num_each`` completions of one or many prompts as one object."""
    answers = await collect(streams)
    choices = [
        reply.text_choice(i, a.text, a.last.finish_reason, None if told is None else told.of(a.tokens, 0))
        for i, a in enumerate(answers)
    ]
    usage = _whole_usage([answer.last.usage or NO_USAGE for answer in answers], num_each)
    return {**reply.frame("text_completion", choices), "usage": usage_object(usage)}


@dataclass(frozen=True)
class Told:
    """How a completion request wants its log-probabilities."""

    spelling: Spelling
    num_top: int

    def of(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        """Return the ``logprobs`` object of some tokens."""
        return text_logprobs(self.spelling, tokens, offset, self.num_top > 0)


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
        if served.engine is not None and name in (served.model_name, *served.adapter_names):
            if name != served.model_name:
                described["parent"] = served.model_name
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
        body = await self._read(request)
        reply, streams, how, spelling = await self._begin_chat(body)
        if how.is_on:
            return EventStream(chat_events(reply, streams, how, spelling))
        return await self._whole(request, whole_chat(reply, streams, spelling))

    async def chat_stream(self, body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        """Check a chat request and return the events of its answer."""
        return chat_events(*await self._begin_chat(body))

    async def _begin_chat(self, body: dict[str, Any]) -> tuple[Reply, list[Pieces], fields.Streaming, Spelling | None]:
        served = self.served
        name = served.check_writer(body.get("model"))
        is_quoted = name == served.documents_name
        fields.check_names(body, fields.DOCUMENTS if is_quoted else fields.CHAT)
        how = fields.streaming(body)
        served.admit(1 if is_quoted else fields.num_completions(body))
        if is_quoted:
            made = [await documents.answer_pieces(served, body)]
        else:
            _, made = await language.chat_pieces(served, body)
        streams = [timed(served, name, pieces, is_first=i == 0) for i, pieces in enumerate(made)]
        spelling = Spelling(served.tokenizer) if body.get("logprobs") and not is_quoted else None
        return Reply(name, "chatcmpl"), streams, how, spelling

    async def complete(self, request: Request) -> Response:
        """Continue one prompt or many."""
        served = self.served
        body = await self._read(request)
        name = served.check_writer(body.get("model"))
        if name not in (served.model_name, *served.adapter_names):
            message = f"{name} answers questions; it does not continue texts. Use /v1/chat/completions."
            raise RequestError(message, param="model", code="unsupported_model")
        fields.check_names(body, fields.COMPLETIONS)
        how = fields.streaming(body)
        prompts = fields.prompts(body, served.config.max_prompts)
        served.admit(len(prompts) * fields.num_completions(body))
        made = [await language.completion_pieces(served, prompt, body) for prompt in prompts]
        streams = [timed(served, name, one, is_first=i == 0) for choices in made for i, one in enumerate(choices)]
        num_top = fields.whole(body, "logprobs", None)
        told = None if num_top is None else Told(Spelling(served.tokenizer), num_top)
        reply = Reply(name, "cmpl")
        if how.is_on:
            return EventStream(completion_events(reply, streams, how, told, len(made[0])))
        return await self._whole(request, whole_completion(reply, streams, told, len(made[0])))

    async def _whole(self, request: Request, work: Any) -> Response:
        try:
            return JSONResponse(await while_connected(request, work))
        except ClientGoneError:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def tokenize(self, request: Request) -> JSONResponse:
        """Return the ids of a text (``prompt``) or of a conversation (``messages``)."""
        body = await self._read(request)
        served = self._check_tokenizer(body)
        fields.check_names(body, frozenset({"model", "prompt", "messages", "tools", "add_special_tokens"}))
        if "messages" in body:
            ids, _ = await language.chat_prompt(served, body, tools.read_plan(body).shown)
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
            self.served.check_writer(body["model"])
        if self.served.engine is None:
            raise RequestError("No language model is served here, so there are no tokens.", code="unsupported_model")
        return self.served
