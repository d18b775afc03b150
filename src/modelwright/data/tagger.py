"""Tag names of people, places, organisations, street addresses, nationalities: a small network, run by NumPy.

A word is the mean of the vectors of its features (itself, its ends, its triples of letters, its form, whether it is a
common word), each hashed into one table; three gated convolutions over words then see seven words to each side. A
word's label is B, I or O of a kind. The work for a text is linear in its length: words that repeat cost one look-up,
and a long text goes in pieces that overlap by the reach of the network, so labels do not depend on where it is cut.

The weights stand beside this file and were trained by `tagger_training.py` on made sentences (`tagger_text.py`); they
know nothing of scripts without blanks between words.

Source: spaCy's "Embed, encode, attend, predict" (hash embeddings, residual convolutions); J. Serra, A. Karatzoglou,
"Getting deep recommenders fit: Bloom embeddings for sparse binary input/output networks" (2017). Written anew.
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from modelwright.base.errors import DataError
from modelwright.data.personal_data import TAGGED, Finding

SHIPPED = Path(__file__).parent / "tagger.safetensors"
LABELS = ("O", *(f"{place}-{kind}" for kind in TAGGED for place in "BI"))
NUM_ROWS = 1 << 14  # of the feature table
MAX_FEATURES = 16
PIECE = 4096  # words that go through the network at once
STRETCH = 1 << 20  # characters that are cut into words at once
# Added to the score of "no name" for words that begin small: in code and in prose most of them are none.
SMALL = 1.0
_WORD = re.compile(r"[^\W_]{1,40}|\n\s{0,200}|[^\w\s]|_")


def split_words(text: str) -> list[tuple[int, int]]:
    """Return where words begin and end: runs of letters and digits, single signs, line ends.

    >>> split_words("O'Hara, 5")
    [(0, 1), (1, 2), (2, 6), (6, 7), (8, 9)]
    """
    return [found.span() for found in _WORD.finditer(text)]


def word_form(word: str) -> str:
    """Return the form of a word, with runs cut short.

    >>> word_form("McDonald"), word_form("2024"), word_form("B2B")
    ('XxXx', '0000', 'X0X')
    """
    form = "".join("X" if c.isupper() else "x" if c.isalpha() else "0" if c.isdigit() else c for c in word[:24])
    return re.sub(r"([Xx])\1+", r"\1", form) if any(c.islower() for c in word) else form[:6]


def features(word: str, common: frozenset[int]) -> list[int]:
    """Return the rows of the table that make up a word; the first says nothing of the word but its form."""
    low = re.sub(r"\d", "0", word.lower()) if not word.startswith("\n") else "\n"
    form = word_form(word) if low != "\n" else low * min(word.count("\n"), 2)
    is_common = _hash(low) in common
    names = [f"f{form}|{is_common}|{min(len(word), 4)}", f"w{low}", f"s{low[-3:]}", f"p{low[:3]}", f"e{low[-2:]}"]
    edged = f"^{low[:10]}$"
    names += [f"t{edged[i : i + 3]}" for i in range(len(edged) - 2)][: MAX_FEATURES - len(names)]
    return [_hash(name) % (NUM_ROWS - 1) + 1 for name in names]  # row 0 stays empty: it fills up short lists


def _hash(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", errors="replace"))


def read_labels(num_words: int, findings: Sequence[Finding], words: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the label number of each word; a word belongs to a finding in which it begins."""
    labels = np.zeros(num_words, dtype=np.int64)
    starts = [start for start, _ in words]
    for finding in findings:
        first, last = np.searchsorted(starts, [finding.start, finding.end])
        labels[first:last] = LABELS.index(f"I-{finding.kind}")
        labels[first : min(first + 1, last)] = LABELS.index(f"B-{finding.kind}")
    return labels


