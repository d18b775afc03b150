"""Keep what reads like good text: a trained classifier, or how well a language model foresees it.

`train_quality` learns to tell a set of good texts from a set of ordinary ones by their words and pairs of words; the
figures it returns are measured on texts it did not see, beside two controls: the share of the larger class, and the
same training with shuffled labels. `QualityFilter` loads the result from its folder. `PerplexityFilter` takes any
function from a text to its perplexity (an n-gram model's, for one): which model that is, the caller knows.

Source: Brown et al., "Language Models are Few-Shot Learners" (2020), appendix A, for a linear classifier of quality;
Wenzek et al., "CCNet" (2020), section 3.4, for perplexity of an n-gram model. Not done: GPT-3's random acceptance of
low scores; a perplexity is not comparable between tokenizers, so no threshold is built in.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modelwright.base.errors import ConfigError
from modelwright.base.types import Document
from modelwright.data.classify import (
    FeatureConfig,
    LogisticConfig,
    TextClassifier,
    cached_classifier,
    fit_logistic,
)

GOOD, ORDINARY = "good", "ordinary"


@dataclass(frozen=True)
class QualityFigures:
    """What a classifier of quality does on texts that it was not trained on."""

    num_train: int
    num_held_out: int
    accuracy: float
    auc: float  # area under the ROC curve: how often a good text scores above an ordinary one
    baseline_accuracy: float  # always the larger class
    shuffled_auc: float  # the same training with labels dealt out at random: about 0.5, or the figure means nothing


def train_quality(
    good: Sequence[str],
    ordinary: Sequence[str],
    features: FeatureConfig | None = None,
    config: LogisticConfig | None = None,
    held_out_fraction: float = 0.2,
) -> tuple[TextClassifier, QualityFigures]:
    """Learn to tell good texts from ordinary ones, and measure it on a part of either that is held out.

    Raises:
        DataError: One of the two sets is empty.
    """
    config = config or LogisticConfig()
    texts = [*good, *ordinary]
    labels = [GOOD] * len(good) + [ORDINARY] * len(ordinary)
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(texts))
    num_held_out = int(len(texts) * held_out_fraction)
    test, train = order[:num_held_out].tolist(), order[num_held_out:].tolist()
    fit_texts, fit_labels = [texts[i] for i in train], [labels[i] for i in train]
    classifier = fit_logistic(fit_texts, fit_labels, features, config)
    shuffled = fit_logistic(fit_texts, [fit_labels[i] for i in rng.permutation(len(train))], features, config)
    is_good = np.array([labels[i] == GOOD for i in test])
    test_texts = [texts[i] for i in test]
    scores, control = (c.probabilities(test_texts)[:, c.labels.index(GOOD)] for c in (classifier, shuffled))
    return classifier, QualityFigures(
        num_train=len(train),
        num_held_out=num_held_out,
        accuracy=float(((scores > 0.5) == is_good).mean()) if num_held_out else math.nan,
        auc=area_under_curve(scores.tolist(), is_good.tolist()),
        baseline_accuracy=float(max(is_good.mean(), 1 - is_good.mean())) if num_held_out else math.nan,
        shuffled_auc=area_under_curve(control.tolist(), is_good.tolist()),
    )


def area_under_curve(scores: Sequence[float], is_positive: Sequence[bool]) -> float:
    """Return how often a positive scores above a negative, ties counted half; NaN without one of either.

    >>> area_under_curve([0.1, 0.4, 0.35, 0.8], [False, False, True, True])
    0.75
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(is_positive, dtype=bool)
    num_positive, num_negative = int(truth.sum()), int((~truth).sum())
    if not num_positive or not num_negative:
        return math.nan
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # the mean rank of equal scores
    return float((ranks[place][truth].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


@dataclass(frozen=True)
class QualityFilter:
    """Keeps documents that a trained classifier takes for good."""

    model: Path  # folder of the classifier
    min_score: float = 0.5  # 0 to 1; lower goes
    label: str = GOOD

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 1:
            raise ConfigError(f"min_score is {self.min_score}; it must be from 0 to 1.")

    def reason(self, document: Document) -> str:
        """Say that the score is too low; empty if it is not."""
        score = cached_classifier(str(self.model)).score(document.text, self.label)
        return "" if score >= self.min_score else f"quality {score:.3f}, at least {self.min_score}"


@dataclass(frozen=True)
class PerplexityFilter:
    """Keeps documents that a language model finds neither too strange nor too easy."""

    max_perplexity: float | None = None  # None means no bound
    min_perplexity: float | None = None  # below: endless repetition, or a text that the model has seen
    model: Path | None = None  # of a pipeline file: folder of a language model, or an n-gram model's .arpa file
    score: Callable[[str], float] | None = None  # from a text to its perplexity; None: mw data run makes it of model

    def reason(self, document: Document) -> str:
        """Say which bound the perplexity breaks; empty if none.

        Raises:
            ConfigError: No scorer was set.
        """
        if self.score is None:
            raise ConfigError(
                "The perplexity filter has no scorer. Set score to a function from a text to a number, or in a "
                "pipeline file model to the folder of a language model or an .arpa file."
            )
        found = self.score(document.text)
        if math.isnan(found):
            return "the perplexity is not a number"
        if self.max_perplexity is not None and found > self.max_perplexity:
            return f"perplexity {found:.1f}, at most {self.max_perplexity}"
        if self.min_perplexity is not None and found < self.min_perplexity:
            return f"perplexity {found:.1f}, at least {self.min_perplexity}"
        return ""
