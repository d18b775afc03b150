"""Short signatures of sets whose places agree as often as the sets overlap, cut into bands that propose near-copies.

Classic MinHash evaluates k hash functions on each of n members. Here a member is thrown into one of the k places by
one hash, the smallest value in each place stays, and only places still empty are tried again, with new hashes: about
n + k log k evaluations instead of n k. In the end each place still empty is filled by a hash function of its own, as
in MinHash. Every place thus holds a member of the set drawn by a rule that is the same for all sets, so two sets agree
in it with a probability equal to their Jaccard similarity, and the number of agreeing places scatters no more than
MinHash's does.

Source: Broder, "On the resemblance and containment of documents" (1997); Dahlgaard, Knudsen, Thorup, "Fast Similarity
Sketching" (FOCS 2017), here with 8 rounds before the last instead of k; Leskovec, Rajaraman, Ullman, "Mining of Massive
Datasets", ch. 3, for bands. Not done: weights of members, b-bit signatures.

Letters: N sets, K places of a signature, B bands of R rows.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from modelwright.base.errors import ConfigError
from modelwright.data.shingles import Hashes, Places, Words, mix

Signatures = npt.NDArray[np.uint32]

_SEED = 20_240_601
_NUM_ROUNDS = 8
_BATCH_MEMBERS = 1 << 15
_MANY_MEMBERS = 1 << 12
_EMPTY = np.uint64(2**64 - 1)
_HALF = np.uint64(32)
_LOW = np.uint64(2**32 - 1)


@dataclass(frozen=True)
class Bands:
    """How a signature is cut: sets that agree in all rows of one band are proposed."""

    num_bands: int
    band_size: int  # rows

    def __post_init__(self) -> None:
        if min(self.num_bands, self.band_size) < 1:
            raise ConfigError(f"{self.num_bands} bands of {self.band_size} rows; both must be at least 1.")

    @property
    def num_hashes(self) -> int:
        """Places of a signature."""
        return self.num_bands * self.band_size

    def proposal_rate(self, similarity: float) -> float:
        """Return how likely two sets of this similarity are proposed.

        >>> round(Bands(25, 5).proposal_rate(0.6), 4)
        0.8678
        """
        return float(1 - (1 - similarity**self.band_size) ** self.num_bands)


@cache
def choose_bands(threshold: float, num_hashes: int = 128, min_recall: float | None = 0.99) -> Bands:
    """Choose bands and rows for a threshold.

    Args:
        threshold: Jaccard similarity from which two sets count as near-copies.
        num_hashes: Places of a signature at most.
        min_recall: Proposals will be checked: the longest bands that still propose this share of the pairs right at
            the threshold, so that few are proposed in vain. None: proposals are final, and the areas of wrong ones
            below and of missed ones above the threshold are made smallest together, as datasketch does.

    >>> choose_bands(0.8), choose_bands(0.8, min_recall=None)
    (Bands(num_bands=21, band_size=6), Bands(num_bands=9, band_size=13))
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold is {threshold}; it must be above 0 and at most 1.")
    if num_hashes < 1:
        raise ConfigError(f"num_hashes is {num_hashes}; it must be at least 1.")
    if min_recall is not None:
        for rows in range(num_hashes, 0, -1):
            bands = Bands(num_hashes // rows, rows)
            if bands.proposal_rate(threshold) >= min_recall:
                return bands
        raise ConfigError(
            f"{num_hashes} hashes cannot propose {min_recall:.0%} of the pairs of similarity {threshold}; "
            "take more hashes or a lower min_recall."
        )
    below, above = np.linspace(0, threshold, 200), np.linspace(threshold, 1, 200)

    def wrong(bands: Bands) -> float:
        missed, in_vain = ((1 - s**bands.band_size) ** bands.num_bands for s in (above, below))
        return float((1 - in_vain).mean() * threshold + missed.mean() * (1 - threshold))

    pairs = [Bands(b, r) for r in range(1, num_hashes + 1) for b in range(1, num_hashes // r + 1)]
    return min(pairs, key=wrong)


def sign_sets(members: Words, num_hashes: int) -> Signatures:
    """Return the signatures of sets of mixed 64-bit hashes, (N, K); members may repeat; an empty set's is all ones."""
    signatures = np.full((len(members), num_hashes), _LOW, dtype=np.uint32)
    counts = np.diff(members.offsets)
    filled = np.flatnonzero(counts)
    start = 0
    ends = np.cumsum(counts[filled])
    while start < len(filled):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _BATCH_MEMBERS, side="right")))
        rows = filled[start:stop]
        hashes = members.hashes[members.offsets[rows[0]] : members.offsets[rows[-1] + 1]]
        signatures[rows] = _sign_batch(hashes, counts[rows], num_hashes)
        start = stop
    return signatures


