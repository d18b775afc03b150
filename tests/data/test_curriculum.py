"""Orders by difficulty bring each example once an epoch, easy ones first where that is said."""

import numpy as np
import pytest

from modelwright.base.errors import ConfigError, DataError
from modelwright.data.curriculum import CurriculumConfig, by_length, by_perplexity, order_by

HARD = np.random.default_rng(0).integers(0, 9, 400).astype(float)


@pytest.mark.parametrize("kind", ["random", "sorted", "reverse", "stages"])
def test_each_example_comes_once_an_epoch_and_the_order_is_the_seeds(kind):
    order = order_by(HARD, CurriculumConfig(kind, review_fraction=0.2), seed=3)
    for epoch in (0, 1):
        assert sorted(order(epoch)) == list(range(400))
        assert (order(epoch) == order_by(HARD, CurriculumConfig(kind, review_fraction=0.2), seed=3)(epoch)).all()
    assert (order(0) != order_by(HARD, CurriculumConfig(kind), seed=4)(0)).any(), "equally hard ones are shuffled"


def test_sorted_rises_reverse_falls_and_later_epochs_are_random():
    config = CurriculumConfig("sorted")
    assert (np.diff(HARD[order_by(HARD, config, 0)(0)]) >= 0).all()
    assert (np.diff(HARD[order_by(HARD, CurriculumConfig("reverse"), 0)(0)]) <= 0).all()
    later = HARD[order_by(HARD, config, 0)(1)]
    assert abs(later[:200].mean() - later[200:].mean()) < 1
    assert (np.diff(HARD[order_by(HARD, CurriculumConfig("sorted", num_epochs=2), 0)(1)]) >= 0).all()


def test_stages_rise_and_review_brings_easy_ones_back():
    plain = HARD[order_by(HARD, CurriculumConfig("stages", num_stages=4), 0)(0)].reshape(4, 100)
    assert all(a.max() <= b.min() for a, b in zip(plain, plain[1:], strict=False))
    assert (np.diff(plain[1]) < 0).any(), "shuffled inside"
    review = HARD[order_by(HARD, CurriculumConfig("stages", review_fraction=0.3), 0)(0)].reshape(4, 100)
    assert review[3].min() < plain[3].min() and (np.diff(review.mean(axis=1)) > 0).all()


def test_competence_opens_the_easy_part_first_and_everything_at_the_end():
    drawn = HARD[order_by(HARD, CurriculumConfig("competence", first_competence=0.1), 0)(0)]
    assert len(drawn) == 400
    assert drawn[:20].max() <= np.sort(HARD)[130] and drawn[-100:].max() == HARD.max()


def test_difficulties_come_from_lengths_or_any_scorer():
    assert by_length([[1], [1, 2, 3]]).tolist() == [1, 3]
    assert by_perplexity(["ab", "a"], lambda text: 1 / len(text)).tolist() == [0.5, 1]
    with pytest.raises(DataError, match="difficulty of example 1 is not a number"):
        order_by(np.array([0.0, np.nan]), CurriculumConfig(), 0)


@pytest.mark.parametrize("values", [{"kind": "sortd"}, {"num_stages": 0}, {"review_fraction": 1.0}])
def test_wrong_settings_are_refused(values):
    with pytest.raises(ConfigError):
        CurriculumConfig(**values)
