"""Remove what is said twice: whole documents, near-copies of documents, paragraphs and lines.

The first in order is kept. Near-copies are proposed by signatures cut into bands (`modelwright.data.minhash`) and each
proposal is checked by the exact Jaccard similarity of the documents' word 5-grams, so that no document is lost to a
chance agreement of hashes. Each is compared with kept documents only: A ~ B ~ C never removes C for B's sake when B
itself is gone, and a thousand copies cost a thousand comparisons, not a million.

`ExactDuplicates`, `NearDuplicates` and `RepeatedPieces` are steps of a pipeline, which sees each document by itself and
then a small record of all; `near_duplicates` does what the second does to a list of texts.

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
class ExactDuplicates:
    """Removes documents equal to an earlier one, white space and case apart.

    In mind during the decision: 170 bytes a document whose id has 17 characters (two thirds are the ids; measured).
    """

    def sign(self, document: Document) -> bytes:
        """Return the text's fingerprint; nothing for a text of blanks, which is no copy."""
        return _fingerprint(document.text) if document.text.strip() else b""

    def decide(self, signatures: Iterable[tuple[str, bytes]]) -> Mapping[str, str]:
        """Return for each copy the id of the first."""
        names: list[str] = []
        prints = bytearray()
        for name, fingerprint in signatures:
            if fingerprint:
                names.append(name)
                prints += fingerprint
        marks = np.frombuffer(prints, dtype="<u8").reshape(-1, 2)
        order = np.lexsort((marks[:, 1], marks[:, 0]))  # stable: of equal ones the first in order stands first
        ranked = marks[order]
        is_copy = np.zeros(len(order), dtype=bool)
        is_copy[1:] = (ranked[1:] == ranked[:-1]).all(axis=1)
        firsts = order[np.maximum.accumulate(np.where(is_copy, 0, np.arange(len(order))))]
        pairs = zip(order[is_copy].tolist(), firsts[is_copy].tolist(), strict=True)
        return {names[copy]: names[first] for copy, first in pairs}

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
        return b"".join(mark_piece(body) for body in bodies if _counts(body, self.min_chars))

    def decide(self, signatures: Iterable[tuple[str, bytes]]) -> Mapping[str, tuple[tuple[int, str], ...]]:
        """Return for each document with repeated pieces (number among those that count, where it stood first)."""
        return find_repeated(signatures)

    def apply(self, document: Document, decision: tuple[tuple[int, str], ...]) -> Document | Removal:
        """Return the document without its repeated pieces; a removal if nothing but blanks is left."""
        kept = [piece for piece, source in self._with_sources(document, decision) if source is None]
        text = _joined(kept, "\n\n" if self.unit == "paragraph" else "\n")
        if not text.strip():
            return Removal(f"every {self.unit} stood before, the first in {decision[0][1]}")
        return replace(document, text=text)

    def taken(self, document: Document, decision: tuple[tuple[int, str], ...]) -> list[tuple[str, str]]:
        """Return (piece, where it stood first) of what `apply` takes out, for a report."""
        pairs = self._with_sources(document, decision)
        return [(piece.strip(), source) for piece, source in pairs if source is not None]

    def _with_sources(
        self, document: Document, decision: tuple[tuple[int, str], ...]
    ) -> Iterator[tuple[str, str | None]]:
        gone, number = dict(decision), -1
        for piece in self._cut(document.text):
            is_counted = _counts(piece.strip(), self.min_chars)
            number += is_counted
            yield piece, gone.get(number) if is_counted else None


def find_repeated(signatures: Iterable[tuple[str, bytes]]) -> dict[str, tuple[tuple[int, str], ...]]:
    """Return for each document with pieces that stood before (number of the piece, where it stood first).

    Args:
        signatures: (name, marks of eight bytes each) of all documents in their order. 24 bytes a piece in mind.
    """
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


def mark_piece(piece: str) -> bytes:
    """Return the mark of a piece, eight bytes; white space and case do not count."""
    return _fingerprint(piece)[:8]


def _counts(body: str, min_chars: int) -> bool:
    return len(body) >= min_chars and not body.startswith("#")


def _joined(kept: Sequence[str], between: str) -> str:
    joined = between.join(kept)
    return joined if joined.endswith("\n") or not joined else joined + "\n"
