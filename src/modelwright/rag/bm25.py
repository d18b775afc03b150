"""BM25 over an inverted index: the lexical half of retrieval, made once and kept on disk.

Every posting holds the finished score of one term in one passage, so that a query adds up a few slices of an array.
Words are read the way technical text is written: ``json.dumps`` counts as itself and as ``json`` and ``dumps``,
``splitLines`` and ``split_lines`` both also as ``split`` and ``line``. Words of the headings count on top of the text,
which puts the passage that is *about* something before those that mention it; where the heading is a name with its
signature, the name is a term of its own (``=json.dumps``) that only a query with exactly that name finds.

Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009 (weighted fields: BM25F
with one length); idf as in Lucene, ``ln(1 + (n - df + 0.5) / (df + 0.5))``, which is never negative.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from modelwright.base.errors import CheckpointError, ConfigError

NAME_WEIGHT = 2.0  # how often the name that a heading is counts as a term of its own
MAX_WORD = 200  # longer runs of letters are encoded data, not words

_WORD = re.compile(r"\w+(?:\.\w+)*")
_NAME = re.compile(r"(?:[a-z]+ )?([\w.]+)(?:\(.*)?\Z", re.DOTALL)  # "class json.JSONDecoder(*, object_hook=None)"
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_LETTERS = re.compile(r"[^\W\d_]+|\d+")
_VOWEL = re.compile("[aeiouy]")
_STOP_WORDS = frozenset(
    "a an and are as at be by do does for from has have how i in into is it its me my of on or that the their this to "
    "was were what when where which who why will with you your".split()
)
# Scripts written without spaces: their words are found as overlapping pairs of characters.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f]+")


@dataclass(frozen=True)
class Bm25Config:
    """How passages are scored."""

    k1: float = 0.9  # how soon a repeated term stops adding
    b: float = 0.4  # how much a long passage is discounted, 0 to 1
    heading_weight: float = 1.0  # how often a word of the own heading counts beyond its place in the text
    title_weight: float = 0.2  # how often a word of the outer headings counts

    def __post_init__(self) -> None:
        if self.k1 <= 0 or not 0 <= self.b <= 1 or self.heading_weight < 0 or self.title_weight < 0:
            raise ConfigError(
                f"bm25 has k1={self.k1}, b={self.b}, heading_weight={self.heading_weight}, "
                f"title_weight={self.title_weight}; expected k1 > 0, 0 <= b <= 1 and weights of at least 0."
            )


def stem(word: str) -> str:
    """Take the English plural and verb endings off a lower-case word, so that "wraps" finds "wrapping".

    >>> [stem(w) for w in ("wraps", "wrapping", "wrapped", "copies", "class", "parsing", "string")]
    ['wrap', 'wrap', 'wrap', 'copy', 'class', 'pars', 'string']
    """
    if len(word) <= 3 or not word.isascii() or not word.isalpha():
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-2] if word.endswith(("sses", "shes", "ches", "xes", "zes")) else word[:-1]
    for ending in ("ing", "ed"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and _VOWEL.search(word, 0, len(word) - len(ending)):
            word = word[: -len(ending)]
            if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz":
                word = word[:-1]
            return word
    return word[:-1] if len(word) > 4 and word.endswith("e") else word


def words_of(text: str) -> list[str]:
    """Return the words of a text as they stand in it, dotted names whole."""
    return [word for word in _WORD.findall(text) if len(word) <= MAX_WORD]


def name_terms(heading: str) -> tuple[str, ...]:
    """Return the terms for a heading that is a name: the name and its dotted tails, and its last part apart.

    >>> name_terms("class json.decoder.JSONDecoder(*, strict=True)")
    ('=json.decoder.jsondecoder', '=decoder.jsondecoder', '~jsondecoder')
    >>> name_terms("Travel and meals")
    ()
    """
    found = _NAME.match(heading)
    parts = [part for part in found[1].casefold().split(".") if part] if found else []
    tails = tuple("=" + ".".join(parts[i:]) for i in range(max(1, len(parts) - 1)))
    return (*tails, "~" + parts[-1]) if parts else ()


def terms_of(word: str) -> tuple[str, ...]:
    """Return what one word says: its stem, or of a compound name the whole, its tails and its parts.

    >>> terms_of("json.dumps")
    ('json.dumps', 'dump', 'json')
    >>> terms_of("assertAlmostEqual")
    ('assertalmostequal', 'assert', 'almost', 'equal')
    """
    return tuple(dict.fromkeys(stem(form) for form in _forms(word)))


def indexed_terms(word: str) -> tuple[str, ...]:
    """Return the terms one word is indexed and looked up under: what it says, and each plain form as it was written.

    The exact form (``"wraps``) beside the stem gains on code and on prose: of none, plurals only, stems only and both,
    both is best in BM25 recall@1 on the reference questions, Cranfield and XQuAD, and second on CACM.
    """
    return terms_of(word) + tuple(f'"{form}' for form in _forms(word) if form.isalpha())


def _forms(word: str) -> list[str]:
    if _UNSPACED.search(word):
        runs = _UNSPACED.findall(word)
        pairs = [run[i : i + 2] for run in runs for i in range(max(1, len(run) - 1))]
        return [form for piece in _UNSPACED.split(word) if piece for form in _forms(piece)] + pairs
    whole = word.casefold()
    dotted = [part for part in whole.split(".") if part]
    # Only ASCII names are taken apart by their capitals: "Straße" is one word.
    parts = [part.casefold() for part in (_PART if word.isascii() else _LETTERS).findall(word)]
    if len(parts) <= 1 and len(dotted) <= 1:
        return [whole.strip("_") or whole]
    tails = [".".join(dotted[i:]) for i in range(len(dotted))]  # os.path.join, path.join, join
    return list(dict.fromkeys(form for form in [*tails, *(part.strip("_") for part in dotted), *parts] if form))


class Bm25:
    """An inverted index over passages, with `build`, `scores` and plain arrays to keep on disk."""

    def __init__(
        self, terms: Sequence[str], idf: np.ndarray, starts: np.ndarray, rows: np.ndarray, weights: np.ndarray
    ):
        self._ids = {term: number for number, term in enumerate(terms)}
        self._idf = idf  # (terms,) float32
        self._starts = starts  # (terms + 1,) int64: the postings of term t are starts[t]:starts[t + 1]
        self._rows = rows  # (postings,) int32: passage numbers, rising within a term
        self._weights = weights  # (postings,) float32: finished scores
        self._unknown_idf = float(idf.max()) if len(idf) else 1.0

    @classmethod
    def build(
        cls, passages: Iterable[tuple[str, Sequence[str]]], config: Bm25Config | None = None
    ) -> tuple["Bm25", int]:
        """Index passages given as (text, heading path) and return the index and the number of passages."""
        config = config or Bm25Config()
        ids: dict[str, int] = {}
        known: dict[str, tuple[int, ...]] = {}  # each distinct word is taken apart once
        term_parts, weight_parts, counts, lengths = [], [], [], []
        for text, headings in passages:
            frequency: Counter[int] = Counter()
            length = 0.0
            fields = [(text, 1.0)] + [(h, config.title_weight) for h in headings[:-1]]
            fields += [(h, config.heading_weight) for h in headings[-1:]]
            for field, weight in fields:
                words = words_of(field) if weight else []
                for word in words:
                    numbers = known.get(word)
                    if numbers is None:
                        numbers = known[word] = tuple(ids.setdefault(term, len(ids)) for term in indexed_terms(word))
                    for number in numbers:
                        frequency[number] += weight  # type: ignore[assignment]
                length += weight * len(words)
            for term in name_terms(headings[-1]) if headings else ():
                frequency[ids.setdefault(term, len(ids))] += NAME_WEIGHT  # type: ignore[assignment]
            term_parts.append(np.fromiter(frequency.keys(), np.int64, len(frequency)))
            weight_parts.append(np.fromiter(frequency.values(), np.float32, len(frequency)))
            counts.append(len(frequency))
            lengths.append(length)
        terms = np.concatenate([*term_parts, np.zeros(0, np.int64)])
        tf = np.concatenate([*weight_parts, np.zeros(0, np.float32)])
        rows = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        return cls(list(ids), *_postings(terms, tf, rows, np.asarray(lengths), len(ids), config)), len(counts)

    def scores(self, query: str, num_passages: int) -> np.ndarray:
        """Return the BM25 score of every passage for a query, shape (num_passages,), float32."""
        total = np.zeros(num_passages, np.float32)
        for term in _looked_up(query):
            number = self._ids.get(term)
            if number is not None:
                piece = slice(self._starts[number], self._starts[number + 1])
                total[self._rows[piece]] += self._weights[piece]
        return total

    def coverage(self, query: str, row: int) -> float:
        """Return which part of a query one passage holds, 0 to 1, each term weighed by how much it tells."""
        held = asked = 0.0
        for term in query_terms(query):
            number = self._ids.get(term)
            # A term that is nowhere tells the most: a passage cannot answer for a name that no document knows.
            idf = float(self._idf[number]) if number is not None else self._unknown_idf
            asked += idf
            if number is not None:
                rows = self._rows[self._starts[number] : self._starts[number + 1]]
                place = int(np.searchsorted(rows, row))
                held += idf if place < len(rows) and rows[place] == row else 0.0
        return held / asked if asked else 0.0

    def idf(self, term: str) -> float:
        """Return how much a term tells; one that no passage holds tells the most."""
        number = self._ids.get(term)
        return float(self._idf[number]) if number is not None else self._unknown_idf

    def arrays(self) -> dict[str, np.ndarray]:
        """Return everything as plain arrays; the terms as their UTF-8 bytes joined by newlines."""
        blob = np.frombuffer("\n".join(self._ids).encode(), np.uint8)
        return {"terms": blob, "idf": self._idf, "starts": self._starts, "rows": self._rows, "weights": self._weights}

    @classmethod
    def from_arrays(cls, arrays: "dict[str, np.ndarray]", num_passages: int) -> "Bm25":
        """Rebuild an index from `arrays`.

        Raises:
            CheckpointError: The arrays do not fit together.
        """
        try:
            terms = arrays["terms"].tobytes().decode().split("\n") if len(arrays["terms"]) else []
            idf, starts, rows, weights = (arrays[name] for name in ("idf", "starts", "rows", "weights"))
        except (KeyError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"The BM25 arrays are incomplete or damaged: {error!r}. Build the index again."
            ) from None
        is_sound = (
            len(idf) == len(terms) == len(starts) - 1
            and len(rows) == len(weights) == int(starts[-1])
            and bool((np.diff(starts) >= 0).all())
            and (len(rows) == 0 or 0 <= int(rows.min()) <= int(rows.max()) < num_passages)
        )
        if not is_sound:
            raise CheckpointError(
                f"The BM25 arrays do not fit together or with {num_passages} passages. Build the index again."
            )
        return cls(terms, idf, starts, rows, weights)


def query_terms(query: str) -> list[str]:
    """Return what a query says: its distinct terms without stop words (unless there is nothing else)."""
    return list(dict.fromkeys(term for word in _telling(query) for term in terms_of(word)))


def _looked_up(query: str) -> list[str]:
    terms = dict.fromkeys(term for word in _telling(query) for term in indexed_terms(word))
    return list(terms) + query_names(query)


def _telling(query: str) -> list[str]:
    words = words_of(query)
    return [word for word in words if word.casefold() not in _STOP_WORDS] or words


def query_names(query: str) -> list[str]:
    """Return the name terms of a query; a last part alone only for words that look like code.

    >>> query_names("What does JSONDecoder do?")
    ['=jsondecoder', '~jsondecoder']
    """
    found: dict[str, None] = {}
    for word in _telling(query):
        whole = word.casefold().strip(".")
        found["=" + whole] = None
        if "_" in word or not word[1:].islower():
            found["~" + whole] = None
    return list(found)


def _postings(
    terms: np.ndarray, tf: np.ndarray, rows: np.ndarray, lengths: np.ndarray, num_terms: int, config: Bm25Config
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sort term occurrences by term and turn frequencies into finished scores."""
    df = np.bincount(terms, minlength=num_terms)
    idf = np.log1p((len(lengths) - df + 0.5) / (df + 0.5)).astype(np.float32)
    mean = max(float(lengths.mean()), 1.0) if len(lengths) else 1.0
    norm = config.k1 * (1 - config.b + config.b * lengths / mean)
    order = np.argsort(terms, kind="stable")
    terms, tf, rows = terms[order], tf[order], rows[order]
    weights = (idf[terms] * tf * (config.k1 + 1) / (tf + norm[rows])).astype(np.float32)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(df, dtype=np.int64)])
    return idf, starts, rows.astype(np.int32), weights
