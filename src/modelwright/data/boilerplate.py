"""Take lines out of a text that are the page's furniture: menus, counters, notices of cookies.

`C4Lines`        Raffel et al., "Exploring the Limits of Transfer Learning" (JMLR 2020), section 2.2
`PageFurniture`  Penedo et al., "The RefinedWeb Dataset" (2023), section 3.2 and appendix G.2, "line-wise corrections"

The text is already extracted; what a page's markup tells is used by the readers. A text of which nothing is left is
removed by whoever runs the step. Lines keep their order; blank lines stay, never more than one in a row.
"""

import re
from dataclasses import dataclass, replace

from modelwright.base.errors import ConfigError
from modelwright.base.types import Document

_TERMINAL = (".", "!", "?", '"', "\u201d")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_CITATION = re.compile(r"\[(?:\d{1,4}|edit|citation needed)\]")
_MANY_BLANK_LINES = re.compile("\n{3,}")
_COUNTER = re.compile(r"\d[\d.,]*\s?[km]?\s+(likes?|shares?|comments?|retweets?|views?|replies|followers?|upvotes?)\W*")
_FURNITURE_START = ("sign in", "sign-in", "sign up", "log in", "login", "skip to content", "follow us", "share this")
_FURNITURE_END = ("read more...", "read more\u2026", "read more", "show more", "load more", "continue reading")
_FURNITURE_ANYWHERE = ("items in cart", "add to cart", "all rights reserved", "cookie settings", "accept cookies")


def _join(lines: list[str]) -> str:
    text = _MANY_BLANK_LINES.sub("\n\n", "\n".join(lines)).strip("\n")
    return f"{text}\n" if text.strip() else ""


@dataclass(frozen=True)
class C4Lines:
    """C4's rules on single lines."""

    min_words: int = 5  # of a line; a shorter one goes
    needs_terminal_mark: bool = True  # a line ends with a period, an exclamation or question mark, or a quotation mark
    drop_citations: bool = True  # marks like [12], [edit] and [citation needed] go

    def drop_reason(self, line: str) -> str:
        """Say why a line goes; empty if it stays.

        >>> C4Lines().drop_reason("Home | About us")
        'does not end with a terminal mark'
        """
        stripped = line.strip()
        if self.needs_terminal_mark and (not stripped.endswith(_TERMINAL) or stripped.endswith("...")):
            return "does not end with a terminal mark"
        if len(stripped.split(maxsplit=self.min_words)) < self.min_words:
            return f"fewer than {self.min_words} words"
        lowered = stripped.lower()
        if "javascript" in lowered:
            return "speaks of javascript"
        found = next((phrase for phrase in _POLICY if phrase in lowered), "")
        return f"holds {found!r}" if found else ""

    def change(self, document: Document) -> Document:
        """Return the document without the lines that go."""
        lines = document.text.split("\n")
        if self.drop_citations:
            lines = [_CITATION.sub("", line) for line in lines]
        kept = [line for line in lines if not line.strip() or not self.drop_reason(line)]
        return replace(document, text=_join(kept))


@dataclass(frozen=True)
class PageFurniture:
    """RefinedWeb's rules on single lines; a page that is mostly furniture goes as a whole."""

    max_uppercase_fraction: float = 0.5  # of a line's letters; a line above goes
    short_line_words: int = 10  # phrases of menus count in lines of at most so many words
    max_dropped_fraction: float = 0.05  # of the document's words; a document that loses more is emptied

    def __post_init__(self) -> None:
        if not 0 <= self.max_dropped_fraction <= 1:
            raise ConfigError(f"max_dropped_fraction is {self.max_dropped_fraction}; it must be from 0 to 1.")

    def drop_reason(self, line: str) -> str:
        """Say why a line goes; empty if it stays.

        >>> PageFurniture().drop_reason("3 likes")
        'a counter'
        """
        stripped = line.strip()
        words = stripped.split(maxsplit=self.short_line_words)
        if len(words) == 1:
            return "a single word"
        letters = [c for c in stripped if c.isalpha()]
        if not letters:
            return "no letters"
        if sum(map(str.isupper, letters)) > self.max_uppercase_fraction * len(letters):
            return "mostly upper case"
        lowered = stripped.lower()
        if len(lowered) < 200 and _COUNTER.fullmatch(lowered):
            return "a counter"
        if len(words) <= self.short_line_words:
            found = lowered.startswith(_FURNITURE_START) or lowered.endswith(_FURNITURE_END)
            if found or any(phrase in lowered for phrase in _FURNITURE_ANYWHERE):
                return "a phrase of menus"
        return ""

    def change(self, document: Document) -> Document:
        """Return the document without the lines that go; empty if they hold too many of its words."""
        lines = document.text.split("\n")
        kept = [line for line in lines if not line.strip() or not self.drop_reason(line)]
        num_words = len(document.text.split())
        num_dropped = num_words - sum(len(line.split()) for line in kept)
        if num_dropped > self.max_dropped_fraction * num_words:
            return replace(document, text="")
        return replace(document, text=_join(kept))
