"""Leave out toxic documents: a linear classifier over words and pairs of words, trained here on labelled texts.

`train_toxicity` learns from texts that people called toxic or not; its figures are measured on texts held out, beside a
lexicon learned from the same training texts (how many of the most telling words stand in a text) and the same training
with shuffled labels. `ToxicityFilter` judges a document by its worst window, so that one abusive passage in a long page
is not averaged away.

A classifier knows the toxicity of its training texts. Labelled tweets, for one, teach it to take dialect and reclaimed
words for abuse (Sap et al., "The Risk of Racial Bias in Hate Speech Detection", 2019): audit what it removes.

Source: Davidson et al., "Automated Hate Speech Detection and the Problem of Offensive Language" (2017) for the task and
a linear model over n-grams; Welbl et al., "Challenges in Detoxifying Language Models" (2021) for what filtering costs.
Not done: kinds of toxicity, languages other than the training texts'.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modelwright.base.errors import ConfigError
from modelwright.base.types import Document
from modelwright.data.classify import FeatureConfig, LogisticConfig, TextClassifier, cached_classifier, fit_logistic
from modelwright.data.quality import area_under_curve

TOXIC, CLEAN = "toxic", "clean"
_ADDRESSED = re.compile(r"@\w{1,50}|https?://\S{1,500}|&#?\w{1,8};|\bRT\b")


@dataclass(frozen=True)
class ToxicityFigures:
    """What a classifier of toxicity does on texts that it was not trained on; F1 is of the toxic class, at 0.5."""

    num_train: int
    num_held_out: int
    auc: float
    f1: float
    lexicon_auc: float
    lexicon_f1: float  # at the count of words that is best on the training texts
    shuffled_auc: float  # about 0.5, or the figures mean nothing


def plain_words(text: str) -> str:
    """Take out names of accounts, links and entities, which tell who writes, not what.

    >>> plain_words("RT @someone: so &amp; so").split()
    [':', 'so', 'so']
    """
    return _ADDRESSED.sub(" ", text)


def train_toxicity(
    texts: Sequence[str],
    is_toxic: Sequence[bool],
    features: FeatureConfig | None = None,
    config: LogisticConfig | None = None,
    held_out_fraction: float = 0.2,
) -> tuple[TextClassifier, ToxicityFigures]:
    """Learn from labelled texts and measure on a part of them that is held out.

    Raises:
        DataError: All texts have one label, or there is not one label a text.
    """
    config = config or LogisticConfig(num_epochs=3)
    texts = [plain_words(text) for text in texts]
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(texts))
    num_held_out = int(len(texts) * held_out_fraction)
    test, train = order[:num_held_out].tolist(), order[num_held_out:].tolist()
    fit_texts, fit_truth = [texts[i] for i in train], [bool(is_toxic[i]) for i in train]
    labels = [TOXIC if toxic else CLEAN for toxic in fit_truth]
    classifier = fit_logistic(fit_texts, labels, features, config)
    shuffled = fit_logistic(fit_texts, [labels[i] for i in rng.permutation(len(train))], features, config)
    truth, test_texts = [bool(is_toxic[i]) for i in test], [texts[i] for i in test]
    scores, control = (c.probabilities(test_texts)[:, c.labels.index(TOXIC)].tolist() for c in (classifier, shuffled))
    lexicon = learn_lexicon(fit_texts, fit_truth)
    least = max(range(1, 4), key=lambda n: f1([count_words(t, lexicon) >= n for t in fit_texts], fit_truth))
    counts = [count_words(text, lexicon) for text in test_texts]
    return classifier, ToxicityFigures(
        num_train=len(train),
        num_held_out=num_held_out,
        auc=area_under_curve(scores, truth),
        f1=f1([score > 0.5 for score in scores], truth),
        lexicon_auc=area_under_curve([float(count) for count in counts], truth),
        lexicon_f1=f1([count >= least for count in counts], truth),
        shuffled_auc=area_under_curve(control, truth),
    )


def learn_lexicon(texts: Sequence[str], is_toxic: Sequence[bool], num_words: int = 100) -> frozenset[str]:
    """Return the words whose log-odds for toxic texts are highest, of those in ten texts or more."""
    counts = {True: Counter[str](), False: Counter[str]()}
    for text, toxic in zip(texts, is_toxic, strict=True):
        counts[bool(toxic)].update(set(_words(text)))
    num_toxic, num_clean = sum(is_toxic), len(texts) - sum(is_toxic)

    def odds(word: str) -> float:
        return math.log((counts[True][word] + 0.5) / (num_toxic + 1)) - math.log(
            (counts[False][word] + 0.5) / (num_clean + 1)
        )

    known = sorted(word for word in counts[True] if counts[True][word] + counts[False][word] >= 10)
    return frozenset(sorted(known, key=odds, reverse=True)[:num_words])


def count_words(text: str, lexicon: frozenset[str]) -> int:
    """Return how many words of the text are in the lexicon."""
    return sum(word in lexicon for word in _words(text))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def f1(said: Sequence[bool], truth: Sequence[bool]) -> float:
    """Return the harmonic mean of precision and recall of what was said to be true.

    >>> f1([True, True, False], [True, False, False])
    0.6666666666666666
    """
    right = sum(s and t for s, t in zip(said, truth, strict=True))
    return 2 * right / max(1, sum(said) + sum(truth))


@dataclass(frozen=True)
class ToxicityFilter:
    """Takes out documents of which some window of words is toxic."""

    model: Path  # folder of the classifier
    max_score: float = 0.8  # 0 to 1; above goes
    window_words: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.max_score <= 1 or self.window_words < 1:
            raise ConfigError(
                f"max_score is {self.max_score} and window_words {self.window_words}; "
                "expected a score from 0 to 1 and one word or more. Set them so."
            )

    def reason(self, document: Document) -> str:
        """Say that a window's score is too high; empty if none is."""
        words = plain_words(document.text).split()
        windows = [" ".join(words[at : at + self.window_words]) for at in range(0, len(words), self.window_words)]
        if not windows:
            return ""
        classifier = cached_classifier(str(self.model))
        worst = float(classifier.probabilities(windows)[:, classifier.labels.index(TOXIC)].max())
        return "" if worst <= self.max_score else f"toxicity {worst:.3f}, at most {self.max_score}"
