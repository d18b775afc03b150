"""Spans have the share and the mean length of the papers, and every corrupted text can be mended from its target."""

import numpy as np
import pytest

from modelwright.base.errors import ConfigError, DataError
from modelwright.data.denoise import UL2, Denoiser, corrupt, denoise, mark_spans, mend_text

SENTINELS, END = list(range(10_000, 9_900, -1)), 1


@pytest.mark.parametrize(("fraction", "mean_span"), [(0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.5, 64.0)])
def test_share_and_mean_length_of_spans_are_exact(fraction, mean_span):
    lengths = []
    for seed in range(50):
        marked = mark_spans(512, fraction, mean_span, np.random.default_rng(seed))
        assert marked.sum() == round(512 * fraction)
        num = int((np.diff(marked.astype(int)) == 1).sum())
        assert num == round(round(512 * fraction) / mean_span)
        assert not marked[0]
        starts = np.flatnonzero(np.diff(np.concatenate([[0], marked.astype(int), [0]])))
        lengths += list(starts[1::2] - starts[::2])
    assert abs(np.mean(lengths) - mean_span) < 0.1 * mean_span
    assert len(set(lengths)) > 3  # lengths differ; only their mean is fixed


@pytest.mark.parametrize("length", [2, 3, 5, 17, 400])
@pytest.mark.parametrize("denoiser", UL2, ids=lambda d: f"{d.mode}-{d.fraction}-{d.mean_span}")
def test_a_corrupted_text_can_be_mended(denoiser, length):
    ids = np.arange(100, 100 + length)
    for seed in range(5):
        seen, target = denoise(ids, denoiser, SENTINELS, END, [7], np.random.default_rng(seed))
        assert seen[0] == 7 and seen[-1] == END == target[-1]
        assert mend_text(seen[1:], target, SENTINELS, END) == ids.tolist()
        assert len(seen) < length + 60  # no token is in both
        assert not set(seen.tolist()) & set(target.tolist()) & set(ids.tolist())


def test_the_sequential_denoiser_takes_the_end():
    ids = np.arange(100, 300)
    shares = []
    for seed in range(200):
        seen, target = denoise(ids, Denoiser(0.25, None), SENTINELS, END, [], np.random.default_rng(seed))
        assert target[:-1].tolist()[1:] == list(range(300 - len(target) + 2, 300))
        shares.append((len(target) - 2) / 200)
    assert abs(np.mean(shares) - 0.25) < 0.03


def test_the_papers_example():
    # Figure 2 of Raffel et al.: "Thank you for inviting me to your party last week"
    words = np.arange(10)
    marked = np.array([0, 0, 1, 1, 0, 0, 0, 0, 1, 0], dtype=bool)
    seen, target = corrupt(words, marked, SENTINELS, END)
    assert seen.tolist() == [0, 1, SENTINELS[0], 4, 5, 6, 7, SENTINELS[1], 9, END]
    assert target.tolist() == [SENTINELS[0], 2, 3, SENTINELS[1], 8, END]


def test_what_cannot_be_corrupted_is_refused():
    with pytest.raises(DataError, match="100 corrupted spans, and the tokenizer 3 sentinels"):
        corrupt(np.arange(200), np.arange(200) % 2 == 1, [1, 2, 3], END)
    with pytest.raises(DataError, match="text of 1 tokens"):
        mark_spans(1, 0.15, 3.0, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="mean_span"):
        Denoiser(0.15, 0.5)
