"""The counts of an n-gram model: every k-gram of a corpus, each order one sorted array.

A k-gram's key is (id of its first k - 1 tokens at the order below) x width + last token, and its id is the place of
that key. Training is then a sort for each order and looking up a binary search, for any vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CountedLevel:
    """The k-grams of one order; all arrays run over the k-grams but `num_contexts`."""

    keys: Ints  # sorted
    contexts: Ints  # id of the k-gram without its newest token, at the order below
    suffixes: Ints  # id of the k-gram without its oldest token, at the order below
    raw: Ints  # occurrences
    adjusted: Ints  # distinct tokens before the k-gram; occurrences at the highest order and where a document opens
    is_opening: NDArray[np.bool_]  # the oldest token is the boundary
    num_contexts: int  # k-grams of the order below

    def sum_by_context(self, values: NDArray[np.generic]) -> Floats:
        """Add up one value a k-gram over the k-grams of each context."""
        sums: Floats = np.bincount(self.contexts, weights=values, minlength=self.num_contexts).astype(
            np.float64, copy=False
        )
        return sums


def count_ngrams(tokens: Ints, places: Ints, order: int, width: int, boundary: int) -> list[CountedLevel]:
    """Count the k-grams of every order up to ``order``.

    Args:
        tokens: All documents, each behind its boundary.
        places: Each token's place in its document; the boundary has 0.
        order: The highest order.
        width: One more than the largest token.
        boundary: The token that opens a document.
    """
    keys = np.arange(width)
    contexts = suffixes = np.zeros(width, np.int64)
    is_opening = keys == boundary
    num_contexts = 1
    ids = tokens  # id of the k-gram that ends at each token; a unigram's id is the token itself
    levels = []
    for k in range(1, order + 1):
        size = len(keys)
        raw = np.bincount(ids[places >= max(k - 1, 1)], minlength=size)
        if k == order:
            levels.append(CountedLevel(keys, contexts, suffixes, raw, raw, is_opening, num_contexts))
            break
        # The next order's distinct k-grams say how many tokens were seen before each of this order's.
        at = np.flatnonzero(places >= k)
        longer, first, inverse = np.unique(ids[at - 1] * width + tokens[at], return_index=True, return_inverse=True)
        longer_suffixes = ids[at[first]]
        adjusted = np.bincount(longer_suffixes, minlength=size)
        if k > 1:
            adjusted += np.bincount(ids[places == k - 1], minlength=size)
        levels.append(CountedLevel(keys, contexts, suffixes, raw, adjusted, is_opening, num_contexts))
        keys, contexts, suffixes, num_contexts = longer, longer // width, longer_suffixes, size
        is_opening = is_opening[contexts]
        ids = np.full(len(tokens), -1, np.int64)
        ids[at] = inverse
    return levels


def look_up(keys: Ints, contexts: Ints, words: Ints, width: int) -> Ints:
    """Return the places of the k-grams (context, word) in the sorted ``keys``; -1 where there is none."""
    wanted = contexts * width + words
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((contexts >= 0) & (keys[place] == wanted), place, -1)


def count_of_counts(counts: Ints, highest: int) -> Sequence[int]:
    """Return [n_0, n_1, ..., n_highest]: how many k-grams were counted r times; n_0 is set to 0."""
    found = np.bincount(counts[(counts > 0) & (counts <= highest)], minlength=highest + 1)
    return [int(n) for n in found]
