"""Remove what is said twice: whole documents, near-copies of documents, paragraphs and lines.

The first in order is kept. Near-copies are proposed by signatures cut into bands (`modelwright.data.minhash`) and each
proposal is checked by the exact Jaccard similarity of the documents' word 5-grams, so that no document is lost to a
chance agreement of hashes. Each is compared with kept documents only: A ~ B ~ C never removes C for B's sake when B
itself is gone, and a thousand copies cost a thousand comparisons, not a million.

The functions work on a list of texts; `ExactDuplicates`, `NearDuplicates`, `RepeatedPieces` do the same as steps of a
pipeline, which sees each document by itself and then a small record of all.

Source: Broder, "On the resemblance and containment of documents" (1997); Leskovec, Rajaraman, Ullman, "Mining of
Massive Datasets", ch. 3; 5-grams as in Lee et al., "Deduplicating Training Data Makes Language Models Better" (2022).
Not done: clusters by connected components, which remove a document that resembles no kept one.
"""

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from modelwright.base.errors import ConfigError
from modelwright.base.types import Document
from modelwright.data.minhash import Bands, band_keys, choose_bands, colliding, sign_sets
from modelwright.data.shingles import Hashes, Words, hash_grams, hash_words
from modelwright.data.step import Removal

SHINGLE_WORDS = 5
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_BLANKS = re.compile(r"\s+")
_BATCH_TEXTS = 256


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


def shingle(text: str, size: int = SHINGLE_WORDS) -> Hashes:
    """Return the set of a text's word n-grams as sorted unique hashes; a shorter text is one n-gram."""
    return np.unique(hash_grams(hash_words([text]), size).hashes)


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
    bands = Bands(num_bands, band_size)
    keys = np.zeros((len(texts), num_bands), dtype=np.uint64)
    sets: list[Hashes] = []
    for start in range(0, len(texts), _BATCH_TEXTS):
        grams = hash_grams(hash_words(texts[start : start + _BATCH_TEXTS]), SHINGLE_WORDS)
        keys[start : start + len(grams)] = band_keys(sign_sets(grams, bands.num_hashes), bands)
        sets += [np.unique(grams.of(index)) for index in range(len(grams))]
    is_filled = np.array([len(s) > 0 for s in sets], dtype=bool)
    yield from find_copies(keys, is_filled, threshold, sets.__getitem__)


def find_copies(
    keys: Hashes, is_filled: Any, threshold: float, set_of: Callable[[int], Hashes] | None
) -> list[Duplicate | None]:
    """Return for each document in order of which kept one it is a near-copy, or None.

    Args:
        keys: (documents, bands), as `modelwright.data.minhash.band_keys` gives.
        is_filled: (documents,) whether a document has any n-gram; those without resemble nothing.
        threshold: Jaccard similarity from which a proposal counts.
        set_of: Returns the sorted unique n-grams of a document; None: every proposal counts, its similarity is NaN.
    """
    verdicts: list[Duplicate | None] = [None] * len(keys)
    filled = np.flatnonzero(is_filled)
    if not len(filled):
        return verdicts
    places, buckets = colliding(keys[filled])
    kept_in: dict[int, list[int]] = {}
    bounds = np.flatnonzero(np.diff(places, prepend=-1))
    for start, stop in zip(bounds, np.append(bounds, len(places))[1:], strict=True):
        index = int(filled[places[start]])
        shared = buckets[start:stop].tolist()
        candidates = sorted({other for bucket in shared for other in kept_in.get(bucket, ())})
        verdict = _closest(index, candidates, threshold, set_of)
        verdicts[index] = verdict
        if verdict is None:
            for bucket in shared:
                kept_in.setdefault(bucket, []).append(index)
    return verdicts


