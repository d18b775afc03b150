"""Vectors of words: neighbours, analogies, and the text format of word2vec. `word2vec` and `glove` learn them.

    dog 0.12 -0.40 ...      one word a line, behind a first line "number-of-words size"

Source: Mikolov et al. 2013, arXiv:1301.3781 (analogies by addition), arXiv:1310.4546.
Not done: subword vectors, phrases.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import atomic_file

Floats = NDArray[np.float32]
Sentence = str | Sequence[str]  # a string is split at white space


class WordVectors:
    """A matrix with a row for each word.

    >>> found = WordVectors(["king", "queen", "man", "woman"], np.array([[1, 1], [1, -1], [0, 1], [0, -1]]))
    >>> found.analogy("man", "woman", "king", count=1)[0][0]
    'queen'
    """

    def __init__(self, words: Sequence[str], vectors: NDArray, losses: Sequence[float] = ()):
        self.words = list(words)
        self.vectors: Floats = np.asarray(vectors, dtype=np.float32)  # (V, D)
        self.losses = list(losses)  # of each epoch, when they were learned here
        if self.vectors.ndim != 2 or len(self.words) != len(self.vectors):
            raise DataError(
                f"{len(self.words)} words and vectors of shape {self.vectors.shape}; expected a row a word."
            )
        self._ids = {word: i for i, word in enumerate(self.words)}
        if len(self._ids) < len(self.words):
            raise DataError("A word stands twice. Keep one of the two.")
        norms = np.linalg.norm(self.vectors, axis=1, keepdims=True)
        self._units = self.vectors / np.maximum(norms, 1e-12)

    def __contains__(self, word: str) -> bool:
        return word in self._ids

    def __getitem__(self, word: str) -> Floats:
        return self.vectors[self._id(word)]

    def _id(self, word: str) -> int:
        if word not in self._ids:
            raise DataError(f"{word!r} has no vector; there are {len(self.words)} words. It may be rare or misspelt.")
        return self._ids[word]

    def similarity(self, a: str, b: str) -> float:
        """Return the cosine of two words, -1 .. 1."""
        return float(self._units[self._id(a)] @ self._units[self._id(b)])

    def nearest(self, word: str, count: int = 10) -> list[tuple[str, float]]:
        """Return the words of the largest cosine with ``word``, the best first, without itself."""
        return self._nearest(self._units[self._id(word)], {word}, count)

    def analogy(self, a: str, b: str, c: str, count: int = 10) -> list[tuple[str, float]]:
        """Return what is to ``c`` as ``b`` is to ``a``: nearest to b - a + c of unit vectors, without the three."""
        wanted = self._units[self._id(b)] - self._units[self._id(a)] + self._units[self._id(c)]
        return self._nearest(wanted, {a, b, c}, count)

    def _nearest(self, vector: Floats, left_out: set[str], count: int) -> list[tuple[str, float]]:
        scores = self._units @ (vector / max(float(np.linalg.norm(vector)), 1e-12))
        order = np.argsort(-scores, kind="stable")
        kept = (i for i in order if self.words[i] not in left_out)
        return [(self.words[i], float(scores[i])) for i, _ in zip(kept, range(count), strict=False)]

    def save(self, path: str | Path) -> None:
        """Write the text format of word2vec."""
        for word in self.words:
            if not word or word.split() != [word]:
                raise DataError(
                    f"The word {word!r} is empty or holds white space, which the format cannot. Replace it."
                )
        with atomic_file(Path(path)) as handle:
            handle.write(f"{len(self.words)} {self.vectors.shape[1]}\n")
            for word, vector in zip(self.words, self.vectors, strict=True):
                handle.write(word + " " + " ".join(f"{x:.9g}" for x in vector) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "WordVectors":
        """Read the text format of word2vec; GloVe's, which lacks the first line, too.

        Raises:
            DataError: The file is not there or a line is not a word and its numbers; the message names it.
        """
        words: list[str] = []
        rows: list[Floats] = []
        promised: tuple[int, int] | None = None
        try:
            with open(path, encoding="utf-8") as handle:
                for number, line in enumerate(handle, start=1):
                    parts = line.split()
                    if number == 1 and len(parts) == 2 and parts[0].isdigit() and parts[1].isdigit():
                        promised = (int(parts[0]), int(parts[1]))
                        continue
                    size = promised[1] if promised else len(rows[0]) if rows else len(parts) - 1
                    try:
                        row = np.array(parts[1:], dtype=np.float32)
                        if size < 1 or len(row) != size or not np.isfinite(row).all():
                            raise ValueError
                    except ValueError:
                        raise DataError(
                            f"{path}, line {number}: expected a word and {max(size, 1)} numbers, "
                            f"found {line.strip()[:60]!r}. Mend or remove the line."
                        ) from None
                    words.append(parts[0])
                    rows.append(row)
        except FileNotFoundError:
            raise DataError(f"{path} does not exist. Give a text file of vectors.") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text: {error}. Binary word2vec files are not read.") from error
        if not rows or (promised and promised[0] != len(rows)):
            raise DataError(f"{path} holds {len(rows)} vectors, its first line says {promised}. It may be cut short.")
        return cls(words, np.stack(rows))


def count_words(sentences: Iterable[Sentence], min_count: int) -> tuple[list[str], NDArray, NDArray, NDArray]:
    """Return (words, their counts, ids of the whole corpus, number of the sentence of each id); rare words are dropped.

    Words come by falling count. Dropped words leave no gap, as in word2vec: their neighbours become neighbours.

    Raises:
        DataError: Fewer than two words are left.
    """
    if min_count < 1:
        raise ConfigError(f"min_count is {min_count}; it must be at least 1.")
    if isinstance(sentences, str):
        raise DataError("sentences is one string; expected a list of sentences. Use text.splitlines() or [text].")
    split = [sentence.split() if isinstance(sentence, str) else list(sentence) for sentence in sentences]
    counts = Counter(word for sentence in split for word in sentence)
    kept = sorted((word for word, n in counts.items() if n >= min_count), key=lambda word: (-counts[word], word))
    if len(kept) < 2:
        raise DataError(
            f"{len(kept)} words occur {min_count} times or more; vectors need at least two. Give more text "
            "or a smaller min_count."
        )
    ids = {word: i for i, word in enumerate(kept)}
    rows = [[ids[word] for word in sentence if word in ids] for sentence in split]
    lengths = [len(row) for row in rows]
    tokens = np.fromiter((i for row in rows for i in row), np.int64, sum(lengths))
    return kept, np.array([counts[word] for word in kept]), tokens, np.repeat(np.arange(len(rows)), lengths)
