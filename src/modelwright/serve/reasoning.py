"""The spans of an answer in which the model thinks, separated from what it says.

Models that reason write ``<think> ... </think>`` before the answer; their chat template names the tags, and some open
the span themselves, so that the answer begins inside it. Text that may be the beginning of a tag is held back, nothing
else is. Thoughts come as ``reasoning_content`` and, the newer name of the same, ``reasoning``.

Source: vLLM's reasoning outputs; DeepSeek's API, ``reasoning_content``. Not done: other tags than these.
"""

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace

from modelwright.serve.served import Piece

OPEN, CLOSE = "<think>", "</think>"


class ThoughtParser:
    r"""Splits a text that comes in pieces into thoughts and answer.

    Args:
        is_open: The prompt has opened the span already.

    >>> parser = ThoughtParser(is_open=False)
    >>> [parser.push(piece) for piece in ("<th", "ink>a<b", "c</think>", "\n\nhi", " <think>")]
    [('', ''), ('a<b', ''), ('c', ''), ('', 'hi'), ('', ' <think>')]
    """

    def __init__(self, is_open: bool):
        self._held = ""
        self._state = "inside" if is_open else "before"
        self._is_fresh = True  # nothing of the present span has come yet: line breaks there belong to the tags

    def push(self, text: str) -> tuple[str, str]:
        """Take in a piece; return what of it is thought and what is said."""
        text, self._held = self._held + text, ""
        thought = said = ""
        if self._state == "before":
            bare = text.lstrip()
            if bare.startswith(OPEN):
                self._state, text = "inside", bare[len(OPEN) :]
            elif OPEN.startswith(bare):
                self._held = text
                return "", ""
            else:
                self._state, self._is_fresh = "after", False
        if self._state == "inside":
            thought, found, rest = text.partition(CLOSE)
            if found:
                self._state, text = "after", rest
            else:
                keep = _overlap(text, CLOSE)
                thought, self._held, text = text[: len(text) - keep], text[len(text) - keep :], ""
            thought = self._trim(thought)
            if found:
                self._is_fresh = True
        if self._state == "after":
            said = self._trim(text)
        return thought, said

    def finish(self) -> tuple[str, str]:
        """Return what was held back at the end."""
        held, self._held = self._held, ""
        return (held, "") if self._state == "inside" else ("", held)

    def _trim(self, text: str) -> str:
        if self._is_fresh:
            text = text.lstrip("\n")
            self._is_fresh = not text
        return text


def _overlap(text: str, tag: str) -> int:
    """Return how much of the text's end may be the beginning of the tag.

    >>> _overlap("a </th", "</think>"), _overlap("a", "</think>")
    (4, 0)
    """
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)


async def with_thoughts(pieces: AsyncGenerator[Piece, None], is_open: bool) -> AsyncGenerator[Piece, None]:
    """Move the thoughts of an answer from its text to `Piece.reasoning`, as they come."""
    parser = ThoughtParser(is_open)
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            thought, said = parser.push(piece.text)
            if piece.finish_reason is not None:
                more, last = parser.finish()
                thought, said = thought + more, said + last
            yield replace(piece, text=said, reasoning=thought)