def _closest(
    index: int, candidates: list[int], threshold: float, set_of: Callable[[int], Hashes] | None
) -> Duplicate | None:
    """Return the kept document most like this one, the first of several; None if none reaches the threshold."""
    if not candidates:
        return None
    if set_of is None:
        return Duplicate(index, candidates[0], float("nan"))
    own, best = set_of(index), None
    for other in candidates:
        theirs = set_of(other)
        # The smaller set bounds the overlap: most proposals between a long and a short text end here.
        if min(len(own), len(theirs)) < threshold * max(len(own), len(theirs)):
            continue
        similarity = jaccard(own, theirs)
        if similarity >= threshold and (best is None or similarity > best.similarity):
            best = Duplicate(index, other, similarity)
    return best


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
            if _counts(body, min_chars):
                key = _fingerprint(body)
                if key in seen:
                    repeated.append(Repeated(index, seen[key], body))
                    continue
                seen[key] = index
            kept.append(paragraph)
        kept_texts.append(_joined(kept, "\n\n"))
    return kept_texts, repeated


@dataclass(frozen=True)
class ExactDuplicates:
    """Removes documents equal to an earlier one, white space and case apart. Keeps 16 bytes a document in mind."""

    def sign(self, document: Document) -> bytes:
        """Return the text's fingerprint; nothing for a text of blanks, which is no copy."""
        return _fingerprint(document.text) if document.text.strip() else b""

    def decide(self, signatures: Iterable[tuple[str, bytes]]) -> Mapping[str, str]:
        """Return for each copy the id of the first."""
        first_of: dict[bytes, str] = {}
        found = {}
        for name, fingerprint in signatures:
            first = first_of.setdefault(fingerprint, name)
            if fingerprint and first != name:
                found[name] = first
        return found

    def apply(self, document: Document, decision: str) -> Document | Removal:
        """Remove the copy."""
        return Removal(f"same as {decision}")


@dataclass(frozen=True)
class NearDuplicates:
    """Removes documents that are nearly the same as an earlier kept one.

    In mind during the decision: 8 bytes for each band of each document (200 at the defaults). The sets of n-grams that
    the check compares lie in a temporary file, 8 bytes a word, and only those of proposed pairs are read back.
    """

    threshold: float = 0.8  # Jaccard similarity of the documents' n-grams of words
    gram_words: int = SHINGLE_WORDS
    num_hashes: int = 125  # places of a signature at most
    min_recall: float = 0.9998  # with the check: share of the pairs right at the threshold that are proposed
    check: bool = True  # measure each proposal exactly; off: a shared band is enough, and bands are chosen for that

    def __post_init__(self) -> None:
        if not 1 <= self.gram_words <= 50:
            raise ConfigError(f"gram_words is {self.gram_words}; it must be from 1 to 50.")
        _ = self.bands

    @property
    def bands(self) -> Bands:
        """How the signatures are cut: 25 bands of 5 rows at the defaults."""
        return choose_bands(self.threshold, self.num_hashes, self.min_recall if self.check else None)

    def sign(self, document: Document) -> tuple[bytes, bytes]:
        """Return (keys of the bands, sorted n-grams) as bytes; the second is empty without the check."""
        return self.sign_all([document])[0]

    def sign_all(self, documents: Sequence[Document]) -> list[tuple[bytes, bytes]]:
        """Return what `sign` returns for each document; many at once take a third of the time."""
        bands, found = self.bands, []
        for start in range(0, len(documents), _BATCH_TEXTS):
            texts = [document.text for document in documents[start : start + _BATCH_TEXTS]]
            grams: Words = hash_grams(hash_words(texts), self.gram_words)
            keys = band_keys(sign_sets(grams, bands.num_hashes), bands)
            for index, row in enumerate(keys):
                members = grams.of(index)
                check = np.unique(members).tobytes() if self.check else b""
                found.append((row.tobytes() if len(members) else b"", check))
        return found

    def decide(self, signatures: Iterable[tuple[str, tuple[bytes, bytes]]]) -> Mapping[str, tuple[str, float]]:
        """Return for each near-copy the id of the kept document most like it, and how like."""
        names: list[str] = []
        keys, sizes = bytearray(), [0]
        width = 8 * self.bands.num_bands
        with tempfile.TemporaryFile() as spill:
            for name, (row, members) in signatures:
                names.append(name)
                keys += row or bytes(width)
                spill.write(members)
                sizes.append(len(members) if row else -1)
            spill.flush()
            is_filled = np.array(sizes[1:]) >= 0
            offsets = np.cumsum(np.maximum(sizes, 0))

            def set_of(index: int) -> Hashes:
                spill.seek(int(offsets[index]))
                return np.frombuffer(spill.read(int(offsets[index + 1] - offsets[index])), dtype=np.uint64)

            table = (
                np.frombuffer(keys, dtype=np.uint64).reshape(len(names), -1) if names else np.zeros((0, 1), np.uint64)
            )
            found = find_copies(table, is_filled, self.threshold, set_of if self.check else None)
        return {names[d.index]: (names[d.of], d.similarity) for d in found if d is not None}

    def apply(self, document: Document, decision: tuple[str, float]) -> Document | Removal:
        """Remove the near-copy."""
        name, similarity = decision
        return Removal(f"{similarity:.0%} the same as {name}" if self.check else f"nearly the same as {name}")


