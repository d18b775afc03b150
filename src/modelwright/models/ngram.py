"""N-gram language models with interpolated Kneser-Ney smoothing: the baseline that a neural model must beat.

    P_k(w | h) = (max(c_k(h w) - D_k, 0) + D_k N_k(h) P_{k-1}(w | h')) / sum_v c_k(h v)

h is the context of k - 1 tokens, h' the same without its oldest token, N_k(h) the number of distinct tokens seen
after h, D_k = n1 / (n1 + 2 n2) with n_r the number of k-grams counted r times. c is the raw count at the highest
order and below it the number of distinct tokens seen before the k-gram; a k-gram that opens a document has nothing
before it, so there each occurrence counts. P_0 is uniform; an unseen context leaves P_{k-1} as it is.

Every level keeps its k-grams as one sorted array of (id of the context one level down) x width + token, so that
training is a sort and scoring a binary search a level, for any vocabulary.
Source: Kneser & Ney 1995; Chen & Goodman 1999, sections 2.7, 2.8 and 4.1. Not done: modified discounts, pruning, ARPA.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from modelwright.base.errors import ConfigError, DataError

SMOOTHINGS = ("kneser_ney",)
MAX_ORDER = 16
# The estimate n1 / (n1 + 2 n2) needs k-grams seen once and twice; a toy corpus may have none.
DEFAULT_DISCOUNT = 0.75


@dataclass(frozen=True)
class _Level:
    """The k-grams of one order. ``keys`` is sorted; a k-gram's id is its place in it.

    The other arrays end in a zero, which is what the id -1 ("never seen") finds there.
    """

    keys: NDArray[np.int64]  # context id x width + token
    counts: NDArray[np.int64]  # adjusted count of each k-gram
    totals: NDArray[np.int64]  # sum of counts after each context
    kinds: NDArray[np.int64]  # distinct tokens after each context
    discount: float


class NgramModel:
    """An interpolated Kneser-Ney model over token ids.

    Example:
        >>> model = NgramModel.train([[0, 1, 0, 1, 1]], order=2, vocab_size=2)
        >>> float(model.distribution([0]).sum())
        1.0
    """

    def __init__(self, levels: Sequence[_Level], vocab_size: int, bos_id: int | None):
        self._levels = list(levels)
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        # Without an id of its own the boundary is one symbol past the vocabulary: a context, never predicted.
        self._boundary = vocab_size if bos_id is None else bos_id
        self._width = vocab_size + 1

    @property
    def order(self) -> int:
        """Length of the longest n-gram; the context is one token shorter."""
        return len(self._levels)

    @property
    def num_ngrams(self) -> tuple[int, ...]:
        """Distinct n-grams kept at each order, from unigrams up."""
        return tuple(int((level.counts > 0).sum()) for level in self._levels)

    @property
    def discounts(self) -> tuple[float, ...]:
        """D_1 .. D_order."""
        return tuple(level.discount for level in self._levels)

    @classmethod
    def train(
        cls,
        documents: Sequence[Sequence[int]],
        order: int,
        vocab_size: int,
        smoothing: str = "kneser_ney",
        bos_id: int | None = None,
    ) -> "NgramModel":
        """Count the n-grams of ``documents`` (token ids, one sequence a document; none spans two documents).

        Args:
            bos_id: The token that stands before each document as context, usually the end-of-text id. None: a
                symbol of its own that is no part of the vocabulary.

        Raises:
            ConfigError: An unknown smoothing or an order out of range.
            DataError: No tokens, or an id outside the vocabulary.
        """
        if smoothing not in SMOOTHINGS:
            raise ConfigError(f"Unknown smoothing {smoothing!r}; known: {', '.join(SMOOTHINGS)}.")
        if not 1 <= order <= MAX_ORDER:
            raise ConfigError(f"order is {order}; expected 1 (unigram) to {MAX_ORDER}.")
        if bos_id is not None and not 0 <= bos_id < vocab_size:
            raise ConfigError(f"bos_id is {bos_id}; expected None or an id below the vocabulary size {vocab_size}.")
        model = cls([], vocab_size, bos_id)
        tokens, places = model._flatten(documents)
        if len(tokens) == len(documents):
            raise DataError(f"{len(documents)} documents hold no tokens; an n-gram model needs text to count.")
        model._levels = model._count(tokens, places, order)
        return model

    def _flatten(self, documents: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Join documents, each behind its boundary; also return every token's place in its document (boundary 0)."""
        lengths = np.fromiter((len(d) + 1 for d in documents), np.int64, len(documents))
        starts = np.cumsum(lengths) - lengths
        places = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
        tokens = np.full(len(places), self._boundary, np.int64)
        tokens[places > 0] = np.fromiter(chain.from_iterable(documents), np.int64)
        wrong = (places > 0) & ((tokens < 0) | (tokens >= self.vocab_size))
        if wrong.any():
            raise DataError(
                f"Token id {tokens[wrong][0]} is outside the vocabulary of {self.vocab_size}. "
                "Encode the text with the tokenizer that the model was made for."
            )
        return tokens, places

    def _count(self, tokens: NDArray[np.int64], places: NDArray[np.int64], order: int) -> list[_Level]:
        width = self._width
        ids = tokens  # id of the k-gram that ends at each token; a unigram's id is the token itself
        size = width  # how many ids there are
        keys, contexts = np.arange(width), np.zeros(width, np.int64)
        num_contexts = 1
        levels = []
        for k in range(1, order + 1):
            is_predicted = places >= max(k - 1, 1)
            if k == order:
                counts = np.bincount(ids[is_predicted], minlength=size)
                levels.append(_make_level(keys, counts, contexts, num_contexts))
                break
            # The next order's distinct k-grams say how many tokens were seen before each of this order's.
            at = np.flatnonzero(places >= k)
            longer_keys, first, inverse = np.unique(
                ids[at - 1] * width + tokens[at], return_index=True, return_inverse=True
            )
            counts = np.bincount(ids[at[first]], minlength=size)
            if k > 1:
                counts += np.bincount(ids[places == k - 1], minlength=size)
            levels.append(_make_level(keys, counts, contexts, num_contexts))
            keys, contexts, num_contexts = longer_keys, longer_keys // width, size
            ids = np.full(len(tokens), -1, np.int64)
            ids[at] = inverse
            size = len(keys)
        return levels

    def _context_ids(self, tokens: NDArray[np.int64], places: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """For each order k, the id of the (k-1)-gram that ends at each token; -1 where it was never seen."""
        found = [np.zeros(len(tokens), np.int64), tokens]
        for k, level in enumerate(self._levels[1:-1], start=2):
            ids = np.full(len(tokens), -1, np.int64)
            at = np.flatnonzero(places >= k - 1)
            ids[at] = _look_up(level.keys, found[-1][at - 1], tokens[at], self._width)
            found.append(ids)
        return found[: self.order]

    def _probabilities(self, contexts: Sequence[NDArray[np.int64]], words: NDArray[np.int64]) -> NDArray[np.float64]:
        """P(word | context) elementwise; ``contexts[k - 1]`` holds the context ids of order k."""
        result = np.full(len(words), 1.0 / self.vocab_size)
        for level, context in zip(self._levels, contexts, strict=True):
            place = _look_up(level.keys, context, words, self._width)
            total = level.totals[context]
            kept = (
                np.maximum(level.counts[place] - level.discount, 0.0) + level.discount * level.kinds[context] * result
            )
            result = np.where(total > 0, kept / np.maximum(total, 1), result)
        return result

    def _score(self, documents: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        tokens, places = self._flatten(documents)
        at = np.flatnonzero(places > 0)
        contexts = [ids[at - 1] for ids in self._context_ids(tokens, places)]
        return np.log(self._probabilities(contexts, tokens[at]))

    def log_probs(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """Natural log-probability of each token of one document, given up to ``order - 1`` tokens before it."""
        return self._score([ids])

    def distribution(self, context: Sequence[int] = ()) -> NDArray[np.float64]:
        """Return P(token | context) for the whole vocabulary; ``context`` is read as the start of a document."""
        tokens, places = self._flatten([context])
        contexts = [np.repeat(ids[-1:], self.vocab_size) for ids in self._context_ids(tokens, places)]
        return self._probabilities(contexts, np.arange(self.vocab_size))

    def bits_per_byte(self, documents: Sequence[Sequence[int]], num_bytes: int) -> float:
        """Bits that the model spends on ``documents``, for each of the ``num_bytes`` bytes of their text."""
        if num_bytes < 1:
            raise DataError(f"num_bytes is {num_bytes}; bits per byte needs at least one byte of text.")
        return float(-self._score(documents).sum() / np.log(2) / num_bytes)


def _make_level(
    keys: NDArray[np.int64], counts: NDArray[np.int64], contexts: NDArray[np.int64], num_contexts: int
) -> _Level:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = once / (once + 2 * twice) if once and twice else DEFAULT_DISCOUNT
    totals = np.bincount(contexts, weights=counts, minlength=num_contexts).astype(np.int64)
    kinds = np.bincount(contexts[counts > 0], minlength=num_contexts)
    return _Level(keys, np.append(counts, 0), np.append(totals, 0), np.append(kinds, 0), discount)


def _look_up(
    keys: NDArray[np.int64], contexts: NDArray[np.int64], words: NDArray[np.int64], width: int
) -> NDArray[np.int64]:
    """Places of the k-grams (context, word) in the sorted ``keys``; -1 where there is none."""
    wanted = contexts * width + words
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((contexts >= 0) & (keys[place] == wanted), place, -1)
