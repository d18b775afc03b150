"""Cut out passages that stood before, however they are embedded: runs of at least so many words, word for word.

Each window of ``min_words`` words is one 64-bit number. A window that stood before is part of a repeated run; windows
that follow each other join into one. That finds every repeated run of at least ``min_words`` words and no other, as a
suffix array would, with one sort of numbers. The first occurrence stays; of a text that repeats itself without end
(``a a a a``) one window stays.

Source: Lee et al., "Deduplicating Training Data Makes Language Models Better" (2022), section 4.1 (there 50 tokens of a
subword vocabulary and a suffix array over bytes; here words, whatever their case and the blanks between them).
Memory of the decision: 8 bytes a word for the numbers and 24 while they are sorted: 3.2 GB for 100 million words (about
600 MB of text); split larger collections. Not done: runs across the end of a document.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from modelwright.base.errors import ConfigError
from modelwright.base.types import Document
from modelwright.data.shingles import Hashes, hash_grams, hash_words, plain_words, word_places
from modelwright.data.step import Removal

_BATCH_TEXTS = 256


@dataclass(frozen=True)
class Run:
    """Words ``start`` to ``stop`` of document ``index`` stood in document ``of`` before, from word ``of_start``."""

    index: int
    start: int
    stop: int
    of: int
    of_start: int


def find_runs(windows: Hashes, offsets: Sequence[int], min_words: int) -> list[Run]:
    """Return the repeated runs of words, in order; those of one document do not overlap.

    Args:
        windows: The numbers of all documents' windows, end to end.
        offsets: Where each document's windows begin, and at last where they end.
        min_words: Words of a window.
    """
    _, firsts, which = np.unique(windows, return_index=True, return_inverse=True)
    first_of = firsts[which]
    later = np.flatnonzero(first_of != np.arange(len(windows)))
    bounds = np.asarray(offsets)
    owners = np.searchsorted(bounds, later, side="right") - 1
    sources = np.searchsorted(bounds, first_of[later], side="right") - 1
    starts, origins = later - bounds[owners], first_of[later] - bounds[sources]
    stops = starts + min_words
    # A window that overlaps its own first occurrence repeats only the words behind it.
    is_own = (owners == sources) & (starts - origins < min_words)
    starts = np.where(is_own, origins + min_words, starts)
    runs: list[Run] = []
    for index, start, stop, of, of_start in zip(
        owners.tolist(), starts.tolist(), stops.tolist(), sources.tolist(), origins.tolist(), strict=True
    ):
        last = runs[-1] if runs else None
        if last is not None and last.index == index and start <= last.stop:
            runs[-1] = replace(last, stop=max(stop, last.stop))
        else:
            runs.append(Run(index, start, stop, of, of_start))
    return runs


def repeated_runs(texts: Sequence[str], min_words: int = 50) -> list[Run]:
    """Return the runs of at least ``min_words`` words that stood before, each checked word for word at its beginning.

    >>> repeated_runs(["a b c d e f", "x b c d y"], min_words=3)
    [Run(index=1, start=1, stop=4, of=0, of_start=1)]
    """
    found = [_windows(texts[start : start + _BATCH_TEXTS], min_words) for start in range(0, len(texts), _BATCH_TEXTS)]
    parts = [windows for batch in found for windows in batch]
    offsets = np.cumsum([0, *map(len, parts)])
    runs = find_runs(np.concatenate(parts) if parts else np.empty(0, np.uint64), offsets.tolist(), min_words)
    return [run for run in runs if _is_same(run, texts, min_words)]


def _is_same(run: Run, texts: Sequence[str], min_words: int) -> bool:
    """Compare the words themselves, so that no passage is lost to a chance agreement of numbers."""
    own, theirs = plain_words(texts[run.index]), plain_words(texts[run.of])
    at = run.start if run.index != run.of else min(run.start, run.stop - min_words)
    return own[at : at + min_words] == theirs[run.of_start : run.of_start + min_words]


def _windows(texts: Sequence[str], min_words: int) -> list[Hashes]:
    """Return the numbers of each text's windows; none for a text that is shorter than one."""
    words = hash_words(texts)
    grams = hash_grams(words, min_words)
    counts = np.diff(words.offsets)
    return [grams.of(index) if counts[index] >= min_words else grams.hashes[:0] for index in range(len(texts))]


@dataclass(frozen=True)
class RepeatedPassages:
    """Cuts out of each document the runs of words that stood before."""

    min_words: int = 50
    min_left_words: int = 0  # a document that keeps fewer goes as a whole

    def __post_init__(self) -> None:
        if self.min_words < 2:
            raise ConfigError(f"min_words is {self.min_words}; it must be at least 2, and 50 is usual.")

    def sign(self, document: Document) -> bytes:
        """Return the numbers of the document's windows, 8 bytes each."""
        return _windows([document.text], self.min_words)[0].tobytes()

    def decide(self, signatures: Iterable[tuple[str, bytes]]) -> Mapping[str, tuple[tuple[int, int, str], ...]]:
        """Return for each document with repeated runs (first word, word behind the last, where it stood before)."""
        names: list[str] = []
        offsets, numbers = [0], bytearray()
        for name, found in signatures:
            names.append(name)
            numbers += found
            offsets.append(len(numbers) // 8)
        decisions: dict[str, tuple[tuple[int, int, str], ...]] = {}
        for run in find_runs(np.frombuffer(numbers, dtype=np.uint64), offsets, self.min_words):
            name = names[run.index]
            decisions[name] = (*decisions.get(name, ()), (run.start, run.stop, names[run.of]))
        return decisions

    def apply(self, document: Document, decision: tuple[tuple[int, int, str], ...]) -> Document | Removal:
        """Return the document without the runs; a removal if too little is left."""
        places = word_places(document.text)
        kept, at = [], 0
        for start, stop, _ in decision:
            kept.append(document.text[at : places[start][0]])
            at = places[stop - 1][1]
        text = "".join([*kept, document.text[at:]])
        num_left = len(places) - sum(stop - start for start, stop, _ in decision)
        if num_left < max(self.min_left_words, 1):
            sources = ", ".join(dict.fromkeys(name for _, _, name in decision[:3]))
            return Removal(f"{num_left} words are left, the others stand in {sources}; at least {self.min_left_words}")
        return replace(document, text=text)
