"""word2vec: vectors of words that predict their neighbours, told from words drawn at random.

    skipgram    for each neighbour o of the word c:     log sigmoid(u_o . v_c) + sum_n log sigmoid(-u_n . v_c)
    cbow        for each word c, h the mean of v over its neighbours: the same with h for v_c and u_c for u_o

n are negatives, drawn with probability proportional to count^0.75; frequent words are left out at random with
probability 1 - sqrt(t / f), f their share of the corpus; each word's window is drawn from 1 .. window.
The gradients are written out.
Source: Mikolov et al. 2013, arXiv:1301.3781 and arXiv:1310.4546; word2vec.c, from which cbow gives every neighbour the
whole gradient of the mean and not its share. Not done: hierarchical softmax, phrases, several threads.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelwright.base.errors import ConfigError
from modelwright.models.word_vectors import Sentence, WordVectors, count_words

ALGORITHMS = ("skipgram", "cbow")
NOISE_POWER = 0.75
LAST_RATE = 1e-4  # share of the rate that is left at the end


@dataclass(frozen=True)
class Word2VecConfig:
    """How vectors are learned."""

    algorithm: str = "skipgram"  # skipgram or cbow
    size: int = 100
    window: int = 5  # words to each side, at most
    num_negatives: int = 5
    min_count: int = 5  # rarer words get no vector
    subsample: float | None = 1e-3  # t above; None: every word is kept
    num_epochs: int = 5
    learning_rate: float = 0.025  # falls to nearly zero in a line
    batch_size: int = 256  # pairs (cbow: words) an update; their gradients are added, so small vocabularies want few
    seed: int = 0

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ConfigError(f"algorithm is {self.algorithm!r}; known: {', '.join(ALGORITHMS)}.")
        for name in ("size", "window", "num_negatives", "num_epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")


def train_word2vec(sentences: Iterable[Sentence], config: Word2VecConfig | None = None) -> WordVectors:
    """Learn vectors from sentences.

    Raises:
        DataError: Fewer than two words occur often enough.
    """
    config = config or Word2VecConfig()
    words, counts, tokens, places = count_words(sentences, config.min_count)
    draw = np.random.default_rng(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    share = counts / counts.sum()
    keep = np.ones(len(words)) if config.subsample is None else np.sqrt(config.subsample / share)
    noise = torch.from_numpy(np.cumsum(share**NOISE_POWER) / np.sum(share**NOISE_POWER))
    vectors = (torch.rand(len(words), config.size, generator=generator) - 0.5) / config.size  # v
    outputs = torch.zeros(len(words), config.size)  # u
    losses = []
    for epoch in range(config.num_epochs):
        is_kept = draw.random(len(tokens)) < keep[tokens]
        inputs, targets = _examples(tokens[is_kept], places[is_kept], config, draw)
        total = 0.0
        for start in range(0, len(targets), config.batch_size):
            done = (epoch + start / len(targets)) / config.num_epochs
            rate = config.learning_rate * max(1 - done, LAST_RATE)
            rows = slice(start, start + config.batch_size)
            negatives = _negatives(noise, targets[rows], config, generator)
            total += _update(vectors, outputs, inputs[rows], targets[rows], negatives, rate)
        losses.append(total / max(len(targets), 1))
    return WordVectors(words, vectors.numpy(), losses)


def _examples(
    tokens: NDArray, places: NDArray, config: Word2VecConfig, draw: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return what is predicted from, (number, 1) or (number, 2 window) filled up with -1, and what is predicted."""
    windows = draw.integers(1, config.window + 1, len(tokens))
    columns = []
    for offset in (*range(-config.window, 0), *range(1, config.window + 1)):
        at = np.arange(len(tokens)) + offset
        is_near = (at >= 0) & (at < len(tokens)) & (abs(offset) <= windows)
        at = np.where(is_near, at, 0)
        columns.append(np.where(is_near & (places[at] == places), tokens[at], -1))
    neighbours = np.stack(columns, 1)  # (number of tokens, 2 window)
    if config.algorithm == "cbow":
        has_any = (neighbours >= 0).any(1)
        inputs, targets = neighbours[has_any], tokens[has_any]
    else:
        rows, _ = np.nonzero(neighbours >= 0)
        inputs, targets = tokens[rows][:, None], neighbours[neighbours >= 0]
    order = draw.permutation(len(targets))
    return torch.from_numpy(inputs[order]), torch.from_numpy(targets[order])


def _negatives(noise: Tensor, targets: Tensor, config: Word2VecConfig, generator: torch.Generator) -> Tensor:
    """Draw (B, K) words; one that is the target itself becomes -1 and does not count."""
    uniform = torch.rand(len(targets), config.num_negatives, generator=generator, dtype=noise.dtype)
    found = torch.searchsorted(noise, uniform).clamp_max(len(noise) - 1)
    return found.masked_fill(found == targets[:, None], -1)


def _update(vectors: Tensor, outputs: Tensor, inputs: Tensor, targets: Tensor, negatives: Tensor, rate: float) -> float:
    """Do one step of gradient descent on a batch; return the sum of its losses."""
    is_input = (inputs >= 0)[..., None]  # (B, I, 1)
    h = (vectors[inputs.clamp_min(0)] * is_input).sum(1) / is_input.sum(1)  # (B, D)
    asked = torch.cat([targets[:, None], negatives], 1)  # (B, 1 + K), the right one first
    is_asked = asked >= 0
    asked = asked.clamp_min(0)
    u = outputs[asked]  # (B, 1 + K, D)
    scores = (u @ h[..., None])[..., 0]  # (B, 1 + K)
    label = torch.zeros_like(scores)
    label[:, 0] = 1.0
    # loss = -log sigmoid(s) for the right one, -log sigmoid(-s) for the others; its gradient by s is sigmoid(s) - label
    loss = torch.nn.functional.softplus(torch.where(label > 0, -scores, scores)) * is_asked
    d_scores = (torch.sigmoid(scores) - label) * is_asked
    d_h = (d_scores[:, None] @ u)[:, 0]  # (B, D)
    d_u = d_scores[..., None] * h[:, None]  # (B, 1 + K, D)
    outputs.index_add_(0, asked.flatten(), d_u.flatten(0, 1), alpha=-rate)
    shared = (d_h[:, None] * is_input).flatten(0, 1)  # (B I, D)
    vectors.index_add_(0, inputs.clamp_min(0).flatten(), shared, alpha=-rate)
    return float(loss.sum())
