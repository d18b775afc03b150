"""Hidden tokens are exactly as many as the paper says, with its fates, and words stay whole where asked."""

import numpy as np
import pytest

from modelwright.base.errors import ConfigError
from modelwright.data.masking import MaskingConfig, mask_tokens
from modelwright.data.pack import IGNORED

MASK, ORDINARY = 4, np.arange(500, 600)


def masked(num=200, config=None, seed=0, words=None):
    ids = np.arange(1000, 1000 + num)
    words = list(range(num)) if words is None else words
    return ids, *mask_tokens(ids, words, MASK, ORDINARY, config or MaskingConfig(), np.random.default_rng(seed))


def test_fifteen_of_a_hundred_tokens_are_hidden_and_the_rest_untouched():
    for seed in range(5):
        ids, seen, labels = masked(200, seed=seed)
        hidden = labels != IGNORED
        assert hidden.sum() == 30
        assert (labels[hidden] == ids[hidden]).all()
        assert (seen[~hidden] == ids[~hidden]).all()


def test_eighty_ten_ten():
    fates = np.zeros(3)
    for seed in range(300):
        ids, seen, labels = masked(100, seed=seed)
        hidden = labels != IGNORED
        fates += [
            (seen[hidden] == MASK).sum(),
            np.isin(seen[hidden], ORDINARY).sum(),
            (seen[hidden] == ids[hidden]).sum(),
        ]
    shares = fates / fates.sum()
    # 4,500 draws: three standard errors of a share of 0.1 are 0.013
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.015)


def test_special_tokens_are_never_hidden():
    words = [None, *range(8), None]
    for seed in range(50):
        _, _, labels = masked(10, MaskingConfig(0.5), seed, words)
        assert labels[0] == IGNORED == labels[-1]
    _, seen, labels = masked(3, words=[None, None, None])
    assert (labels == IGNORED).all() and seen.tolist() == [1000, 1001, 1002]


def test_whole_words_are_hidden_in_all_their_pieces_or_none():
    words = [i // 3 for i in range(120)]  # words of three pieces
    for seed in range(20):
        _, _, labels = masked(120, MaskingConfig(whole_words=True), seed, words)
        hidden = (labels != IGNORED).reshape(-1, 3)
        assert (hidden.all(1) | ~hidden.any(1)).all()
        assert hidden.sum() == 18
    # control: single tokens cut words
    _, _, labels = masked(120, MaskingConfig(), 0, words)
    cut = (labels != IGNORED).reshape(-1, 3)
    assert not (cut.all(1) | ~cut.any(1)).all()


def test_every_draw_is_another_and_the_same_seed_the_same():
    first, again, other = (masked(seed=seed)[2] for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"fraction": 0.0}, "fraction is 0"), ({"mask_fraction": 0.95, "random_fraction": 0.1}, "at most 1")],
)
def test_wrong_shares_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        MaskingConfig(**changes)
