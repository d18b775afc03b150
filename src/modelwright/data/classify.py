"""Tell texts apart by their n-grams: a linear classifier over hashed n-grams of words or characters.

Two ways to learn the same table of weights: `fit_logistic` (softmax regression by AdaGrad; for quality) and `fit_bayes`
(multinomial naive Bayes in one pass; for hundreds of languages with little text each). Either takes seconds, needs
NumPy alone and gives the same bytes for the same seed. The table is kept in ``model.safetensors`` beside
``classifier.json`` in an artifact, so any program can read it.

Source: Joulin et al., "Bag of Tricks for Efficient Text Classification" (2016), for hashed n-grams and a linear model;
Lui, Baldwin, "langid.py" (2012), for naive Bayes over character n-grams; Duchi et al., "Adaptive Subgradient Methods"
(2011). Not done: hidden layers, calibration of probabilities (naive Bayes is sure of itself on long texts).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from modelwright.base.artifact import new_artifact
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import read_json, write_json
from modelwright.data.shingles import Words, hash_grams, hash_words, join, mix

Floats = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]

WEIGHTS, SETTINGS = "model.safetensors", "classifier.json"
_MAX_TEXT_CHARS = 20_000  # enough to judge a text by; a book does not cost more than a page of its beginning


@dataclass(frozen=True)
class FeatureConfig:
    """Which n-grams of a text are looked at."""

    unit: str = "word"  # "word" or "character"
    sizes: tuple[int, ...] = (1, 2)  # lengths of the n-grams
    num_buckets: int = 1 << 18  # places of the table; a power of two

    def __post_init__(self) -> None:
        if self.unit not in ("word", "character"):
            raise ConfigError(f"unit is {self.unit!r}; it must be word or character.")
        if not self.sizes or min(self.sizes) < 1 or max(self.sizes) > 8:
            raise ConfigError(f"sizes is {self.sizes}; expected one or more lengths from 1 to 8.")
        if self.num_buckets < 2 or self.num_buckets & (self.num_buckets - 1):
            raise ConfigError(f"num_buckets is {self.num_buckets}; it must be a power of two.")


@dataclass(frozen=True)
class LogisticConfig:
    """How softmax regression is learned."""

    num_epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 0.5
    weight_decay: float = 1e-5  # of the table's rows that a batch touches
    seed: int = 0


@dataclass(frozen=True)
class Features:
    """The n-grams of several texts: those of text i are ``offsets[i]`` to ``offsets[i + 1]``."""

    buckets: Places  # (n-grams,) place of the table, each once a text
    counts: Floats  # (n-grams,)
    offsets: Places  # (texts + 1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def rows(self, chosen: Places) -> "Features":
        """Return those of the chosen texts, in that order."""
        sizes = np.diff(self.offsets)[chosen]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        at = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - self.offsets[chosen], sizes)
        return Features(self.buckets[at], self.counts[at], offsets)

    def normalized(self) -> "Features":
        """Return square roots of counts, scaled so that each text has length one: no text weighs by its size."""
        total = np.add.reduceat(np.append(self.counts, np.float32(0)), self.offsets[:-1])
        scale = 1 / np.sqrt(np.maximum(np.where(np.diff(self.offsets) > 0, total, 1), 1))
        values = np.sqrt(self.counts) * np.repeat(scale, np.diff(self.offsets))
        return Features(self.buckets, values.astype(np.float32), self.offsets)


def find_features(texts: Sequence[str], config: FeatureConfig) -> Features:
    """Return the hashed n-grams of the first 20,000 characters of each text."""
    texts = [text[:_MAX_TEXT_CHARS] for text in texts]
    units = hash_words(texts) if config.unit == "word" else join([_characters(text) for text in texts])
    shift = np.uint64(64 - (config.num_buckets - 1).bit_length())
    owners, buckets = [], []
    for size in config.sizes:
        grams = hash_grams(units, size) if size > 1 else units
        salt = np.uint64(size * 0x632BE59BD9B4E019 % 2**64)  # "a" and "a" as a whole short text are not one feature
        owners.append(np.repeat(np.arange(len(texts)), np.diff(grams.offsets)))
        buckets.append((mix(grams.hashes ^ salt) >> shift).astype(np.int64))
    keys = np.concatenate(owners) * config.num_buckets + np.concatenate(buckets)
    unique, counts = np.unique(keys, return_counts=True)
    offsets = np.searchsorted(unique, np.arange(len(texts) + 1) * config.num_buckets)
    return Features(unique % config.num_buckets, counts.astype(np.float32), offsets)


def _characters(text: str) -> Words:
    """The letters of a text as numbers, one blank for each stretch of anything else, and one at either end."""
    letters = "".join(c if c.isalpha() or c == "\u0301" else " " for c in text.casefold())
    spaced = f" {' '.join(letters.split())} "
    codes = np.frombuffer(spaced.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    hashes = mix((codes + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return Words(hashes, np.array([0, len(hashes)]))


@dataclass(frozen=True)
class TextClassifier:
    """A table of weights: one row for each bucket of n-grams, one column for each label."""

    labels: tuple[str, ...]
    features: FeatureConfig
    method: str  # "logistic" or "bayes"
    weights: Floats  # (num_buckets, labels)
    bias: Floats  # (labels,)

    def probabilities(self, texts: Sequence[str]) -> Floats:
        """Return (texts, labels); a text without a known n-gram gets the labels' prior shares."""
        found = find_features(texts, self.features)
        scores = _scores(found if self.method == "bayes" else found.normalized(), self.weights) + self.bias
        return _softmax(scores)

    def score(self, text: str, label: str) -> float:
        """Return how likely the label is for the text, 0 to 1."""
        if label not in self.labels:
            raise ConfigError(f"label is {label!r}; this classifier knows: {', '.join(self.labels)}.")
        return float(self.probabilities([text])[0, self.labels.index(label)])

    def predict(self, texts: Sequence[str]) -> list[str]:
        """Return the likeliest label of each text."""
        return [self.labels[i] for i in self.probabilities(texts).argmax(axis=1)]

    def save(self, path: Path, measured: Mapping[str, Any] | None = None, parents: Sequence[Path] = ()) -> None:
        """Write an artifact of kind "classifier", with the figures measured of it."""
        settings = {"labels": list(self.labels), "method": self.method, "features": asdict(self.features)}
        with new_artifact(Path(path), "classifier", settings=settings, parents=parents) as (work, figures):
            save_file({"weights": np.ascontiguousarray(self.weights), "bias": self.bias}, work / WEIGHTS)
            write_json(work / SETTINGS, settings)
            figures.update(measured or {})


