"""Log-probabilities in the shapes of OpenAI's answers: one for conversations, an older one for plain completions.

A token that is part of a character has no text of its own; its bytes are told, and its text with U+FFFD.
Source: the OpenAI API reference, "logprobs" of chat completions and of completions.
"""

from collections.abc import Sequence
from typing import Any

from modelwright.base.types import TopLogprobs
from modelwright.serve.served import Token

LOWEST = -9999.0  # JSON has no infinity


class Spelling:
    """The text of single tokens, from a tokenizer."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def text(self, token_id: int) -> str:
        """Return what a token reads as on its own."""
        return bytes(self._tokenizer.token_bytes(token_id)).decode("utf-8", errors="replace")

    def described(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        """Return a token as the chat format has it."""
        data = bytes(self._tokenizer.token_bytes(token_id))
        return {
            "token": data.decode("utf-8", errors="replace"),
            "logprob": LOWEST if logprob is None else max(logprob, LOWEST),
            "bytes": list(data),
        }


def chat_logprobs(spelling: Spelling, tokens: Sequence[Token]) -> dict[str, Any]:
    """Return the ``logprobs`` of a chat choice, or of one chunk of it."""
    content = [
        {
            **spelling.described(token.id, token.logprob),
            "top_logprobs": [spelling.described(i, p) for i, p in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(spelling: Spelling, tokens: Sequence[Token], offset: int, has_top: bool) -> dict[str, Any]:
    """Return the ``logprobs`` of a completion choice.

    Args:
        spelling: Of the model's tokenizer.
        tokens: The tokens of the choice, or of one chunk; the first of an echoed prompt has the logprob None.
        offset: Characters before the first of them.
        has_top: Whether alternatives were asked for.
    """
    texts = [spelling.text(token.id) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if t.logprob is None else max(t.logprob, LOWEST) for t in tokens],
        "top_logprobs": [_top(spelling, t.top) if t.top else None for t in tokens] if has_top else None,
        "text_offset": offsets,
    }


def _top(spelling: Spelling, top: TopLogprobs) -> dict[str, float]:
    return {spelling.text(token): max(logprob, LOWEST) for token, logprob in reversed(top)}
