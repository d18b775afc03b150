"""A linear classifier learns what there is to learn, nothing from shuffled labels, and comes back the same."""

import random
import time

import numpy as np
import pytest

from modelwright.base.errors import ConfigError, DataError
from modelwright.data.classify import (
    FeatureConfig,
    LogisticConfig,
    find_features,
    fit_bayes,
    fit_logistic,
    load_classifier,
)

SMALL = FeatureConfig(num_buckets=1 << 14)
LETTERS = FeatureConfig("character", (1, 2, 3), 1 << 12)


def make_texts(seed, count):
    """Texts of two kinds that share most of their words."""
    rng = random.Random(seed)
    texts, labels = [], []
    for _ in range(count):
        label = rng.choice(["sea", "hill"])
        own = [f"{label}{rng.randrange(20)}" for _ in range(3)]
        words = [f"w{rng.randrange(200)}" for _ in range(20)] + own
        rng.shuffle(words)
        texts.append(" ".join(words))
        labels.append(label)
    return texts, labels


def accuracy(classifier, texts, labels):
    return np.mean([a == b for a, b in zip(classifier.predict(texts), labels, strict=True)])


@pytest.mark.parametrize("fit", [fit_logistic, fit_bayes])
def test_it_learns_and_shuffled_labels_teach_nothing(fit):
    texts, labels = make_texts(1, 400)
    unseen = make_texts(2, 200)
    assert accuracy(fit(texts, labels, SMALL), *unseen) > 0.95
    shuffled = random.Random(3).sample(labels, len(labels))
    assert 0.3 < accuracy(fit(texts, shuffled, SMALL), *unseen) < 0.7


def test_letters_tell_languages_apart_and_an_unknown_script_gives_no_answer():
    texts = ["the weather is fine and they think so", "das Wetter ist schoen und wir gehen nicht"] * 2
    classifier = fit_bayes(texts, ["en", "de"] * 2, LETTERS)
    assert classifier.predict(["they think that", "wir nicht"]) == ["en", "de"]
    assert np.allclose(classifier.probabilities(["\u4e2d\u6587\u5b57", "", "12 + 3"]), 0.5, atol=0.35)


def test_the_same_seed_gives_the_same_weights_and_another_another():
    texts, labels = make_texts(4, 60)
    first, again = (fit_logistic(texts, labels, SMALL, LogisticConfig(seed=5)) for _ in range(2))
    assert first.weights.tobytes() == again.weights.tobytes()
    other = fit_logistic(texts, labels, SMALL, LogisticConfig(seed=6))
    assert first.weights.tobytes() != other.weights.tobytes()


def test_a_score_does_not_depend_on_the_texts_beside_it():
    texts, labels = make_texts(7, 80)
    classifier = fit_logistic(texts, labels, SMALL)
    together = classifier.probabilities(["", *texts[:9], ""])
    alone = np.concatenate([classifier.probabilities([t]) for t in ["", *texts[:9], ""]])
    assert np.allclose(together, alone, atol=1e-6)


def test_saved_and_read_back(tmp_path):
    texts, labels = make_texts(8, 60)
    classifier = fit_bayes(texts, labels, LETTERS)
    classifier.save(tmp_path / "c", measured={"accuracy": 0.5})
    back = load_classifier(tmp_path / "c")
    assert back.labels == classifier.labels and back.features == LETTERS
    assert np.array_equal(back.probabilities(texts), classifier.probabilities(texts))
    assert back.score(texts[0], "sea") + back.score(texts[0], "hill") == pytest.approx(1)


def test_refusals(tmp_path):
    with pytest.raises(DataError, match="at least two kinds"):
        fit_logistic(["a", "b"], ["x", "x"])
    with pytest.raises(DataError, match="one label a text"):
        fit_bayes(["a", "b"], ["x"])
    with pytest.raises(ConfigError, match="power of two"):
        FeatureConfig(num_buckets=1000)
    with pytest.raises(ConfigError, match="word or character"):
        FeatureConfig(unit="byte")
    with pytest.raises(ConfigError, match="lengths from 1 to 8"):
        FeatureConfig(sizes=())
    with pytest.raises(DataError, match="does not exist"):
        load_classifier(tmp_path)
    classifier = fit_bayes(*make_texts(9, 20), SMALL)
    with pytest.raises(ConfigError, match="knows: hill, sea"):
        classifier.score("x", "lake")
    classifier.save(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    with pytest.raises(DataError, match="not a text classifier"):
        load_classifier(tmp_path / "c")


@pytest.mark.parametrize("piece", ["a", " ", "\u00e9\u4e2d", "a "])
def test_a_huge_line_is_judged_by_its_beginning(piece):
    begun = time.perf_counter()
    for config in (SMALL, LETTERS):
        assert len(find_features([piece * 2_000_000], config)) == 1
    assert time.perf_counter() - begun < 2