def load_classifier(path: Path) -> TextClassifier:
    """Read a classifier that was saved.

    Raises:
        DataError: The folder holds none, or its parts do not fit each other.
    """
    settings = read_json(Path(path) / SETTINGS)
    try:
        tensors = load_file(Path(path) / WEIGHTS)
        known = settings["features"]
        features = FeatureConfig(known["unit"], tuple(known["sizes"]), known["num_buckets"])
        found = TextClassifier(
            tuple(settings["labels"]), features, settings["method"], tensors["weights"], tensors["bias"]
        )
    except (KeyError, TypeError, OSError, SafetensorError) as error:
        raise DataError(
            f"{path} is not a text classifier: {error}. Expected a folder that one was saved to."
        ) from error
    if found.weights.shape != (features.num_buckets, len(found.labels)) or found.bias.shape != (len(found.labels),):
        raise DataError(
            f"{path}: weights of shape {found.weights.shape} for {features.num_buckets} buckets and "
            f"{len(found.labels)} labels. The files do not belong together; save the classifier again."
        )
    return found


@lru_cache(maxsize=4)
def cached_classifier(path: str) -> TextClassifier:
    """Return the classifier of a folder, read once in a process: what a step that names a folder calls."""
    return load_classifier(Path(path))


def _scores(found: Features, weights: Floats) -> Floats:
    """Return the weighted sums, (texts, labels)."""
    out = np.zeros((len(found), weights.shape[1]), dtype=np.float32)
    is_filled = np.diff(found.offsets) > 0
    if is_filled.any():
        terms = weights[found.buckets].astype(np.float32) * found.counts[:, None]  # (n-grams, labels)
        out[is_filled] = np.add.reduceat(terms, found.offsets[:-1][is_filled], axis=0)
    return out


