"""How an n-gram model shares out probability between what was seen and what was not: six ways, one form.

Each function turns the counts of all orders into a back-off model: a probability for every k-gram seen, and for every
context h a weight b(h) with P(w | h) = b(h) P(w | h') for a word not seen after it; h' is h without its oldest token.
An interpolated model has that form too, for P = kept(h w) + gamma(h) P(w | h') is b(h) P(w | h') with b = gamma where
nothing was kept. So one scorer and one file format serve them all.

Symbols: c a count, T(h) the sum of the counts after h, V the vocabulary size, n_r the number of k-grams counted r
times, D a discount.
Source: Chen & Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 2; Katz 1987;
Jelinek & Mercer 1980; Kneser & Ney 1995.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from modelwright.models.ngram_counts import CountedLevel, Floats, Ints, count_of_counts

# Estimates of discounts need k-grams counted once, twice, ...; a toy corpus may have none.
DEFAULT_DISCOUNT = 0.75
DEFAULT_DISCOUNTS = (0.5, 1.0, 1.5)  # of the modified method; those of KenLM's --discount_fallback
KATZ_CUTOFF = 5  # counts above it are trusted as they are
# Below this much lower-order mass left for unseen words their sum is mostly rounding error.
SMALLEST_MASS = 1e-6
LARGEST_LAMBDA = 1 - 1e-6  # an unseen word keeps some probability


@dataclass(frozen=True)
class BackoffLevel:
    """The k-grams of one order with their probabilities, and the back-off weights of their contexts."""

    keys: Ints
    probs: Floats  # (number of k-grams,)
    weights: Floats  # (number of contexts + 1,); the last is 1, which is what the id -1 ("never seen") finds

    @classmethod
    def make(cls, level: CountedLevel, probs: Floats, weights: Floats) -> "BackoffLevel":
        """Put the arrays of one order together."""
        return cls(level.keys, probs, np.append(weights, 1.0))


Estimate = tuple[list[BackoffLevel], list[tuple[float, ...]]]  # levels; what was estimated for each, for the curious


def _interpolate(
    levels: Sequence[CountedLevel], vocab_size: int, share: Callable[[int, CountedLevel], tuple[Floats, Floats]]
) -> list[BackoffLevel]:
    """Mix every order with the one below it, from a uniform distribution up.

    ``share`` returns what is kept of each k-gram and, for each context, what is left for the order below.
    """
    lower = np.full(1, 1.0 / vocab_size)
    made = []
    for index, level in enumerate(levels):
        kept, left = share(index, level)
        lower = kept + left[level.contexts] * lower[level.suffixes]
        made.append(BackoffLevel.make(level, lower, left))
    return made


def add_k(levels: Sequence[CountedLevel], vocab_size: int, k: float) -> Estimate:
    """(c(h w) + k) / (T(h) + k V); an unseen context is uniform.

    Only the longest context counts, which near the start of a document is the whole of it; every other k-gram is an
    entry without effect: it stands at the uniform probability, so that backing off to it gives k / (T + k V).
    """

    def share(index: int, level: CountedLevel) -> tuple[Floats, Floats]:
        counts = level.raw if index == len(levels) - 1 else np.where(level.is_opening, level.raw, 0)
        if index == 0 and len(levels) > 1:
            counts = np.zeros_like(level.raw)
        totals = level.sum_by_context(counts)
        scale = totals + k * vocab_size
        return counts / scale[level.contexts], np.where(totals > 0, k * vocab_size / scale, 1.0)

    return _interpolate(levels, vocab_size, share), [(k,)] * len(levels)


def laplace(levels: Sequence[CountedLevel], vocab_size: int, k: float) -> Estimate:
    """(c(h w) + 1) / (T(h) + V): add-k with k = 1."""
    return add_k(levels, vocab_size, 1.0)


def _absolute(levels: Sequence[CountedLevel], vocab_size: int, discounts: list[tuple[float, ...]]) -> Estimate:
    """(c - D_c) / T + gamma P_lower on the adjusted counts; D_1, D_2 and D_3 for all counts from 3 up."""

    def share(index: int, level: CountedLevel) -> tuple[Floats, Floats]:
        counts = level.adjusted
        taken = np.array([0.0, *discounts[index]])[np.minimum(counts, 3)]
        totals = level.sum_by_context(counts)
        left = np.where(totals > 0, level.sum_by_context(taken) / np.maximum(totals, 1), 1.0)
        return (counts - taken) / np.maximum(totals, 1)[level.contexts], left

    return _interpolate(levels, vocab_size, share), discounts


def kneser_ney(levels: Sequence[CountedLevel], vocab_size: int, k: float) -> Estimate:
    """Interpolated Kneser-Ney with one discount an order, D = n_1 / (n_1 + 2 n_2)."""
    discounts: list[tuple[float, ...]] = []
    for level in levels:
        _, once, twice = count_of_counts(level.adjusted, 2)
        discounts.append((once / (once + 2 * twice) if once and twice else DEFAULT_DISCOUNT,) * 3)
    return _absolute(levels, vocab_size, discounts)


def modified_kneser_ney(levels: Sequence[CountedLevel], vocab_size: int, k: float) -> Estimate:
    """Interpolated Kneser-Ney with three discounts an order.

    D_r = r - (r + 1) Y n_(r+1) / n_r with Y = n_1 / (n_1 + 2 n_2); the third serves every count from 3 up.
    """
    discounts: list[tuple[float, ...]] = []
    for level in levels:
        n = count_of_counts(level.adjusted, 4)
        found: tuple[float, ...] = DEFAULT_DISCOUNTS
        if all(n[1:]):
            y = n[1] / (n[1] + 2 * n[2])
            d1, d2, d3 = (r - (r + 1) * y * n[r + 1] / n[r] for r in (1, 2, 3))
            if min(d1, d2, d3) > 0:
                found = (d1, d2, d3)
        discounts.append(found)
    return _absolute(levels, vocab_size, discounts)


def interpolated(levels: Sequence[CountedLevel], vocab_size: int, k: float) -> Estimate:
    """Jelinek-Mercer: lambda c / T + (1 - lambda) P_lower, lambda by order and by how often the context was seen.

    The lambdas maximise the likelihood of the training text with each token left out of the counts in turn, so no
    held-out text is needed; contexts seen 1, 2, 3-4, 5-8, ... times share one (Bahl, Jelinek & Mercer 1983).
    """
    left_out = np.full(1, 1.0 / vocab_size)  # probability of each k-gram's token with one of its occurrences left out
    lambdas: list[Floats] = []
    for level in levels:
        totals = level.sum_by_context(level.raw)
        rest = totals[level.contexts] - 1  # what is left of the context's count
        counted = (level.raw > 0) & (rest > 0)
        maximum = np.where(counted, level.raw - 1, 0) / np.maximum(rest, 1)
        lower = left_out[level.suffixes]
        bucket = _bucket(rest)
        fitted = _fit_lambdas(
            maximum[counted],
            lower[counted],
            level.raw[counted],
            bucket[counted],
            int(_bucket(totals).max(initial=0)) + 1,
        )
        lambdas.append(fitted)
        mix = np.where(rest > 0, fitted[bucket], 0.0)
        left_out = mix * maximum + (1 - mix) * lower

    def share(index: int, level: CountedLevel) -> tuple[Floats, Floats]:
        totals = level.sum_by_context(level.raw)
        mix = np.where(totals > 0, lambdas[index][_bucket(totals)], 0.0)  # (number of contexts,)
        return mix[level.contexts] * level.raw / np.maximum(totals, 1)[level.contexts], 1 - mix

    return _interpolate(levels, vocab_size, share), [tuple(float(x) for x in row) for row in lambdas]


def _bucket(counts: Floats) -> Ints:
    """0 for 1 (and less), 1 for 2, 2 for 3-4, 3 for 5-8, ..."""
    return np.ceil(np.log2(np.maximum(counts, 1))).astype(np.int64)


def _fit_lambdas(maximum: Floats, lower: Floats, counts: Ints, bucket: Ints, num_buckets: int) -> Floats:
    """Maximise sum c log(lambda maximum + (1 - lambda) lower) in each bucket: concave, so bisect its slope."""
    low, high = np.zeros(num_buckets), np.full(num_buckets, LARGEST_LAMBDA)
    for _ in range(30):
        middle = (low + high) / 2
        mixed = lower + middle[bucket] * (maximum - lower)
        slope = np.bincount(bucket, weights=counts * (maximum - lower) / mixed, minlength=num_buckets)
        low, high = np.where(slope > 0, middle, low), np.where(slope > 0, high, middle)
    fitted = (low + high) / 2
    seen = np.bincount(bucket, minlength=num_buckets)
    for b in range(num_buckets):  # a bucket without data takes the lambda of the one below
        if not seen[b]:
            fitted[b] = fitted[b - 1] if b else 0.5
    return fitted


def katz(levels: Sequence[CountedLevel], vocab_size: int, k: float) -> Estimate:
    """Katz's back-off: counts up to 5 are discounted as Good and Turing say, the mass freed goes to unseen words.

    Where every word after a context was seen more than 5 times nothing is freed; one is then added to T(h).
    """
    made: list[BackoffLevel] = []
    rates = []
    for index, level in enumerate(levels):
        rate = _good_turing(level.raw)
        rates.append(rate)
        totals = level.sum_by_context(level.raw)
        discounted = level.raw * np.append(rate, 1.0)[np.minimum(level.raw, len(rate))]
        kept = level.sum_by_context(discounted)
        scale = np.where((kept >= totals) & (totals > 0), totals + 1, np.maximum(totals, 1))
        probs = discounted / scale[level.contexts]
        if index == 0:
            made.append(BackoffLevel.make(level, _unigrams(probs, vocab_size), np.ones(1)))
            continue
        lower = made[-1].probs[level.suffixes]
        lower_left = 1 - level.sum_by_context(np.where(level.raw > 0, lower, 0.0))
        kept = kept / scale
        is_full = (lower_left < SMALLEST_MASS) & (totals > 0)
        probs = np.where(
            is_full[level.contexts], probs * ((1 - lower_left) / np.maximum(kept, 1e-300))[level.contexts], probs
        )
        weights = np.where(totals > 0, (1 - kept) / np.where(is_full, 1.0, lower_left), 1.0)
        made.append(BackoffLevel.make(level, probs, np.where(is_full, 1.0, weights)))
    return made, rates


def _unigrams(probs: Floats, vocab_size: int) -> Floats:
    """Share the freed mass among the words never seen; where there are none, scale to one."""
    words = probs[:vocab_size]
    unseen = words == 0
    left = 1 - words.sum()
    words = np.where(unseen, left / max(int(unseen.sum()), 1), words)
    return np.append(words / words.sum(), probs[vocab_size:])


def _good_turing(counts: Ints) -> tuple[float, ...]:
    """Return (d_0, d_1, ..., d_cutoff), what a count r is multiplied by.

    d_r = (r* / r - a) / (1 - a) with r* = (r + 1) n_(r+1) / n_r and a = (cutoff + 1) n_(cutoff+1) / n_1.
    The cutoff is lowered until every factor is usable; if none is, counts of one lose a half.
    """
    n = count_of_counts(counts, KATZ_CUTOFF + 1)
    for cutoff in range(KATZ_CUTOFF, 0, -1):
        if not all(n[1 : cutoff + 2]):
            continue
        a = (cutoff + 1) * n[cutoff + 1] / n[1]
        if a >= 1:
            continue
        rates = [((r + 1) * n[r + 1] / (r * n[r]) - a) / (1 - a) for r in range(1, cutoff + 1)]
        if all(0 < rate < 1 for rate in rates):
            return (1.0, *rates)
    return (1.0, 0.5)
