"""Tell in which language a text is written, by its characters alone.

`train_languages` learns it from any texts sorted by language (naive Bayes over n-grams of one to four characters, in
seconds), so nothing is downloaded and any language can be added by giving a page of it. Without a trained folder
`LanguageFilter` asks the library lingua (the extra ``language``), whose models for 75 languages lie within the package.
Codes are what the training texts were called; lingua says ISO 639-3 (``eng``), and ISO 639-1 (``en``) is understood.

Source: Lui, Baldwin, "langid.py" (2012); the threshold of 0.65 as in Penedo et al., "The FineWeb Datasets" (2024), of
another classifier there. Not done: several languages in one text; a confidence that means a frequency (naive Bayes is
either sure or lost, so the threshold mostly catches texts too short to tell, and scripts that no training text has).
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from modelwright.base.errors import ConfigError, DataError, MissingExtraError
from modelwright.base.types import Document
from modelwright.data.classify import FeatureConfig, TextClassifier, cached_classifier, fit_bayes

CHARACTERS = FeatureConfig(unit="character", sizes=(1, 2, 3, 4), num_buckets=1 << 16)
_MAX_CHARS = 2000  # of a text; more make no judgement better
_MIN_LETTERS = 10  # fewer say nothing


@dataclass(frozen=True)
class LanguageFigures:
    """What a classifier of languages does on pieces of text that it was not trained on."""

    num_languages: int
    num_train: int
    num_held_out: int
    accuracy: float
    shuffled_accuracy: float  # the same training with labels dealt out at random: about one in the languages
    worst: tuple[tuple[str, float], ...]  # the ten languages least often told right


def train_languages(
    texts: Mapping[str, Sequence[str]], features: FeatureConfig = CHARACTERS, held_out_every: int = 5, seed: int = 0
) -> tuple[TextClassifier, LanguageFigures]:
    """Learn languages from pieces of text (sentences, paragraphs) by the language's name.

    Every ``held_out_every``-th piece of a language is held out and measured on; a language of fewer pieces has none.

    Raises:
        DataError: Fewer than two languages, or one without any text.
    """
    empty = [name for name, pieces in texts.items() if not any(piece.strip() for piece in pieces)]
    if empty:
        raise DataError(f"There is no text of {empty[0]!r}; give a page of it, or leave the language out.")
    pieces = [
        (name, piece, i % held_out_every == held_out_every - 1) for name in texts for i, piece in enumerate(texts[name])
    ]
    train = [(name, piece) for name, piece, is_held_out in pieces if not is_held_out]
    test = [(name, piece) for name, piece, is_held_out in pieces if is_held_out]
    names, train_texts = [name for name, _ in train], [piece for _, piece in train]
    classifier = fit_bayes(train_texts, names, features)
    dealt = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    control = fit_bayes(train_texts, dealt, features)
    truth = [name for name, _ in test]
    found, chance = (c.predict([piece for _, piece in test]) if test else [] for c in (classifier, control))
    right: dict[str, list[bool]] = {}
    for name, answer in zip(truth, found, strict=True):
        right.setdefault(name, []).append(name == answer)
    worst = sorted(((name, sum(marks) / len(marks)) for name, marks in right.items()), key=lambda row: (row[1], row[0]))
    return classifier, LanguageFigures(
        num_languages=len(texts),
        num_train=len(train),
        num_held_out=len(test),
        accuracy=_share(truth, found),
        shuffled_accuracy=_share(truth, chance),
        worst=tuple(worst[:10]),
    )


def _share(truth: Sequence[str], found: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(truth, found, strict=True)) / max(1, len(truth))


@cache
def _lingua() -> Any:
    """Return lingua's detector of all its languages, made once in a process."""
    try:
        from lingua import LanguageDetectorBuilder
    except ImportError:
        raise MissingExtraError(
            "lingua-language-detector", "language", "Telling languages without a trained model"
        ) from None
    return LanguageDetectorBuilder.from_all_languages().build()


def _ask_lingua(text: str) -> tuple[set[str], float]:
    found = _lingua().compute_language_confidence_values(text)
    if not found:
        return set(), 0.0
    language = found[0].language
    return {language.iso_code_639_3.name.lower(), language.iso_code_639_1.name.lower()}, float(found[0].value)


@dataclass(frozen=True)
class LanguageFilter:
    """Keeps documents in given languages."""

    keep: tuple[str, ...] = ("eng",)
    model: Path | None = None  # folder of a classifier that `train_languages` made; None: the library lingua
    min_confidence: float = 0.65

    def __post_init__(self) -> None:
        if not self.keep:
            raise ConfigError("keep is empty; name at least one language.")
        if not 0 <= self.min_confidence <= 1:
            raise ConfigError(f"min_confidence is {self.min_confidence}; it must be from 0 to 1.")

    def identify(self, text: str) -> tuple[set[str], float]:
        """Return what the likeliest language is called, and how likely it is."""
        if self.model is None:
            return _ask_lingua(text)
        classifier = cached_classifier(str(self.model))
        unknown = sorted(set(self.keep) - set(classifier.labels))
        if unknown:
            raise ConfigError(
                f"keep holds {unknown[0]!r}, which {self.model} does not know: {', '.join(classifier.labels)}."
            )
        shares = classifier.probabilities([text])[0]
        best = int(shares.argmax())
        return {classifier.labels[best]}, float(shares[best])

    def reason(self, document: Document) -> str:
        """Say which language it is instead, or that it cannot be told; empty if it is one to keep."""
        text = document.text[:_MAX_CHARS]
        num_letters = sum(unicodedata.category(c)[0] in "LM" for c in text)
        if num_letters < _MIN_LETTERS:
            return f"{num_letters} letters, too few to tell the language; at least {_MIN_LETTERS}"
        names, confidence = self.identify(text)
        if confidence < self.min_confidence:
            return f"language {max(names, default='unknown')} only at {confidence:.2f}, at least {self.min_confidence}"
        return "" if names & set(self.keep) else f"language {max(names)}, wanted {', '.join(self.keep)}"
