"""N-gram language models over words or token ids: the baseline that a neural model must beat.

The probability of a word depends on the ``order - 1`` words before it. `NgramModel.train` counts them
(`ngram_counts`), shares out probability by one of six methods (`ngram_smoothing`), and keeps the result as a back-off
model: P(w | h) is stored if h w was seen, else it is b(h) P(w | h') with h' the context without its oldest word.

Over words, ``<s>`` opens a sentence, ``</s>`` closes it and is predicted, and a word never seen is
``<unk>``, which is what KenLM and SRILM do; such a model is saved as ARPA (`arpa`) and read back. Over ids, the
vocabulary is closed and nothing is added but a boundary in front.
Source: Chen & Goodman 1999. Not done: pruning, class-based models.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modelwright.base.errors import ConfigError, DataError
from modelwright.base.registry import lookup
from modelwright.models import SMOOTHINGS
from modelwright.models.arpa import BOS, EOS, UNK, read_arpa, write_arpa
from modelwright.models.ngram_counts import Ints, count_ngrams, look_up
from modelwright.models.ngram_smoothing import BackoffLevel

MAX_ORDER = 16
DEFAULT_K = 0.05

Text = str | Sequence[str] | Sequence[int]  # a string is split at white space; or words; or token ids


class NgramModel:
    """An n-gram model; make one with `train` or `load_arpa`.

    Example:
        >>> model = NgramModel.train(["the cat sat", "the dog sat", "a cat ran"], order=2)
        >>> model.log_prob(["the", "cat", "ran"]) > model.log_prob(["ran", "the", "cat"])
        True
        >>> bool(abs(model.distribution(["the"]).sum() - 1) < 1e-9)
        True
    """

    def __init__(
        self,
        levels: Sequence[BackoffLevel],
        vocab_size: int,
        *,
        bos_id: int | None = None,
        vocabulary: Sequence[str] | None = None,
        num_ngrams: Sequence[int] = (),
        estimates: Sequence[tuple[float, ...]] = (),
    ):
        self._levels = list(levels)
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.vocabulary = list(vocabulary) if vocabulary is not None else None  # of the ids, if the model is of words
        self.num_ngrams = tuple(num_ngrams)  # distinct n-grams seen at each order, from unigrams up
        self.estimates = tuple(estimates)  # what the smoothing estimated at each order: discounts, lambdas, ...
        # Without an id of its own the boundary is one symbol past the vocabulary: a context, never predicted.
        self._boundary = vocab_size if bos_id is None else bos_id
        self._width = vocab_size + 1
        self._ids = {word: i for i, word in enumerate(self.vocabulary or ())}

    @property
    def order(self) -> int:
        """Length of the longest n-gram; the context is one token shorter."""
        return len(self._levels)

    @classmethod
    def train(
        cls,
        texts: Sequence[Text],
        order: int = 5,
        smoothing: str = "modified_kneser_ney",
        *,
        vocab_size: int | None = None,
        bos_id: int | None = None,
        min_count: int = 1,
        k: float | None = None,
    ) -> "NgramModel":
        """Count the n-grams of ``texts``; none spans two texts.

        Args:
            texts: A string holds a sentence on each line, split at white space; a list is one sentence's words or ids.
            order: Length of the longest n-gram.
            smoothing: laplace, add_k, katz, interpolated (Jelinek-Mercer), kneser_ney or modified_kneser_ney.
            vocab_size: None: the words are those of the texts. Given: texts are token ids below it.
            bos_id: With ``vocab_size``, the id that stands before each text as context, usually the end-of-text id.
                None: a symbol of its own that is no part of the vocabulary.
            min_count: Words seen less often are counted as ``<unk>``. Models are compared on one vocabulary.
            k: For add_k, what is added to each count. None: 0.05.

        Raises:
            ConfigError: An unknown smoothing, an order out of range, or settings that have no effect together.
            DataError: No tokens, an id outside the vocabulary, or a boundary symbol inside a text.
        """
        estimate = lookup(SMOOTHINGS, smoothing, "smoothing")
        _check_settings(order, smoothing, vocab_size, bos_id, min_count, k)
        if isinstance(texts, str):
            raise DataError("texts is one string; expected a list of sentences. Use text.splitlines() or [text].")
        vocabulary, num_texts = None, len(texts)
        if vocab_size is None:
            words = [sentence for text in texts for sentence in _sentences(text)]
            counts = Counter(chain.from_iterable(words))
            kept = [word for word, count in counts.items() if count >= min_count and word != UNK]
            vocabulary = [UNK, EOS, *kept]
            texts, vocab_size = words, len(vocabulary)
        model = cls([], vocab_size, bos_id=bos_id, vocabulary=vocabulary)
        rows = [model._encode(text) for text in texts]
        if not any(len(row) > (vocabulary is not None) for row in rows):
            raise DataError(f"{num_texts} documents hold no tokens; an n-gram model needs text to count.")
        tokens, places = model._flatten(rows)
        levels = count_ngrams(tokens, places, order, model._width, model._boundary)
        model.num_ngrams = tuple(int((level.raw > 0).sum()) for level in levels)
        model._levels, model.estimates = estimate(levels, vocab_size, DEFAULT_K if k is None else k)
        return model

    def _encode(self, text: Text) -> Sequence[int]:
        """Return the ids of a text; over words, that of the end of the sentence included."""
        if self.vocabulary is None:
            if isinstance(text, str):
                raise DataError(
                    f"The text {text[:40]!r} is a string, but this model is over token ids. Encode it first."
                )
            return text  # type: ignore[return-value]
        unknown = self._ids[UNK]
        return [*(self._ids.get(word, unknown) for word in _words(text)), self._ids[EOS]]

    def _flatten(self, rows: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
        """Join documents, each behind its boundary; also return every token's place in its document (boundary 0)."""
        lengths = np.fromiter((len(row) + 1 for row in rows), np.int64, len(rows))
        starts = np.cumsum(lengths) - lengths
        places = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
        tokens = np.full(len(places), self._boundary, np.int64)
        tokens[places > 0] = np.fromiter(chain.from_iterable(rows), np.int64)
        wrong = (places > 0) & ((tokens < 0) | (tokens >= self.vocab_size))
        if wrong.any():
            raise DataError(
                f"Token id {tokens[wrong][0]} is outside the vocabulary of {self.vocab_size}. "
                "Encode the text with the tokenizer that the model was made for."
            )
        return tokens, places

    def _context_ids(self, tokens: Ints, places: Ints) -> list[Ints]:
        """For each order k, the id of the (k-1)-gram that ends at each token; -1 where it was never seen."""
        found = [np.zeros(len(tokens), np.int64), tokens]
        for k, level in enumerate(self._levels[1:-1], start=2):
            ids = np.full(len(tokens), -1, np.int64)
            at = np.flatnonzero(places >= k - 1)
            ids[at] = look_up(level.keys, found[-1][at - 1], tokens[at], self._width)
            found.append(ids)
        return found[: self.order]

    def _probabilities(self, contexts: Sequence[Ints], words: Ints) -> NDArray[np.float64]:
        """P(word | context) elementwise; ``contexts[k - 1]`` holds the context ids of order k."""
        result = np.empty(len(words))
        for k, (level, context) in enumerate(zip(self._levels, contexts, strict=True), start=1):
            place = look_up(level.keys, context, words, self._width)
            backed_off = level.weights[context] * result if k > 1 else 0.0
            # At order 1 every word has a place, so nothing undefined is read.
            result = np.where(place >= 0, np.append(level.probs, 0.0)[place], backed_off)
        return result

    def _score(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        tokens, places = self._flatten(rows)
        at = np.flatnonzero(places > 0)
        contexts = [ids[at - 1] for ids in self._context_ids(tokens, places)]
        return np.log(self._probabilities(contexts, tokens[at]))

    def log_probs(self, tokens: Text) -> NDArray[np.float64]:
        """Natural log-probability of each token of one text, given up to ``order - 1`` tokens before it.

        Over words, one more stands at the end: that of the end of the sentence.
        """
        return self._score([self._encode(tokens)])

    def log_prob(self, tokens: Text, *, end: bool = True) -> float:
        """Natural log-probability of one whole sentence, from its beginning; divide by ln 10 for KenLM's score.

        Args:
            tokens: The sentence, without boundary symbols; a string is split at white space.
            end: Over words, count the end of the sentence too. Over ids there is none.
        """
        found = self.log_probs(tokens)
        return float(found[:-1].sum() if self.vocabulary is not None and not end else found.sum())

    def perplexity(self, *texts: Text) -> float:
        """Return exp of the mean negative log-probability a token, over all texts given; ends of sentences count.

        A string holds a sentence on each line, as in training.
        """
        is_of_words = self.vocabulary is not None
        rows = [row for text in texts for row in (_sentences(text) if is_of_words else [text])]
        scores = self._score([self._encode(row) for row in rows])
        if not len(scores):
            raise DataError(f"{len(texts)} texts hold no tokens; perplexity needs at least one.")
        return float(np.exp(-scores.mean()))

    def distribution(self, context: Text = ()) -> NDArray[np.float64]:
        """Return P(token | context) for the whole vocabulary; ``context`` is read as the start of a text."""
        row = self._encode(context)
        tokens, places = self._flatten([row if self.vocabulary is None else row[:-1]])
        contexts = [np.repeat(ids[-1:], self.vocab_size) for ids in self._context_ids(tokens, places)]
        return self._probabilities(contexts, np.arange(self.vocab_size))

    def bits_per_byte(self, documents: Sequence[Text], num_bytes: int) -> float:
        """Bits that the model spends on ``documents``, for each of the ``num_bytes`` bytes of their text."""
        if num_bytes < 1:
            raise DataError(f"num_bytes is {num_bytes}; bits per byte needs at least one byte of text.")
        return float(-self._score([self._encode(d) for d in documents]).sum() / math.log(2) / num_bytes)

    def generate(self, seed: int, max_tokens: int = 40) -> list[str]:
        """Draw a sentence word by word until its end; a model of words only."""
        words = self._vocabulary("generate draws words")
        draw = np.random.default_rng(seed)
        sentence: list[str] = []
        while len(sentence) < max_tokens:
            probs = self.distribution(sentence)
            word = words[int(draw.choice(self.vocab_size, p=probs / probs.sum()))]
            if word == EOS:
                break
            sentence.append(word)
        return sentence

    def save_arpa(self, path: str | Path) -> None:
        """Write the model in the ARPA format, which KenLM, SRILM and speech recognisers read."""
        write_arpa(Path(path), self._levels, self._vocabulary("An ARPA file holds words"))

    @classmethod
    def load_arpa(cls, path: str | Path) -> "NgramModel":
        """Read an ARPA file, ours or another's.

        Raises:
            DataError: The file is not there or not what its header says; the message names the line.
        """
        levels, vocabulary = read_arpa(Path(path))
        # The boundary is an entry of the file that is never predicted.
        sizes = [len(level.keys) for level in levels]
        return cls(levels, len(vocabulary), vocabulary=vocabulary, num_ngrams=[sizes[0] - 1, *sizes[1:]])

    def _vocabulary(self, purpose: str) -> list[str]:
        if self.vocabulary is None:
            raise ConfigError(
                f"{purpose}, but this model was trained over token ids (vocab_size={self.vocab_size}). "
                "Train it on words: leave out vocab_size."
            )
        return self.vocabulary


def _sentences(text: Text) -> list[list[str]]:
    """Return the sentences of a text: the lines of a string that are not blank, or the list as it is."""
    if isinstance(text, str):
        return [_words(line) for line in text.splitlines() if line.strip()]
    return [_words(text)]


def _words(text: Text) -> list[str]:
    words = text.split() if isinstance(text, str) else [str(token) for token in text]
    for word in (BOS, EOS):
        if word in words:
            raise DataError(f"The text holds {word!r}, which marks a sentence's boundary and is added. Remove it.")
    return words


def _check_settings(
    order: int, smoothing: str, vocab_size: int | None, bos_id: int | None, min_count: int, k: float | None
) -> None:
    if not 1 <= order <= MAX_ORDER:
        raise ConfigError(f"order is {order}; expected 1 (unigram) to {MAX_ORDER}.")
    if bos_id is not None and (vocab_size is None or not 0 <= bos_id < vocab_size):
        raise ConfigError(f"bos_id is {bos_id}; expected None or an id below the vocabulary size {vocab_size}.")
    if min_count < 1 or (vocab_size is not None and min_count != 1):
        raise ConfigError(
            f"min_count is {min_count}; expected 1 or more, and 1 with vocab_size, where words are given."
        )
    if k is not None and (smoothing != "add_k" or not k > 0):
        raise ConfigError(
            f"k is {k} with smoothing {smoothing!r}; expected a positive number, and add_k alone uses it."
        )
