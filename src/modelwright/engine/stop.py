"""Turning tokens into text that can be shown at once, and ending at a stop string.

A stop string may be spread over several tokens. Text that could be the beginning of one is held back until it is
clear that it is not; nothing else is ever delayed. So no part of a stop string that later completes is ever shown.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from modelwright.tokenizer.bpe import Tokenizer


class TextDecoder(Protocol):
    """What the tokenizer's stream decoder offers: whole code points only."""

    def push(self, token_id: int) -> str:
        """Take one token; return the text that it completes."""
        ...

    def finish(self) -> str:
        """Return what is left, broken bytes replaced."""
        ...


class StopFinder:
    """Looks for stop strings in text that arrives in pieces.

    >>> finder = StopFinder(["END"])
    >>> finder.push("the E"), finder.push("ast, the EN"), finder.push("D of it")
    ('the ', 'East, the ', '')
    >>> finder.is_stopped
    True
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = tuple(stops)
        self.is_stopped = False
        self._held = ""

    def push(self, text: str, *, can_stop: bool = True) -> str:
        """Take the next piece and return the text that is safe to show.

        Args:
            text: The next piece.
            can_stop: False lets everything through: a stop string counts only if it begins and ends afterwards.
        """
        if self.is_stopped:
            return ""
        text, self._held = self._held + text, ""
        if not self.stops or not can_stop:
            return text
        ends = [(index + len(stop), index) for stop in self.stops if (index := text.find(stop)) >= 0]
        if ends:
            self.is_stopped = True
            end = min(ends)[0]  # the one that completes first; if several do at once, the longest of them
            return text[: min(start for other, start in ends if other == end)]
        num_held = max(self._overlap(text, stop) for stop in self.stops)
        if num_held:
            text, self._held = text[:-num_held], text[-num_held:]
        return text

    def finish(self) -> str:
        """Return the text still held back: no stop string can complete any more."""
        held, self._held = self._held, ""
        return "" if self.is_stopped else held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Return the length of the longest end of `text` that is a beginning of `stop`."""
        for length in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0


class Speech:
    """The text of one completion as it grows: decoder and stop strings together."""

    def __init__(self, decoder: TextDecoder | None, stops: Sequence[str]):
        self._decoder = decoder
        self._finder = StopFinder(stops)

    @property
    def is_stopped(self) -> bool:
        """True once a stop string has completed."""
        return self._finder.is_stopped

    def push(self, token_id: int, *, can_stop: bool = True) -> str:
        """Take one token and return the text that is safe to show."""
        if self._decoder is None:
            return ""
        return self._finder.push(self._decoder.push(token_id), can_stop=can_stop)

    def finish(self) -> str:
        """Return the last of the text."""
        if self._decoder is None:
            return ""
        return self._finder.push(self._decoder.finish()) + self._finder.finish()


def stop_ids_of(model_config: Any, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Return the tokens that end a completion: the tokenizer's, and those the model's config names."""
    named = getattr(model_config, "eos_token_id", ()) or ()
    named = (named,) if isinstance(named, int) else tuple(named)
    return tuple(dict.fromkeys((*(tokenizer.stop_ids if tokenizer is not None else ()), *named)))
