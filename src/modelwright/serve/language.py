"""The language model behind a name: prompts to token ids, token ids to pieces of text."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from modelwright.base.errors import ConfigError, ModelwrightError, RequestError
from modelwright.base.types import SamplingParams
from modelwright.serve import conversation, fields, reasoning, tools
from modelwright.serve.choose import Chosen
from modelwright.serve.errors import EngineDownError
from modelwright.serve.keys import current_key
from modelwright.serve.served import Piece, Served, Token
from modelwright.serve.tool_calls import CallForm, form_of

if TYPE_CHECKING:
    from modelwright.engine.request import Piece as EnginePiece
    from modelwright.engine.sight import Picture

FORMS = ("json_schema", "regex", "grammar", "choices")
LEGACY_MAX_TOKENS = 16  # what /v1/completions has always meant by no max_tokens


@dataclass(frozen=True)
class Asked:
    """What a request says of a completion beside its prompt and settings."""

    model: Any = None  # the name that it gave; one of an adapter's asks for it
    operation: str = "chat"  # what a span calls the work
    pictures: "tuple[Picture, ...]" = ()  # in the prompt


async def encode(served: Served, text: str) -> list[int]:
    """Return the ids of a text, made in a thread because a long one takes a while."""
    assert served.tokenizer is not None
    return await asyncio.to_thread(served.tokenizer.encode, text)


async def chat_prompt(
    served: Served, body: Mapping[str, Any], offered: Sequence[Mapping[str, Any]] = ()
) -> "tuple[list[int], tuple[Picture, ...]]":
    """Return the ids of a conversation that waits for the assistant's answer, and its pictures, fetched and seen.

    Raises:
        RequestError: The model's chat template refuses the conversation, for its order of roles for example, or a
            picture cannot be had.
    """
    assert served.tokenizer is not None and served.engine is not None
    sight = served.engine.engine.sight
    messages = await served.media.read(conversation.messages(body, can_see=sight is not None))
    try:
        return await asyncio.to_thread(served.engine.read_chat, messages, offered, served.tokenizer)
    except ConfigError as error:
        raise RequestError(str(error), param="messages", code="invalid_value") from error


def room(served: Served, num_prompt: int, asked: int | None, default: int | None, param: str) -> int:
    """Return how many tokens the completion may have.

    Args:
        asked: What the request says; None takes ``default``.
        default: None means all that the context leaves.

    Raises:
        RequestError: Prompt and completion do not fit the context; the code is ``context_length_exceeded``.
    """
    limit = served.max_context
    left = limit - num_prompt
    wanted = asked if asked is not None else min(default or left, left)
    if left < 1 or wanted > left:
        parts = f"{num_prompt} in the {param}" + (f", {asked} for the completion" if asked is not None else "")
        raise RequestError(
            f"This model's maximum context length is {limit} tokens. However, you asked for "
            f"{num_prompt + max(wanted, 1)} tokens ({parts}). Shorten the {param} or ask for fewer tokens.",
            param=param,
            code="context_length_exceeded",
        )
    return wanted


async def generate(
    served: Served,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    shown: Mapping[int, str] | None = None,
    asked: "Asked | None" = None,
) -> AsyncGenerator[Piece, None]:
    """Yield the pieces of one completion; closing the generator ends the request and frees its blocks.

    Args:
        shown: Special tokens that are written out, which otherwise have no text.
        asked: What else the request says of it.

    Raises:
        EngineDownError: The engine stopped before the completion was whole.
    """
    assert served.engine is not None
    if served.trace is not None and params.seed is None:
        params = replace(params, seed=secrets.randbits(63))
    try:
        async with contextlib.aclosing(_observed(served, prompt_ids, params, asked or Asked())) as pieces:
            async for piece in pieces:
                delta = piece.delta
                tokens: tuple[Token, ...] = ()
                if params.logprobs is not None:
                    tokens = _tokens(prompt_ids, piece)
                text = delta.text
                for at, token in enumerate(delta.token_ids if shown else ()):
                    if shown and token in shown:
                        text = text + shown[token] if at else shown[token] + text
                if delta.text or delta.token_ids or delta.finish_reason is not None:
                    yield Piece(text, delta.finish_reason, delta.usage, tokens=tokens, token_ids=delta.token_ids)
    except ModelwrightError as error:
        if served.engine.is_healthy:
            raise
        raise EngineDownError(f"The engine has stopped: {error} Start the server again.") from error


async def _observed(
    served: Served, prompt_ids: Sequence[int], params: SamplingParams, asked: "Asked"
) -> AsyncGenerator["EnginePiece", None]:
    """Yield the engine's pieces, with a span around them and a line in the trace at their end."""
    assert served.engine is not None
    key, telemetry = current_key.get(), served.telemetry
    tags = {"tenant": key.config.name} if key is not None else {}  # a prefix cache and a queue of its own
    if asked.model in served.adapter_names:
        tags["adapter"] = asked.model
    adapter = served.engine.engine.adapters.hash_of(tags.get("adapter"))
    drawn, reason = list[int](), "abort"
    name, images = tags.get("adapter", served.model_name), asked.pictures
    span = telemetry.begin(asked.operation, name, params) if telemetry is not None else contextlib.nullcontext()
    most = served.config.max_waiting
    stream = served.engine.stream_pieces(prompt_ids, params, tags, images, most)  # what is refused is in no trace
    try:
        with span as seen:
            async with contextlib.aclosing(stream) as pieces:
                async for piece in pieces:
                    delta = piece.delta
                    drawn += delta.token_ids if served.trace is not None else ()
                    reason = delta.finish_reason or reason
                    if seen is not None:
                        seen.see(len(delta.token_ids), delta.finish_reason, delta.usage)
                    yield piece
    finally:
        if served.trace is not None:
            served.trace.add(prompt_ids, params, drawn, reason, adapter, [p.hash.hex() for p in images])


