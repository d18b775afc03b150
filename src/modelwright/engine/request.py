"""One request on its way through the engine: its tokens, its blocks, how far it is computed, how it ends."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from modelwright.base.errors import ModelwrightError, RequestError
from modelwright.base.types import Completion, Delta, FinishReason, SamplingParams, TopLogprobs, Usage
from modelwright.engine.grammar import Grammar
from modelwright.engine.kv_cache import root_hash
from modelwright.engine.sight import Picture


@dataclass(eq=False)
class Request:
    """The state of one prompt and its growing completion.

    The scheduler owns `block_table`, `num_computed` and the hashes; the engine appends tokens and sets the ending.
    """

    id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int  # params.max_tokens, clipped to the context
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    root: bytes = field(default_factory=root_hash)
    tenant: str = ""  # whose request it is; tenants take turns
    token_ids: list[int] = field(default_factory=list)  # prompt, then completion
    logprobs: list[float] = field(default_factory=list)  # of each completion token
    prompt_logprobs: list[float] = field(default_factory=list)  # of each prompt token but the first, if asked for
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that never come
    grammar: Grammar | None = None  # the form that the completion keeps to
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of the leading blocks that are full and computed
    num_computed: int = 0  # leading tokens whose keys and values are in the cache
    num_cached: int = 0  # prompt tokens found in the cache at first admission
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    error: ModelwrightError | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)
        self.memory: Any = None  # the runner's: states of recurrent layers, a `modelwright.engine.recurrent.Past`
        self.arrival = 0  # the scheduler's: which request this is, counted from the first
        self.num_overtaken = 0  # and how often later ones were admitted before it, or took its blocks
        self.pictures: tuple[tuple[int, Picture], ...] = ()  # in the prompt, each with the position where it begins
        self.prompt_top: list[TopLogprobs] = []  # the likeliest tokens beside `prompt_logprobs`
        self.adapter: Any = None  # the `modelwright.engine.adapters.Adapter` that it asks for

    @property
    def block_ids(self) -> list[int]:
        """What the tokens are to the prefix cache: their ids, and for the places of pictures what tells them apart."""
        if not self.pictures:
            return self.token_ids
        ids = list(self.token_ids)
        for start, picture in self.pictures:
            ids[start : start + len(picture.vectors)] = picture.marks()
        return ids

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: the prompt and what was generated."""
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.prompt_ids)

    @property
    def output_ids(self) -> tuple[int, ...]:
        """The completion so far."""
        return tuple(self.token_ids[len(self.prompt_ids) :])

    @property
    def is_finished(self) -> bool:
        """True once the request has an ending, good or bad."""
        return self.finish_reason is not None or self.error is not None

    @property
    def usage(self) -> Usage:
        """Tokens spent so far."""
        return Usage(len(self.prompt_ids), self.num_output, self.num_cached)


def make_request(
    id: int,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    max_context: int,
    vocab_size: int,
    stop_ids: Sequence[int] = (),
    tags: dict[str, str] | None = None,
) -> Request:
    """Check a prompt at the door and return its request.

    Args:
        max_context: Tokens that prompt and completion may have together; `max_tokens` is clipped to what is left.
        vocab_size: Token ids are 0 to `vocab_size` - 1.
        stop_ids: Tokens that end the completion, unless `params.ignore_eos`.
        tags: What separates this request's prefix blocks from others' (adapter, tenant).

    Raises:
        RequestError: The prompt is empty, has an unknown id, or leaves no room for a completion.
    """
    prompt = tuple(int(token) for token in prompt_ids)
    if not prompt:
        raise RequestError("The prompt has no tokens; it needs at least one. Send some text.", param="prompt")
    wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise RequestError(
            f"The prompt holds token id {wrong}; this model knows 0 to {vocab_size - 1}. "
            "Encode the text with the model's own tokenizer.",
            code="invalid_value",
            param="prompt",
        )
    if len(prompt) >= max_context:
        raise RequestError(
            f"This model's maximum context length is {max_context} tokens. However, your prompt has {len(prompt)} "
            "tokens, which leaves no room for a completion. Shorten the prompt.",
            code="context_length_exceeded",
            param="messages",
        )
    unknown = next((token for token in params.logit_bias if not 0 <= token < vocab_size), None)
    if unknown is not None:
        raise RequestError(
            f"logit_bias names token id {unknown}; this model knows 0 to {vocab_size - 1}.",
            code="invalid_value",
            param="logit_bias",
        )
    return Request(
        id=id,
        prompt_ids=prompt,
        params=params,
        max_tokens=min(params.max_tokens, max_context - len(prompt)),
        stop_ids=frozenset() if params.ignore_eos else frozenset(stop_ids),
        seed=secrets.randbits(63) if params.seed is None else params.seed,
        root=root_hash(tags),
        tenant=(tags or {}).get("tenant", ""),
    )


@dataclass
class Answer:
    """Collects the pieces of one completion; every front of the engine builds its `Completion` here."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[float | None, ...] | None = None
    prompt_top: tuple[TopLogprobs, ...] = ()
    finish_reason: FinishReason = "abort"
    usage: Usage = Usage(0, 0)

    def add(self, piece: "Piece") -> None:
        """Take in the next piece."""
        self.text.append(piece.delta.text)
        self.token_ids.extend(piece.delta.token_ids)
        self.logprobs.extend(piece.logprobs)
        self.top_logprobs.extend(piece.top_logprobs)
        self.prompt_logprobs = piece.prompt_logprobs or self.prompt_logprobs
        self.prompt_top = piece.prompt_top or self.prompt_top
        if piece.delta.finish_reason is not None and piece.delta.usage is not None:
            self.finish_reason, self.usage = piece.delta.finish_reason, piece.delta.usage

    def completion(self) -> Completion:
        """Return what has been collected."""
        text, ids = "".join(self.text), tuple(self.token_ids)
        top, prompt_top = tuple(self.top_logprobs) or None, self.prompt_top if any(self.prompt_top) else None
        logprobs = tuple(self.logprobs)
        return Completion(
            text,
            ids,
            self.finish_reason,
            self.usage,
            logprobs,
            top,
            self.prompt_logprobs,
            prompt_top_logprobs=prompt_top,
        )


@dataclass(frozen=True)
class Piece:
    """What one step added to one request; `error` ends the request without an answer."""

    request_id: int
    delta: Delta
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[float | None, ...] | None = None  # with the first piece, if asked for
    prompt_top: tuple[TopLogprobs, ...] = ()  # along with them: the likeliest tokens at each place of the prompt
    error: ModelwrightError | None = None

    @property
    def is_last(self) -> bool:
        """True when nothing follows."""
        return self.error is not None or self.delta.finish_reason is not None
