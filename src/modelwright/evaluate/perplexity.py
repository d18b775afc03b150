"""How well a model predicts held-out text: bits per byte, comparable between tokenizers, and perplexity a token.

Each document is encoded once and stands behind the end-of-text token, so its first token is scored too. A document
longer than the context is read in windows that overlap by half: every token is scored exactly once, and every token
past the first window sees at least ``max_seq_len // 2`` tokens before it. The number of bytes is that of the text
itself, never of a decoded round trip, which would count broken characters as three bytes each.
Source: Press et al. 2021 (sliding window), section 2; Gao et al. 2020 ("The Pile"), section 3.1 (bits per byte).
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, DataError
from modelwright.base.progress import track
from modelwright.base.types import Document
from modelwright.models.ngram import NgramModel
from modelwright.models.scoring import context_len, token_log_probs
from modelwright.models.weights import load_model
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.formats import load_tokenizer

MAX_WINDOW = 2048  # tokens that a text is read in at once


@dataclass(frozen=True)
class TextScore:
    """What a model spent on a text: total nats over ``tokens`` tokens that spell ``bytes`` bytes."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits for each byte of UTF-8; independent of the tokenizer."""
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """Exponential of the mean nats a token; comparable only under one tokenizer."""
        return math.exp(self.nats / self.tokens)


@dataclass(frozen=True)
class _Window:
    ids: list[int]
    num_scored: int  # the last so many of ``ids`` are scored here, the ones before are context


def cut_windows(ids: Sequence[int], max_seq_len: int) -> list[tuple[int, int, int]]:
    """Cut a row into overlapping windows; return (start, end, first scored) for each.

    The row's first token is context only. A row that fits is one window. Otherwise windows are ``max_seq_len`` long
    and start ``max_seq_len // 2`` apart, the last one moved back to end with the row.

    Example:
        >>> cut_windows(range(10), 4)
        [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    """
    if max_seq_len < 2:
        raise ConfigError(f"max_seq_len is {max_seq_len}; scoring a token needs at least 2: one token before it.")
    num, windows, done = len(ids), [], 1
    for start in range(0, max(num, 1), max_seq_len // 2):
        end = min(start + max_seq_len, num)
        if end > done:
            windows.append((max(end - max_seq_len, 0), end, done))
        done = max(done, end)
        if end == num:
            break
    return windows


def evaluate_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    documents: Sequence[Document | str],
    *,
    max_seq_len: int,
    batch_size: int = 16,
    dtype: torch.dtype | None = None,
) -> TextScore:
    """Score every token of ``documents`` once.

    Args:
        model: A causal model; left in the mode (train or eval) that it came in.
        max_seq_len: Window length in tokens, the separator included.
        batch_size: Windows scored together.
        dtype: Autocast to this type (bfloat16 is about twice as fast on a CPU that has it). None: the weights' own.

    Raises:
        DataError: The documents hold no text.
    """
    texts = [document if isinstance(document, str) else document.text for document in documents]
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    if not num_bytes:
        raise DataError(f"The {len(texts)} documents to score hold no text; expected at least one byte.")
    windows = [
        _Window(row[start:end], end - first)
        for row in ([tokenizer.eos_id, *ids] for ids in _encode(tokenizer, texts))
        for start, end, first in cut_windows(row, max_seq_len)
    ]
    windows.sort(key=lambda window: len(window.ids))  # equal lengths together: little padding
    device = next(model.parameters()).device
    nats = 0.0
    with _evaluating(model, dtype, device):
        for start in track(range(0, len(windows), batch_size), "score"):
            nats -= _score_batch(model, windows[start : start + batch_size], tokenizer.eos_id, device)
    return TextScore(nats=nats, tokens=sum(window.num_scored for window in windows), bytes=num_bytes)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    for text in texts:
        yield tokenizer.encode(text, add_special_tokens=False)


def _score_batch(model: nn.Module, batch: Sequence[_Window], pad_id: int, device: torch.device) -> float:
    longest = max(len(window.ids) for window in batch)
    # Padding stands on the right, where a causal model's earlier positions cannot see it.
    ids = torch.full((len(batch), longest), pad_id)
    is_scored = torch.zeros(len(batch), longest - 1, dtype=torch.bool)
    for row, window in enumerate(batch):
        length = len(window.ids)
        ids[row, :length] = torch.tensor(window.ids)
        is_scored[row, length - 1 - window.num_scored : length - 1] = True
    log_probs: Tensor = token_log_probs(model, ids.to(device))  # (B, T - 1)
    return float(log_probs.double()[is_scored.to(device)].sum())


@contextlib.contextmanager
def _evaluating(model: nn.Module, dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    was_training = model.training
    model.eval()
    autocast = contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)
    try:
        with torch.no_grad(), autocast:
            yield
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class TextPerplexity:
    """The perplexity of texts under a saved model: a function that worker processes can take along.

    Under a folder it is that of the model's own tokens; under an n-gram model's ``.arpa`` file that of its words.
    """

    model: Path  # folder of a causal language model with its tokenizer, or an .arpa file

    def __call__(self, text: str) -> float:
        """Return the perplexity of one text."""
        return _scorer(self.model)(text)


@lru_cache(maxsize=2)
def _scorer(path: Path) -> Callable[[str], float]:
    """Load a model, once a process."""
    if path.is_file():
        return NgramModel.load_arpa(path).perplexity
    model, tokenizer = load_model(path), load_tokenizer(path)
    window = min(context_len(model), MAX_WINDOW)
    return lambda text: evaluate_text(model, tokenizer, [text], max_seq_len=window).perplexity
