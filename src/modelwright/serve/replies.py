"""The shapes of OpenAI's answers: whole completions, chunks of a stream, and usage.

Field by field what clients depend on: ``id`` prefixes, ``object`` names, ``model`` as it was asked for, ``logprobs``
present and null, the role in the first chunk, an empty ``choices`` list in the chunk that tells the usage.
"""

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from modelwright.base.types import ToolCall, Usage
from modelwright.serve.served import Piece, Token
from modelwright.serve.tool_calls import CallDelta


def usage_object(usage: Usage) -> dict[str, Any]:
    """Return the usage as clients read it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def sum_usage(usages: list[Usage]) -> Usage:
    """Return the usage of several prompts together."""
    return Usage(
        sum(u.prompt_tokens for u in usages),
        sum(u.completion_tokens for u in usages),
        sum(u.cached_tokens for u in usages),
    )


@dataclass
class Collected:
    """One answer, put together from its pieces."""

    text: str = ""
    reasoning: str = ""
    tokens: list[Token] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    last: Piece = Piece("")

    def add(self, piece: Piece) -> None:
        """Take in the next piece."""
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.tokens += piece.tokens
        self.token_ids += piece.token_ids
        for delta in piece.calls:
            if delta.id is not None:
                self.calls.append(ToolCall(delta.id, delta.name or "", ""))
            call = self.calls[delta.index]
            self.calls[delta.index] = replace(call, arguments=call.arguments + delta.arguments)
        self.last = piece


def call_object(call: ToolCall) -> dict[str, Any]:
    """Return a whole call as clients read it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def call_chunk(delta: CallDelta) -> dict[str, Any]:
    """Return a piece of a call; clients join the texts of pieces, so id, type and name come once."""
    if delta.id is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": function}


def thought(text: str) -> dict[str, str]:
    """Return thoughts under both of their names."""
    return {"reasoning_content": text, "reasoning": text}


@dataclass(frozen=True)
class Reply:
    """The frame around every object of one answer."""

    model: str
    prefix: str  # "chatcmpl" or "cmpl"
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return an object of the answer."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def chat_choice(self, index: int, answer: Collected, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """Return one choice of a whole chat completion."""
        last, calls = answer.last, [call_object(call) for call in answer.calls]
        content = None if calls and not answer.text else answer.text
        message = {"role": "assistant", "content": content, "refusal": None, **last.extra}
        if calls:
            message["tool_calls"] = calls
        if answer.reasoning:
            message.update(thought(answer.reasoning))
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": last.finish_reason}

    def chat_chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return one chunk of a streamed chat completion."""
        choice = {"index": index, "delta": dict(delta), "logprobs": logprobs, "finish_reason": finish_reason}
        return self.frame("chat.completion.chunk", [choice])

    def text_choice(
        self, index: int, text: str, finish_reason: str | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return one choice of a text completion; streamed and whole ones look alike."""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def usage_chunk(self, kind: str, usage: Usage) -> dict[str, Any]:
        """Return the last chunk of a stream that was asked to tell its usage."""
        return {**self.frame(kind, []), "usage": usage_object(usage)}
