"""Remove what is said twice: whole documents, near-copies of documents, and paragraphs.

The first in order is kept. Near-copies are proposed by MinHash signatures cut into bands (locality-sensitive hashing)
and each proposal is checked by the exact Jaccard similarity of the documents' word 5-grams, so that no document is
lost to a chance agreement of hashes. Each is compared with kept documents only: A ~ B ~ C never removes C for B's sake
when B itself is gone, and a thousand copies cost a thousand comparisons, not a million.

Source: Broder, "On the resemblance and containment of documents" (1997); Leskovec, Rajaraman, Ullman, "Mining of
Massive Datasets", ch. 3; 5-grams as in Lee et al., "Deduplicating Training Data Makes Language Models Better" (2022).
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

SHINGLE_WORDS = 5
_WORD = re.compile(r"\w+|[^\w\s]")
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_BLANKS = re.compile(r"\s+")


@dataclass(frozen=True)
class Duplicate:
    """Document ``index`` repeats the kept document ``of``."""

    index: int
    of: int
    similarity: float  # Jaccard similarity of their word 5-grams; 1 for exact copies


def exact_duplicates(texts: Sequence[str]) -> list[Duplicate]:
    """Find texts equal to an earlier one, white space and case apart."""
    seen: dict[bytes, int] = {}
    found = []
    for index, text in enumerate(texts):
        first = seen.setdefault(_fingerprint(text), index)
        if first != index:
            found.append(Duplicate(index, first, 1.0))
    return found


def _fingerprint(text: str) -> bytes:
    return hashlib.blake2b(_BLANKS.sub(" ", text).strip().casefold().encode(), digest_size=16).digest()


class Shingler:
    """Turns a text into the set of its word 5-grams, each as one 64-bit hash; the same in every run."""

    def __init__(self) -> None:
        self._word_hashes: dict[str, int] = {}

    def __call__(self, text: str) -> Hashes:
        """Return the sorted unique hashes of the 5-grams; a shorter text is one n-gram."""
        known = self._word_hashes
        hashes = np.fromiter((known.get(w) or self._hash(w) for w in _WORD.findall(text.casefold())), dtype=np.uint64)
        num_words = min(SHINGLE_WORDS, len(hashes))
        if not num_words:
            return hashes
        grams = np.zeros(len(hashes) - num_words + 1, dtype=np.uint64)
        for offset in range(num_words):
            grams = _mix(grams + hashes[offset : offset + len(grams)])
        return np.unique(grams)

    def _hash(self, word: str) -> int:
        value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") or 1
        self._word_hashes[word] = value
        return value


def _mix(x: Hashes) -> Hashes:
    """The finaliser of SplitMix64: every input bit reaches every output bit. Source: Steele et al. (2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def minhash(shingles: Hashes, num_hashes: int) -> Hashes:
    """Return the ``num_hashes`` smallest values of the set under as many hash functions.

    Two sets agree in each place with a probability equal to their Jaccard similarity.
    """
    rng = np.random.default_rng(20_240_601)
    factors = rng.integers(0, 2**64, num_hashes, dtype=np.uint64, endpoint=False) | np.uint64(1)
    shifts = rng.integers(0, 2**64, num_hashes, dtype=np.uint64)
    signature = np.empty(num_hashes, dtype=np.uint64)
    # As many functions at once as keep 2**14 values in flight: with 2**18 they fall out of the cache and it takes
    # three times as long; one at a time is 20 times slower on documents of 50 words. A large set goes one at a time.
    step = max(1, 2**14 // max(1, len(shingles)))
    for at in range(0, num_hashes, step):
        part = slice(at, at + step)
        signature[part] = _mix(shingles * factors[part, None] + shifts[part, None]).min(axis=1)  # (functions, set)
    return signature


def jaccard(a: Hashes, b: Hashes) -> float:
    """Return the share of two sorted unique sets that both hold.

    >>> jaccard(np.array([1, 2, 3], np.uint64), np.array([2, 3, 4], np.uint64))
    0.5
    """
    if not len(a) and not len(b):
        return 1.0
    both = np.concatenate([a, b])
    both.sort(kind="stable")
    num_common = int(np.count_nonzero(both[1:] == both[:-1]))
    return num_common / (len(both) - num_common)


def near_duplicates(
    texts: Sequence[str], threshold: float = 0.8, num_bands: int = 25, band_size: int = 5
) -> Iterator[Duplicate | None]:
    """Tell for each text in order whether it is a near-copy of an earlier kept one; None if it is kept.

    A pair of similarity s is proposed with probability 1 - (1 - s**band_size)**num_bands: at the defaults 0.9999 for
    s = 0.8, 0.55 for s = 0.5. What is proposed is then measured, so only pairs at or above the threshold count.
    """
    shingler = Shingler()
    kept: dict[int, Hashes] = {}
    buckets: dict[tuple[int, bytes], list[int]] = {}
    for index, text in enumerate(texts):
        shingles = shingler(text)
        if not len(shingles):
            yield None
            continue
        signature = minhash(shingles, num_bands * band_size).reshape(num_bands, band_size)  # (bands, rows)
        keys = [(band, row.tobytes()) for band, row in enumerate(signature)]
        candidates = sorted({other for key in keys for other in buckets.get(key, ())})
        # The smaller set bounds the overlap: most proposals between a long and a short text end here.
        measured = (
            (jaccard(shingles, kept[other]), -other)
            for other in candidates
            if min(len(shingles), len(kept[other])) >= threshold * max(len(shingles), len(kept[other]))
        )
        similarity, other = max(measured, default=(0.0, 0))
        if similarity >= threshold:
            yield Duplicate(index, -other, similarity)
            continue
        kept[index] = shingles
        for key in keys:
            buckets.setdefault(key, []).append(index)
        yield None


@dataclass(frozen=True)
class Repeated:
    """A paragraph of document ``index`` that stood in document ``of`` (perhaps the same one) before."""

    index: int
    of: int
    text: str


def drop_repeated_paragraphs(texts: Sequence[str], min_chars: int) -> tuple[list[str], list[Repeated]]:
    """Remove paragraphs that an earlier text, or the same text earlier, already holds.

    Paragraphs are parted by blank lines. Those shorter than ``min_chars`` (headings, list items) stay, and so do
    headings, which name what stands below them.
    """
    seen: dict[bytes, int] = {}
    kept_texts, repeated = [], []
    for index, text in enumerate(texts):
        kept = []
        for paragraph in _PARAGRAPH.split(text):
            body = paragraph.strip()
            if len(body) >= min_chars and not body.startswith("#"):
                key = _fingerprint(body)
                if key in seen:
                    repeated.append(Repeated(index, seen[key], body))
                    continue
                seen[key] = index
            kept.append(paragraph)
        joined = "\n\n".join(kept)
        kept_texts.append(joined if joined.endswith("\n") or not joined else joined + "\n")
    return kept_texts, repeated
