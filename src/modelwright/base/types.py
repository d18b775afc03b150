"""Shared nouns: the few records that rooms hand to each other.

Everything above the engine that needs a language model takes a `ChatModel`; nothing above knows whether the
local engine or a remote endpoint stands behind it.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal, Protocol

SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that the seeds of a prompt's completions all differ
FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Document:
    """One text with its origin. ``start``/``end`` anywhere in the house are character offsets into ``text``."""

    id: str  # stable name within its collection: the path relative to the folder, with forward slashes
    text: str
    source: str = ""  # where it was read from, for people
    title: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ToolCall:
    """A function that an assistant wants to have called."""

    id: str  # what the tool's answer names
    name: str
    arguments: str  # a JSON object, as text


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant's turn
    tool_call_id: str | None = None  # of a tool's turn: the call that it answers
    name: str | None = None  # of a tool's turn: the function
    images: tuple[tuple[int, Any], ...] = ()  # pictures, each with its place: before which character of the content


@dataclass(frozen=True)
class Usage:
    """Tokens spent on one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # part of the prompt that was found in the prefix cache


@dataclass(frozen=True)
class SamplingParams:
    """How one completion is drawn. Checked at the door by `check`."""

    temperature: float = 1.0  # 0 means greedy
    top_p: float = 1.0  # smallest set of tokens with at least this probability mass
    top_k: int = 0  # 0 means off
    max_tokens: int = 256  # completion length at most
    seed: int | None = None  # None: drawn anew for each request
    stop: tuple[str, ...] = ()  # texts that end the completion and are not part of it
    ignore_eos: bool = False  # go on past the end-of-text token, for benchmarks
    min_tokens: int = 0  # before this many, neither an end-of-text token nor a stop text ends the completion
    min_p: float = 0.0  # tokens below this share of the likeliest one's probability are left out; 0 means off
    typical_p: float = 1.0  # locally typical sampling: this probability mass nearest to the entropy; 1 means off
    repetition_penalty: float = 1.0  # above 1: tokens of prompt and completion are less likely; 1 means off
    frequency_penalty: float = 0.0  # taken from a token's logit for each time it stands in the completion
    presence_penalty: float = 0.0  # taken once from the logit of each token of the completion
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these tokens
    bad_words: tuple[str, ...] = ()  # texts that never come
    n: int = 1  # completions of one prompt, each with a seed of its own
    best_of: int | None = None  # completions drawn, of which the n with the best mean log-probability are kept
    beam_width: int | None = None  # beam search in place of drawing; None: draw
    length_penalty: float = 1.0  # of a beam's score: sum of log-probabilities / length ** this
    early_stopping: bool = False  # a beam search ends with the first beam_width finished beams
    priority: int = 0  # requests with a smaller one go first
    logprobs: int | None = None  # so many of the likeliest tokens are told at each position; None: none
    prompt_logprobs: bool = False  # each prompt token's is told too, and with `logprobs` the likeliest tokens there
    json_schema: Mapping[str, Any] | str | None = None  # the completion is JSON of this schema; None: free
    regex: str | None = None  # the whole completion matches
    grammar: str | None = None  # the completion is derived from this grammar, in Lark's notation or GBNF
    choices: tuple[str, ...] | None = None  # the completion is one of these texts

    def __post_init__(self) -> None:
        from modelwright.base.errors import RequestError

        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        else:
            object.__setattr__(self, "stop", tuple(self.stop or ()))
        object.__setattr__(self, "bad_words", tuple(self.bad_words or ()))
        object.__setattr__(self, "logit_bias", {int(k): float(v) for k, v in (self.logit_bias or {}).items()})
        if self.choices is not None:
            object.__setattr__(self, "choices", tuple(self.choices))
        forms = [f for f in ("json_schema", "regex", "grammar", "choices") if getattr(self, f) is not None]
        if len(forms) > 1 or (forms and self.min_tokens):
            what = " and ".join(forms if len(forms) > 1 else [*forms, "min_tokens"])
            raise RequestError(f"{what} are given together; a completion has one form. Give one.", param=forms[0])
        has_texts = self.choices is None or (self.choices and all(isinstance(c, str) and c for c in self.choices))
        rules = (
            ("choices", self.choices, has_texts, "a list of non-empty texts"),
            ("temperature", self.temperature, 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or a positive number"),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("min_tokens", self.min_tokens, 0 <= self.min_tokens <= self.max_tokens, "from 0 to max_tokens"),
            ("stop", self.stop, all(isinstance(s, str) and s for s in self.stop), "non-empty texts"),
            ("min_p", self.min_p, 0 <= self.min_p < 1, "from 0 (off) to below 1"),
            ("typical_p", self.typical_p, 0 < self.typical_p <= 1, "above 0 and at most 1 (off)"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty <= 10, "above 0, at most 10"),
            ("frequency_penalty", self.frequency_penalty, -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            ("presence_penalty", self.presence_penalty, -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("logit_bias", self.logit_bias, all(-100 <= b <= 100 for b in self.logit_bias.values()), "-100 to 100"),
            ("bad_words", self.bad_words, all(isinstance(w, str) and w for w in self.bad_words), "non-empty texts"),
            ("n", self.n, 1 <= self.n <= 128, "from 1 to 128"),
            ("best_of", self.best_of, self.best_of is None or self.n <= self.best_of <= 128, "from n to 128, or None"),
            ("beam_width", self.beam_width, self.beam_width is None or self.n <= self.beam_width <= 32, "from n to 32"),
            ("length_penalty", self.length_penalty, -10 <= self.length_penalty <= 10, "from -10 to 10"),
            ("priority", self.priority, abs(self.priority) < 2**31, "a whole number below 2**31"),
            ("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= 100, "from 0 to 100, or None"),
        )
        for name, value, is_right, expected in rules:
            if not is_right:
                raise RequestError(f"{name} is {value!r}; it must be {expected}.", param=name, code="invalid_value")

        self._check_beams()

    def _check_beams(self) -> None:
        """Refuse what would have no effect: a beam search draws nothing, and its settings mean nothing without it."""
        from modelwright.base.errors import RequestError

        if self.beam_width is None:
            lost = [name for name in ("length_penalty", "early_stopping") if getattr(self, name) != DRAWN[name]]
            what = "has no effect without beam_width. Give beam_width, or leave it out."
        else:
            lost = [name for name, value in DRAWN.items() if name not in BEAM and getattr(self, name) != value]
            what = f"has no effect on a beam search, which takes only {', '.join(sorted(BEAM))}. Leave it out."
        if lost:
            raise RequestError(f"{lost[0]} is {getattr(self, lost[0])!r} and {what}", param=lost[0])

    def split(self) -> list["SamplingParams"]:
        """Return the params of each completion to draw; the first keeps the seed, the others' follow from it."""
        count = self.best_of or self.n
        if count == 1:
            return [self]
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return [replace(self, n=1, best_of=None, seed=seed + SEED_STRIDE * i) for i in range(count)]


DRAWN = {f.name: f.default for f in fields(SamplingParams) if f.default is not MISSING} | {"logit_bias": {}}
BEAM = frozenset({"beam_width", "length_penalty", "early_stopping", "n", "max_tokens", "ignore_eos", "priority"})
BEAM |= {"temperature", "seed"}  # servers fill these in; nothing is drawn


TopLogprobs = tuple[tuple[int, float], ...]  # token ids and natural log-probabilities, likeliest first


@dataclass(frozen=True)
class Completion:
    """What a model answered to one prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[float, ...] | None = None  # natural log-probability of each token
    top_logprobs: tuple[TopLogprobs, ...] | None = None  # at each token, when asked for
    prompt_logprobs: tuple[float | None, ...] | None = None  # of each prompt token, the first None; when asked for
    prompt_top_logprobs: tuple[TopLogprobs, ...] | None = None  # along with them where `logprobs` asks for any
    others: tuple["Completion", ...] = ()  # the further completions of the same prompt when n > 1


@dataclass(frozen=True)
class Delta:
    """A piece of a completion while it streams; the last one carries the reason and the usage."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


class ChatModel(Protocol):
    """Anything that answers a conversation: the local engine, or an endpoint behind the gateway."""

    def chat(self, messages: Sequence[Message], params: SamplingParams) -> Completion:
        """Answer the conversation with one whole completion."""
        ...

    def stream(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[Delta]:
        """Answer the conversation piece by piece."""
        ...