def _sign_batch(hashes: Hashes, counts: Places, num_hashes: int) -> Signatures:
    """Sign sets that lie end to end, none of them empty."""
    rng = np.random.default_rng(_SEED)
    factors: Hashes = rng.integers(0, 2**64, _NUM_ROUNDS, dtype=np.uint64) | np.uint64(1)
    best = np.full(len(counts) * num_hashes, _EMPTY, dtype=np.uint64)
    table = best.reshape(len(counts), num_hashes)  # (N, K), round in the high half, value in the low one
    num_places = np.uint64(num_hashes)
    owners = np.repeat(np.arange(len(counts)) * num_hashes, counts)
    own_hashes, is_open = hashes, np.ones(len(counts), dtype=bool)
    for number in range(_NUM_ROUNDS):
        drawn = mix(own_hashes * factors[number]) if number else own_hashes  # they come mixed
        places = owners + ((drawn >> _HALF) * num_places >> _HALF).astype(np.int64)
        np.minimum.at(best, places, (drawn & _LOW) | np.uint64(number << 32))
        still = (table == _EMPTY).any(axis=1)
        if not still.any():
            break
        if still.sum() < is_open.sum():
            chosen = np.repeat(still[is_open], counts[is_open])
            owners, own_hashes, is_open = owners[chosen], own_hashes[chosen], still
    else:
        _fill(table, hashes, counts)
    return (best & _LOW).astype(np.uint32).reshape(len(counts), num_hashes)


def _fill(table: Hashes, hashes: Hashes, counts: Places) -> None:
    """Give each place still empty the smallest value of its set under a hash function of its own."""
    sets, places = np.nonzero(table == _EMPTY)
    salts: Hashes = np.random.default_rng(_SEED + 1).integers(0, 2**64, (table.shape[1],), dtype=np.uint64)
    starts = np.cumsum(counts) - counts
    # A large set with empty places says a few things over and over; as it stands it would cost its size a place.
    for number in np.unique(sets[counts[sets] > _MANY_MEMBERS]):
        own = np.unique(hashes[starts[number] : starts[number] + counts[number]])
        for place in places[sets == number]:
            table[number, place] = (mix(own + salts[place]) & _LOW).min()
    is_small = counts[sets] <= _MANY_MEMBERS
    sets, places = sets[is_small], places[is_small]
    if not len(sets):
        return
    sizes = counts[sets]
    begins = np.cumsum(sizes) - sizes
    at = np.arange(sizes.sum()) - np.repeat(begins - starts[sets], sizes)
    values = mix(hashes[at] + np.repeat(salts[places], sizes)) & _LOW
    table[sets, places] = np.minimum.reduceat(values, begins)


def band_keys(signatures: Signatures, bands: Bands) -> Hashes:
    """Return one number for each band of each signature, (N, B)."""
    rows = signatures[:, : bands.num_hashes].astype(np.uint64).reshape(len(signatures), bands.num_bands, -1)
    keys = np.full(rows.shape[:2], np.uint64(bands.band_size))
    for row in range(bands.band_size):
        keys = mix(keys * np.uint64(0x9E3779B97F4A7C15) + rows[:, :, row])
    return keys


def colliding(keys: Hashes) -> tuple[Places, Places]:
    """Return (set, bucket) for every set that shares a bucket with another, in the order of the sets.

    Args:
        keys: (N, B), as `band_keys` gives. Memory beyond it: 24 bytes a set, for one band at a time, and the result.
    """
    found_sets, found_buckets = [], []
    for band in range(keys.shape[1]):
        order = np.argsort(keys[:, band], kind="stable")
        values = keys[order, band]
        is_new = np.ones(len(order), dtype=bool)
        is_new[1:] = values[1:] != values[:-1]
        is_shared = ~is_new
        is_shared[:-1] |= ~is_new[1:]
        firsts = order[is_new][np.cumsum(is_new)[is_shared] - 1]
        found_sets.append(order[is_shared])
        found_buckets.append(firsts * keys.shape[1] + band)  # the bucket is called by its first set and its band
    sets, buckets = np.concatenate(found_sets), np.concatenate(found_buckets)
    order = np.argsort(sets, kind="stable")
    return sets[order], buckets[order]
