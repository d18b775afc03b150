"""Citation marks in what a model writes: ``[2]`` or ``[1, 3]``, checked while the text streams.

A mark stays when its number is that of a passage which shares a word that tells something with the statement in front
of the mark; otherwise it is taken out together with the space before it. Text that could still become a mark is held
back until it is clear, so that no client ever sees a forged number.
"""

import re
from collections.abc import Sequence

from modelwright.rag.bm25 import query_terms, terms_of, words_of
from modelwright.rag.index import Hit
from modelwright.rag.sentence import Span, split_sentences

_MARK = re.compile(r"[ \t]*\[(\d{1,4}(?:[ \t]*[,;][ \t]*\d{1,4}){0,15})\]")
_OPEN = re.compile(r"[ \t]+\Z|[ \t]*\[[\d \t,;]{0,80}\Z")  # what may yet become a mark
_MAX_CLAIM = 2000  # characters in front of a mark in which its statement is looked for


class MarkFilter:
    """Passes on what a model writes and keeps the citations that hold."""

    def __init__(self, hits: Sequence[Hit]):
        """Take the passages; passage ``n`` of the prompt is ``hits[n - 1]``."""
        self._hits = hits
        self._held = ""
        self._text = ""
        self.places: dict[int, Span] = {}  # number -> the sentence of the document that supports it best

    def push(self, text: str) -> str:
        """Take the next piece and return what is ready to be shown."""
        self._held += text
        unclear = _OPEN.search(self._held)
        cut = unclear.start() if unclear else len(self._held)
        ready, self._held = self._held[:cut], self._held[cut:]
        return self._pass(ready)

    def finish(self) -> str:
        """Return what was held back at the end."""
        ready, self._held = self._held, ""
        return self._pass(ready)

    def _pass(self, text: str) -> str:
        shown, start = "", 0
        for mark in _MARK.finditer(text):
            before = text[start : mark.start()]
            shown += before
            self._text += before
            numbers = [int(number) for number in re.findall(r"\d+", mark[1])]
            kept = [number for number in dict.fromkeys(numbers) if self._holds(number)]
            if kept:
                space = mark[0][: mark[0].index("[")]
                shown += f"{space}[{', '.join(map(str, kept))}]"
            start = mark.end()
        self._text += text[start:]
        return shown + text[start:]

    def _holds(self, number: int) -> bool:
        """Tell whether a passage supports the last statement; note where it does."""
        if not 1 <= number <= len(self._hits):
            return False
        claim = self._claim()
        wanted = {term for term in query_terms(claim) if len(term) > 1}
        place = supporting_sentence(self._hits[number - 1], wanted)
        if place is not None:
            self.places.setdefault(number, place)
        return place is not None

    def _claim(self) -> str:
        tail = self._text[-_MAX_CLAIM:]
        spans = split_sentences(tail)
        return tail[slice(*spans[-1])] if spans else ""


def supporting_sentence(hit: Hit, wanted: set[str]) -> Span | None:
    """Return the document span of the passage's sentence that shares most terms with ``wanted``; None without any."""
    top, place = 0.0, None
    for start, end in split_sentences(hit.text):
        words = words_of(hit.text[start:end])
        shared = wanted & {term for word in words for term in terms_of(word)}
        # Among sentences that share as much the shorter one says it more plainly.
        score = len(shared) - 0.001 * min(len(words), 500) if shared else 0.0
        if score > top:
            top, place = score, (hit.start + start, hit.start + end)
    return place
