"""Is a new task really new? ROUGE-L against every one that is known, and MinHash for near-copies of whole examples.

ROUGE-L is the F-measure of the longest common subsequence of words. It is computed by bits, 64 words and more at a time
in one integer operation, and only where the words in common could reach the threshold at all, so that a thousand known
tasks cost a few milliseconds.

Source: Lin 2004 (ROUGE-L); Hyyro 2004, "Bit-parallel LCS-length computation revisited"; Wang et al. 2023,
arXiv:2212.10560, section 2.2 (a task is kept when no known one is as similar as 0.7).
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from modelwright.data.dedup import jaccard, shingle
from modelwright.data.minhash import Bands, band_keys, sign_sets
from modelwright.data.shingles import Hashes, Words

MAX_ROUGE = 0.7
MAX_SIMILARITY = 0.8
_BANDS = Bands(25, 5)  # proposes a pair of 0.8 with probability 0.9999; what is proposed is measured
_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> list[str]:
    """Return words in lower case, without marks, as ROUGE counts them; a name_like_this is three."""
    return _WORD.findall(text.casefold())


def common_len(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    >>> common_len("a b c d".split(), "b x d".split())
    2
    """
    places: dict[str, int] = {}
    for at, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << at
    every = (1 << len(one)) - 1
    row = every  # a zero bit: the subsequence grows at this word
    for word in other:
        met = places.get(word, 0)
        if met:
            step = row & met
            row = ((row + step) | (row - step)) & every
    return len(one) - row.bit_count()


def rouge_l(one: str, other: str) -> float:
    """Return the F-measure of the longest common subsequence of words, from 0 to 1.

    >>> rouge_l("Write a poem about rain.", "Write a poem about snow.")
    0.8
    """
    a, b = words_of(one), words_of(other)
    return 2 * common_len(a, b) / (len(a) + len(b)) if a and b else float(a == b)


class Novelty:
    """Everything that is known so far, and whether something new is too much like it.

    Args:
        known: Texts to begin with, most often the instructions of the seeds.
        max_rouge: A task as similar to a known one as this or more is not new.
        max_similarity: The same for the Jaccard similarity of the word 5-grams of whole examples.
    """

    def __init__(self, known: Iterable[str] = (), max_rouge: float = MAX_ROUGE, max_similarity: float = MAX_SIMILARITY):
        self._max_rouge, self._max_similarity = max_rouge, max_similarity
        self._tasks: list[tuple[list[str], Counter[str], str]] = []
        self._sets: list[Hashes] = []
        self._buckets: dict[tuple[int, int], list[int]] = {}
        for text in known:
            self.add(text)

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: str, whole: str = "") -> None:
        """Remember a task, and the example as a whole if there is more of it."""
        words = words_of(task)
        self._tasks.append((words, Counter(words), task))
        shingles = shingle(whole or task)
        for key in self._keys(shingles):
            self._buckets.setdefault(key, []).append(len(self._sets))
        self._sets.append(shingles)

    def objection(self, task: str, whole: str = "") -> str:
        """Say what known thing it is too much like; empty when it is new."""
        words = words_of(task)
        counts = Counter(words)
        for known, known_counts, text in self._tasks:
            size = len(words) + len(known)
            least = self._max_rouge * size / 2
            if min(len(words), len(known)) < least or sum((counts & known_counts).values()) < least:
                continue  # even all words in common, in one order, would not reach it
            score = 2 * common_len(words, known) / size if size else 1.0
            if score >= self._max_rouge:
                return f"ROUGE-L {score:.2f} with {text[:80]!r}"
        return self._near_copy(shingle(whole or task))

    def _near_copy(self, shingles: Hashes) -> str:
        proposed = {other for key in self._keys(shingles) for other in self._buckets.get(key, ())}
        for other in sorted(proposed):
            similarity = jaccard(shingles, self._sets[other])
            if similarity >= self._max_similarity:
                return f"{similarity:.0%} the same words as {self._tasks[other][2][:80]!r}"
        return ""

    def _keys(self, shingles: Hashes) -> list[tuple[int, int]]:
        if not len(shingles):
            return []
        signature = sign_sets(Words(shingles, np.array([0, len(shingles)])), _BANDS.num_hashes)
        return list(enumerate(band_keys(signature, _BANDS)[0].tolist()))