@dataclass(frozen=True)
class RepeatedPieces:
    """Takes out paragraphs or lines that stood in an earlier document, or earlier in the same one.

    Two pieces are the same when they agree apart from white space and case, by a fingerprint of 64 bits. Headings stay,
    and so do short pieces. In mind during the decision: 24 bytes a piece.
    """

    unit: Literal["paragraph", "line"] = "paragraph"
    min_chars: int = 80  # shorter pieces stay

    def __post_init__(self) -> None:
        if self.unit not in ("paragraph", "line"):
            raise ConfigError(f"unit is {self.unit!r}; it must be paragraph or line.")

    def _cut(self, text: str) -> list[str]:
        return _PARAGRAPH.split(text) if self.unit == "paragraph" else text.split("\n")

    def sign(self, document: Document) -> bytes:
        """Return the fingerprints of the pieces that count."""
        bodies = (piece.strip() for piece in self._cut(document.text))
        return b"".join(_fingerprint(body)[:8] for body in bodies if _counts(body, self.min_chars))

    def decide(self, signatures: Iterable[tuple[str, bytes]]) -> Mapping[str, tuple[tuple[int, str], ...]]:
        """Return for each document with repeated pieces (number among those that count, where it stood first)."""
        names, sizes, pieces = [], [], bytearray()
        for name, found in signatures:
            names.append(name)
            sizes.append(len(found) // 8)
            pieces += found
        marks = np.frombuffer(pieces, dtype="<u8")
        _, firsts, which = np.unique(marks, return_index=True, return_inverse=True)
        first_of = firsts[which]
        starts = np.cumsum([0, *sizes])
        repeated = np.flatnonzero(first_of != np.arange(len(marks)))
        owners = np.searchsorted(starts, repeated, side="right") - 1
        sources = np.searchsorted(starts, first_of[repeated], side="right") - 1
        decisions: dict[str, list[tuple[int, str]]] = {}
        for place, owner, source in zip(repeated.tolist(), owners.tolist(), sources.tolist(), strict=True):
            decisions.setdefault(names[owner], []).append((place - int(starts[owner]), names[source]))
        return {name: tuple(found) for name, found in decisions.items()}

    def apply(self, document: Document, decision: tuple[tuple[int, str], ...]) -> Document | Removal:
        """Return the document without its repeated pieces; a removal if nothing but blanks is left."""
        gone, number, kept = dict(decision), -1, []
        for piece in self._cut(document.text):
            if _counts(piece.strip(), self.min_chars):
                number += 1
                if number in gone:
                    continue
            kept.append(piece)
        text = _joined(kept, "\n\n" if self.unit == "paragraph" else "\n")
        if not text.strip():
            return Removal(f"every {self.unit} stood before, the first in {decision[0][1]}")
        return replace(document, text=text)


def _counts(body: str, min_chars: int) -> bool:
    return len(body) >= min_chars and not body.startswith("#")


def _joined(kept: Sequence[str], between: str) -> str:
    joined = between.join(kept)
    return joined if joined.endswith("\n") or not joined else joined + "\n"
