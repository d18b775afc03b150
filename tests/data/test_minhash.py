"""Signatures agree as often as sets overlap, bands propose what theory says, and batches change nothing."""

import numpy as np
import pytest

from modelwright.base.errors import ConfigError
from modelwright.data import minhash
from modelwright.data.minhash import Bands, band_keys, choose_bands, colliding, sign_sets
from modelwright.data.shingles import Words, mix


def make_pairs(size, similarity, count, seed=0):
    """Pairs of sets of ``size`` members, and their Jaccard similarity."""
    common = round(2 * size * similarity / (1 + similarity))
    members = mix(np.random.default_rng(seed).integers(0, 2**64, (count, 2 * size - common), dtype=np.uint64))
    sets = (members[:, :size], members[:, size - common :])
    return [Words(s.reshape(-1), np.arange(count + 1) * size) for s in sets], common / (2 * size - common)


@pytest.mark.parametrize("size", [1, 3, 20, 300])
@pytest.mark.parametrize("similarity", [0.0, 0.5, 0.8, 1.0])
def test_places_agree_as_often_as_sets_overlap(size, similarity):
    (first, second), exact = make_pairs(size, similarity, 400)
    agree = sign_sets(first, 128) == sign_sets(second, 128)
    # 400 sets of 128 places; places of a set depend on each other, most of all in sets of one member.
    assert abs(agree.mean() - exact) < 0.01
    scatter = agree.mean(axis=1).std()
    assert scatter <= 1.1 * np.sqrt(exact * (1 - exact) / 128) + 1e-9 or size <= 3


@pytest.mark.parametrize(("size", "similarity"), [(30, 0.6), (300, 0.6), (300, 0.4), (300, 0.8)])
def test_bands_propose_as_often_as_the_theory_says(size, similarity):
    (first, second), exact = make_pairs(size, similarity, 1500)
    bands = Bands(25, 5)
    keys = [band_keys(sign_sets(s, bands.num_hashes), bands) for s in (first, second)]
    rate = (keys[0] == keys[1]).any(axis=1).mean()
    assert abs(rate - bands.proposal_rate(exact)) < 0.045  # 2 points and two standard errors of 1,500 draws


def test_a_signature_does_not_depend_on_its_neighbours_or_on_repetition(monkeypatch):
    rng = np.random.default_rng(3)
    sizes = np.array([0, 1, 5, 0, 700, 33, 33, 0])
    members = mix(rng.integers(0, 2**64, sizes.sum(), dtype=np.uint64))
    together = sign_sets(Words(members, np.concatenate([[0], np.cumsum(sizes)])), 100)
    monkeypatch.setattr(minhash, "_BATCH_MEMBERS", 10)
    parted = sign_sets(Words(members, np.concatenate([[0], np.cumsum(sizes)])), 100)
    assert np.array_equal(together, parted)
    own = members[1:6]
    twice = rng.permutation(np.concatenate([own, own]))
    assert np.array_equal(sign_sets(Words(twice, np.array([0, 10])), 100)[0], together[2])
    assert (together[[0, 3, 7]] == 2**32 - 1).all()
    assert sign_sets(Words(members[:0], np.array([0])), 100).shape == (0, 100)


def test_bands_are_chosen_for_the_threshold():
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.95, 1.0):
        checked, final = choose_bands(threshold), choose_bands(threshold, min_recall=None)
        assert checked.num_hashes <= 128 and final.num_hashes <= 128
        assert checked.proposal_rate(threshold) >= 0.99
        if threshold < 1:
            longer = Bands(128 // (checked.band_size + 1), checked.band_size + 1)
            assert longer.proposal_rate(threshold) < 0.99
            assert abs((1 / final.num_bands) ** (1 / final.band_size) - threshold) < 0.12
    for wrong in (0, 1.1, -1):
        with pytest.raises(ConfigError, match="above 0 and at most 1"):
            choose_bands(wrong)
    with pytest.raises(ConfigError, match="at least 1"):
        Bands(0, 5)


def test_colliding_sets_and_their_buckets():
    keys = np.array([[1, 9], [2, 8], [1, 7], [3, 8], [1, 6]], dtype=np.uint64)
    sets, buckets = colliding(keys)
    assert sets.tolist() == [0, 1, 2, 3, 4]
    assert buckets.tolist() == [0, 3, 0, 3, 0]


def test_a_few_members_said_a_thousand_times_change_nothing():
    few = mix(np.arange(1, 8, dtype=np.uint64))
    many = np.tile(few, 1000)
    expected = sign_sets(Words(few, np.array([0, 7])), 64)[0]
    members = np.concatenate([many, few])
    signed = sign_sets(Words(members, np.array([0, len(many), len(members)])), 64)
    assert np.array_equal(signed[0], expected) and np.array_equal(signed[1], expected)