def _tokens(prompt_ids: Sequence[int], piece: "EnginePiece") -> tuple[Token, ...]:
    """Return the tokens of one piece, after those of an echoed prompt if it is the first."""
    told = zip(prompt_ids, piece.prompt_logprobs or (), piece.prompt_top, strict=False)
    echoed = [Token(i, p, top) for i, p, top in told]
    drawn = zip(piece.delta.token_ids, piece.logprobs, piece.top_logprobs, strict=True)
    return (*echoed, *(Token(i, p, top) for i, p, top in drawn))


def call_form(served: Served) -> CallForm:
    """Return how the model writes calls of tools."""
    assert served.tokenizer is not None
    return form_of(served.tokenizer.chat_template, served.tokenizer.takes_tools)


async def chat_pieces(served: Served, body: Mapping[str, Any]) -> tuple[int, list[AsyncGenerator[Piece, None]]]:
    """Check a chat request and return the tokens of its prompt and the pieces of each of its answers."""
    assert served.tokenizer is not None
    plan, asked = tools.read_plan(body), fields.max_tokens(body)
    form, special_ids = call_form(served), served.tokenizer.special_ids
    # What is wrong with a setting is said before a long text is read.
    tools.constrain(plan, fields.sampling(body, asked or 1), form, special_ids)
    ids, pictures = await chat_prompt(served, body, plan.shown)
    params = fields.sampling(body, room(served, len(ids), asked, None, "messages"))
    params = tools.constrain(plan, params, form, special_ids)
    tags = [form.open, form.close] if plan.is_on else []
    # A form holds the answer from its first token, so there are no thoughts before it.
    is_thinking = served.writes_thoughts and not any(getattr(params, name) is not None for name in FORMS)
    tags += [reasoning.OPEN, reasoning.CLOSE] if is_thinking else []
    shown = {special_ids[tag]: tag for tag in tags if tag in special_ids}
    streams = answers(served, ids, params, shown, Asked(body.get("model"), pictures=pictures))
    if is_thinking:
        tail = served.tokenizer.decode(ids[-8:], skip_special_tokens=False).rstrip()
        streams = [reasoning.with_thoughts(stream, tail.endswith(reasoning.OPEN)) for stream in streams]
    if plan.is_on:
        streams = [tools.with_calls(stream, form, plan) for stream in streams]
    return len(ids), streams


def answers(
    served: Served,
    ids: Sequence[int],
    params: SamplingParams,
    shown: Mapping[int, str] | None = None,
    asked: Asked | None = None,
) -> list[AsyncGenerator[Piece, None]]:
    """Return the stream of each completion that was asked for: draws as they come, the best of many as one piece.

    Raises:
        RequestError: The model cannot search with so many beams, or the key may not go before others.
    """
    assert served.engine is not None and served.tokenizer is not None
    key = current_key.get()
    if params.priority < 0 and key is not None and "admin" not in key.config.scopes:
        message = (
            f"priority is {params.priority}; below 0 goes before all others, which takes a key of the scope 'admin'."
        )
        raise RequestError(f"{message} Leave it out.", param="priority", code="insufficient_scope", status=403)
    if params.beam_width is None and params.best_of is None:
        return [generate(served, ids, one, shown, asked) for one in params.split()]
    engine, tokenizer, what = served.engine, served.tokenizer, asked or Asked()
    engine.engine.check(ids, params, pictures=what.pictures)
    chosen = Chosen(lambda: engine.choose(ids, params, lambda ids, one: _observed(served, ids, one, what)))
    return [chosen.pieces(i, tokenizer, shown, params.logprobs is not None) for i in range(params.n)]


async def completion_pieces(
    served: Served, prompt: str | Sequence[int], body: Mapping[str, Any]
) -> list[AsyncGenerator[Piece, None]]:
    """Check one prompt of a completion request and return the pieces of each of its completions."""
    asked = fields.max_tokens(body)
    fields.sampling(body, asked or 1)
    ids = await encode(served, prompt) if isinstance(prompt, str) else list(prompt)
    params = fields.sampling(body, room(served, len(ids), asked, LEGACY_MAX_TOKENS, "prompt"))
    streams = answers(served, ids, params, asked=Asked(body.get("model"), "text_completion"))
    if not fields.flag(body, "echo"):
        return streams
    assert served.tokenizer is not None
    text = prompt if isinstance(prompt, str) else served.tokenizer.decode(ids, skip_special_tokens=False)
    return [_echo(text, stream) for stream in streams]


async def _echo(prompt: str, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    """Put the prompt before the first piece."""
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            yield replace(piece, text=prompt + piece.text)
            prompt = ""


def check_ids(value: Any, param: str, vocab_size: int) -> list[int]:
    """Return token ids that the model knows."""
    if not isinstance(value, list) or not fields.are_ids(value):
        fields.refuse(param, value, "a list of token ids")
    wrong = next((i for i in value if not 0 <= i < vocab_size), None)
    if wrong is not None:
        fields.refuse(param, wrong, f"an id of this model, 0 to {vocab_size - 1}", "invalid_value")
    return list(value)