def _softmax(scores: Floats) -> Floats:
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _indices(labels: Sequence[str], num_texts: int) -> tuple[tuple[str, ...], Places]:
    names = tuple(sorted(set(labels)))
    if len(labels) != num_texts or len(names) < 2:
        raise DataError(
            f"{num_texts} texts with {len(labels)} labels, {len(names)} of them different; "
            "expected one label a text and at least two kinds. Give examples of each."
        )
    return names, np.array([names.index(label) for label in labels])


def fit_logistic(
    texts: Sequence[str],
    labels: Sequence[str],
    features: FeatureConfig | None = None,
    config: LogisticConfig | None = None,
) -> TextClassifier:
    """Learn by softmax regression; the same texts, settings and seed give the same weights.

    Raises:
        DataError: Fewer than two kinds of label, or not one label a text.
    """
    features, config = features or FeatureConfig(), config or LogisticConfig()
    names, targets = _indices(labels, len(texts))
    found = find_features(texts, features).normalized()
    weights = np.zeros((features.num_buckets, len(names)), dtype=np.float32)
    squares = np.full_like(weights, 1e-8)
    bias = np.zeros(len(names), dtype=np.float32)
    rng = np.random.default_rng(config.seed)
    for _ in range(config.num_epochs):
        order = rng.permutation(len(texts))
        for start in range(0, len(texts), config.batch_size):
            chosen = order[start : start + config.batch_size]
            batch = found.rows(chosen)
            error = _softmax(_scores(batch, weights) + bias)
            error[np.arange(len(chosen)), targets[chosen]] -= 1
            error /= len(chosen)
            touched, place = np.unique(batch.buckets, return_inverse=True)
            slope = config.weight_decay * weights[touched]
            np.add.at(slope, place, batch.counts[:, None] * np.repeat(error, np.diff(batch.offsets), axis=0))
            squares[touched] += slope**2
            weights[touched] -= config.learning_rate * slope / np.sqrt(squares[touched])
            bias -= config.learning_rate * 0.1 * error.sum(axis=0)
    return TextClassifier(names, features, "logistic", weights, bias)


def fit_bayes(
    texts: Sequence[str], labels: Sequence[str], features: FeatureConfig | None = None, smoothing: float = 0.5
) -> TextClassifier:
    """Learn by naive Bayes: the log of each n-gram's share in a label's texts, ``smoothing`` added to each count.

    Labels count as equally likely beforehand, however many texts each has.

    Raises:
        DataError: Fewer than two kinds of label, or not one label a text.
    """
    features = features or FeatureConfig()
    names, targets = _indices(labels, len(texts))
    counts = np.full((features.num_buckets, len(names)), smoothing, dtype=np.float32)
    found = find_features(texts, features)
    np.add.at(counts, (found.buckets, np.repeat(targets, np.diff(found.offsets))), found.counts)
    logs = np.log(counts / counts.sum(axis=0, dtype=np.float64))
    # Only differences between labels matter; without the mean a bucket that nobody has seen says nothing.
    logs -= logs.mean(axis=1, keepdims=True)
    # A label with less text gives each unseen n-gram a larger share; without this it would win every unknown script.
    unseen = counts.sum(axis=1) == np.float32(smoothing * len(names))
    logs[unseen] = 0
    return TextClassifier(names, features, "bayes", logs.astype(np.float32), np.zeros(len(names), np.float32))
