"""Toxicity is learned beyond its lexicon and its control, and one bad passage is enough to take a document out."""

import random
from pathlib import Path

import pytest

from modelwright.base.errors import ConfigError, DataError
from modelwright.base.types import Document
from modelwright.data.classify import FeatureConfig, LogisticConfig
from modelwright.data.step import Filter
from modelwright.data.toxicity import ToxicityFilter, count_words, learn_lexicon, plain_words, train_toxicity

SMALL = FeatureConfig(num_buckets=1 << 14)


def make_texts(num, seed=0):
    """Made texts: "grobble" is abuse when it is aimed at somebody, and not when it is cooked."""
    dice = random.Random(seed)
    words = "river stone paper garden window letter cloud table yellow quiet".split()
    texts, labels = [], []
    for i in range(num):
        filler = " ".join(dice.choices(words, k=8))
        toxic = i % 2 == 0
        texts.append(f"{filler} {'you grobble' if toxic else 'cooked grobble'} {dice.choice(words)}")
        labels.append(toxic)
    return texts, labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    classifier, figures = train_toxicity(*make_texts(600), SMALL, LogisticConfig(num_epochs=3))
    folder = tmp_path_factory.mktemp("toxicity") / "model"
    classifier.save(folder)
    return folder, figures


def test_pairs_of_words_are_learned_and_shuffled_labels_are_not(trained):
    _, figures = trained
    assert figures.auc > 0.99 and figures.f1 > 0.98
    assert 0.3 < figures.shuffled_auc < 0.7
    assert (figures.num_train, figures.num_held_out) == (480, 120)


def test_one_passage_in_a_long_document_is_enough(trained):
    clean = "river stone paper garden window letter cloud table " * 200
    judge = ToxicityFilter(trained[0], max_score=0.5, window_words=12)
    assert isinstance(judge, Filter)
    assert judge.reason(Document("a", clean)) == "" == judge.reason(Document("b", ""))
    bad = f"{clean} quiet yellow river you grobble stone {clean}"
    assert judge.reason(Document("c", bad)).startswith("toxicity 0.")
    assert ToxicityFilter(trained[0], max_score=1.0, window_words=12).reason(Document("c", bad)) == ""


def test_the_lexicon_holds_what_tells_most():
    lexicon = learn_lexicon(*make_texts(200), num_words=1)
    assert lexicon == {"you"} and count_words("You, you and me", lexicon) == 2
    assert plain_words("@a_b see https://x.y/z &#128514; RT ok").split() == ["see", "ok"]


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="max_score is 2"):
        ToxicityFilter(Path("x"), max_score=2)
    with pytest.raises(DataError):
        train_toxicity(["a b", "c d"], [True, True], SMALL)
    with pytest.raises(DataError):
        ToxicityFilter(tmp_path / "none").reason(Document("a", "text"))