class Tagger:
    """The network and what it was trained with.

    Args:
        weights: ``table`` (rows, D), ``mix.N.weight`` (2 D, 3 D) and ``mix.N.bias`` (2 D) of each layer, ``out.weight``
            (labels, D), ``out.bias``; ``common`` (hashes of common words); ``lean`` (1), which is added to the score
            of "no name" for words that do not begin small.
    """

    def __init__(self, weights: dict[str, np.ndarray]):
        missing = {"table", "out.weight", "out.bias", "common", "mix.0.weight"} - set(weights)
        if missing or weights["out.bias"].shape != (len(LABELS),):
            raise DataError(f"This is no tagger: {sorted(missing) or 'labels'} not as expected. Train it again.")
        self.weights = weights
        self._table = weights["table"].astype(np.float32) * weights.get("table.scale", np.float32(1))
        self._mix = [
            (weights[f"mix.{i}.weight"].astype(np.float32).T.copy(), weights[f"mix.{i}.bias"].astype(np.float32))
            for i in range(sum(name.endswith(".weight") and name.startswith("mix.") for name in weights))
        ]
        self._out = weights["out.weight"].astype(np.float32).T.copy(), weights["out.bias"].astype(np.float32).copy()
        self._lean = float(weights.get("lean", np.zeros(1))[0])
        self.common = frozenset(weights["common"].tolist())
        self._reach = sum(2**i for i in range(len(self._mix)))

    @classmethod
    def load(cls, path: Path) -> "Tagger":
        """Read a tagger written by `save`."""
        try:
            with safe_open(path, framework="numpy") as file:
                return cls({name: file.get_tensor(name) for name in file.keys()})
        except (OSError, ValueError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read as a tagger ({type(error).__name__}). Train it again.") from error

    def save(self, path: Path) -> None:
        """Write one safetensors file: the table as bytes with a scale for each row, the rest in half precision."""
        weights = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in self.weights.items()}
        scale = np.abs(self._table).max(axis=1, keepdims=True) / 127 + 1e-8  # (rows, 1)
        weights["table"] = np.round(self._table / scale).astype(np.int8)
        weights["table.scale"] = scale.astype(np.float32)
        save_file(weights, path)

    def find(self, text: str) -> list[Finding]:
        """Return the names in a text, in order, without overlaps.

        A text of more than `STRETCH` characters is taken stretch by stretch, cut at a blank, so that memory is bounded.
        """
        found, at = [], 0
        while at < len(text):
            end = at + STRETCH
            if end < len(text):
                end = max(text.rfind(" ", at + STRETCH // 2, end), text.rfind("\n", at + STRETCH // 2, end)) + 1 or end
            found += [Finding(f.start + at, f.end + at, f.kind) for f in self._find_in(text[at:end])]
            at = end
        return found

    def _find_in(self, text: str) -> list[Finding]:
        words = split_words(text)
        if not words:
            return []
        values = [text[a:b] for a, b in words]
        scores = self.scores(values)
        scores[:, 0] += np.array([SMALL if value[0].islower() else self._lean for value in values], np.float32)
        return list(self._join(text, words, scores.argmax(axis=1)))

    def scores(self, words: Sequence[str]) -> np.ndarray:
        """Return the score of each label for each word, (words, labels)."""
        number: dict[str, int] = {}
        ids = np.fromiter((number.setdefault(word, len(number)) for word in words), np.int64, len(words))
        vectors = np.empty((len(number), self._table.shape[1]), np.float32)
        distinct = list(number)
        for at in range(0, len(distinct), PIECE):
            rows = np.zeros((len(distinct[at : at + PIECE]), MAX_FEATURES), np.int64)
            for i, word in enumerate(distinct[at : at + PIECE]):
                found = features(word, self.common)
                rows[i, : len(found)] = found
            counts = (rows > 0).sum(axis=1, keepdims=True)
            vectors[at : at + PIECE] = self._table[rows].sum(axis=1) / counts
        out = np.empty((len(words), len(LABELS)), np.float32)
        for at in range(0, len(words), PIECE):
            first, last = max(0, at - self._reach), min(len(words), at + PIECE + self._reach)
            x = self._convolve(vectors[ids[first:last]])
            out[at : at + PIECE] = (x @ self._out[0] + self._out[1])[at - first : at - first + PIECE]
        return out

    def _convolve(self, x: np.ndarray) -> np.ndarray:
        for i, (weight, bias) in enumerate(self._mix):
            step = 2**i
            around = np.zeros((len(x) + 2 * step, x.shape[1]), np.float32)
            around[step:-step] = x
            seen = np.concatenate([around[: -2 * step], x, around[2 * step :]], axis=1)  # (T, 3 D)
            value, gate = np.split(seen @ weight + bias, 2, axis=1)  # (T, D) each
            x = x + np.maximum(value, gate)
        return x

    def _join(self, text: str, words: Sequence[tuple[int, int]], labels: np.ndarray) -> Iterator[Finding]:
        """Turn labels into spans: a B, or a change of kind, begins a new one; blank edges are left out."""
        start, end, kind = 0, 0, ""
        marked = np.flatnonzero(labels)
        before = -2
        for i in [*marked.tolist(), len(words)]:
            label = LABELS[labels[i]] if i < len(words) else ""
            if kind and (i != before + 1 or label[2:] != kind or label[0] == "B"):
                value = text[start:end]
                if sum(map(str.isalnum, value)) > 1:
                    yield Finding(start, start + len(value.rstrip()), kind)
                kind = ""
            if label and not kind and not text[words[i][0]].isspace():
                start, kind = words[i][0], label[2:]
            if label:
                end, before = words[i][1], i


@lru_cache(maxsize=1)
def load_tagger() -> Tagger:
    """Return the tagger that is part of the package."""
    return Tagger.load(SHIPPED)
