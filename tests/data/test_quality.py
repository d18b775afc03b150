"""Quality and perplexity: the edge of each bound, the controls, and a filter that loads what was trained."""

import math
import pickle
import random
from pathlib import Path

import pytest

from modelwright.base.errors import ConfigError, DataError
from modelwright.base.types import Document
from modelwright.data.classify import FeatureConfig
from modelwright.data.quality import PerplexityFilter, QualityFilter, area_under_curve, train_quality


def make_sets(seed, count):
    rng = random.Random(seed)
    plain = [[f"w{rng.randrange(300)}" for _ in range(30)] for _ in range(2 * count)]
    good = [" ".join([*words, *rng.sample(["therefore", "evidence", "theorem", "history"], 2)]) for words in plain[::2]]
    ordinary = [" ".join([*words, *rng.sample(["click", "subscribe", "deal", "login"], 2)]) for words in plain[1::2]]
    return good, ordinary


def test_trained_beside_its_controls_and_used_as_a_filter(tmp_path):
    good, ordinary = make_sets(1, 150)
    classifier, figures = train_quality(good, ordinary, FeatureConfig(sizes=(1,), num_buckets=1 << 14))
    assert figures.accuracy > 0.95 > figures.baseline_accuracy + 0.3
    assert figures.auc > 0.98 and 0.25 < figures.shuffled_auc < 0.75
    assert figures.num_train + figures.num_held_out == 300
    classifier.save(tmp_path / "quality")
    step = pickle.loads(pickle.dumps(QualityFilter(tmp_path / "quality")))
    assert step.reason(Document("a", "history and evidence and w1")) == ""
    assert step.reason(Document("b", "click here to subscribe, login w1")).startswith("quality 0.")
    score = classifier.score("history w7 click", "good")
    just_kept, just_gone = (QualityFilter(tmp_path / "quality", score + d) for d in (-1e-6, 1e-6))
    assert just_kept.reason(Document("c", "history w7 click")) == ""
    assert "at least" in just_gone.reason(Document("c", "history w7 click"))


def test_area_under_the_curve():
    assert area_under_curve([1, 1, 1, 1], [True, False, True, False]) == 0.5
    assert area_under_curve([3, 2, 1], [True, False, False]) == 1.0
    assert math.isnan(area_under_curve([1, 2], [True, True]))


def test_perplexity_bounds_and_who_sets_the_scorer():
    step = PerplexityFilter(max_perplexity=10.0, min_perplexity=2.0, score=lambda text: float(text))
    verdicts = {text: step.reason(Document("x", text)) for text in ("10.0", "10.1", "2.0", "1.9", "nan", "inf")}
    assert verdicts["10.0"] == verdicts["2.0"] == ""
    assert verdicts["10.1"] == "perplexity 10.1, at most 10.0"
    assert verdicts["1.9"] == "perplexity 1.9, at least 2.0"
    assert "not a number" in verdicts["nan"] and "at most" in verdicts["inf"]
    with pytest.raises(ConfigError, match="no scorer"):
        PerplexityFilter(max_perplexity=5).reason(Document("x", "a"))


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="from 0 to 1"):
        QualityFilter(Path("x"), min_score=1.5)
    with pytest.raises(DataError, match="does not exist"):
        QualityFilter(tmp_path / "none").reason(Document("x", "a"))
    with pytest.raises(DataError, match="two kinds"):
        train_quality([], ["a", "b"])
