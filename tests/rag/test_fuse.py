import numpy as np
import pytest

from modelwright.base.errors import ConfigError
from modelwright.rag.fuse import FusionConfig, best, fuse, normalise


def test_scores_lie_between_the_median_and_the_best():
    assert normalise(np.array([1.0, 2, 3, 4, 5])).tolist() == [0, 0, 0, 0.5, 1]


@pytest.mark.parametrize("scores", [[], [3.0], [2.0, 2.0, 2.0], [0.0, 0.0]])
def test_scores_that_tell_nothing_become_0(scores: list[float]):
    assert normalise(np.array(scores)).tolist() == [0.0] * len(scores)


def test_most_passages_sharing_the_best_score_still_beat_the_rest():
    assert normalise(np.array([1.0, 2.0, 2.0])).tolist() == [0, 1, 1]


def test_a_share_of_0_or_1_is_one_half_alone():
    bm25, dense = np.array([5.0, 1, 0, 0]), np.array([0.1, 0.9, 0.2, 0.0])
    assert (fuse(bm25, dense, 0.0) == normalise(bm25)).all()
    assert (fuse(bm25, dense, 1.0) == normalise(dense)).all()


def test_the_scale_of_a_half_does_not_matter():
    bm25, dense = np.array([5.0, 1, 0, 0]), np.array([0.1, 0.9, 0.2, 0.0])
    assert fuse(1000 * bm25 + 7, dense - 3, 0.4) == pytest.approx(fuse(bm25, dense, 0.4))


def test_an_exact_match_gives_bm25_the_larger_share():
    config = FusionConfig(dense_weight=0.6, exact_dense_weight=0.2)
    assert config.share(0.0) == pytest.approx(0.6)
    assert config.share(1.0) == pytest.approx(0.2)


def test_ties_keep_the_order_and_zeros_are_no_hits():
    assert best(np.array([0.0, 2, 3, 2, 0]), 10).tolist() == [2, 1, 3]
    assert best(np.array([0.0, 2, 3, 2, 0]), 2).tolist() == [2, 1]


def test_weights_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="dense_weight=0.1"):
        FusionConfig(dense_weight=0.1, exact_dense_weight=0.5)
