"""GloVe: vectors of words whose products are the logarithms of how often words stand near each other.

    J = sum_ij f(X_ij) (w_i . w~_j + b_i + b~_j - log X_ij)^2,      f(x) = min(1, (x / x_max)^0.75)

X_ij adds 1 / d for each time that j stands d words from i, up to the window, to either side. AdaGrad divides each
number's step by the root of the sum of its squared gradients. The vector of a word is w + w~.
Source: Pennington et al. 2014; Duchi et al. 2011 (AdaGrad). Not done: several threads, counts on disk.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelwright.base.errors import ConfigError, DataError
from modelwright.models.word_vectors import Sentence, WordVectors, count_words


@dataclass(frozen=True)
class GloveConfig:
    """How vectors are learned."""

    size: int = 100
    window: int = 10
    min_count: int = 5
    x_max: float = 100.0  # counts above it weigh the same; a small corpus wants 10
    alpha: float = 0.75
    num_epochs: int = 25
    learning_rate: float = 0.05
    batch_size: int = 1024  # entries of X an update
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "window", "num_epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not (self.x_max > 0 and self.learning_rate > 0):
            raise ConfigError(f"x_max is {self.x_max}, learning_rate {self.learning_rate}; both must be above 0.")


def count_neighbours(
    tokens: NDArray, places: NDArray, vocab_size: int, window: int
) -> tuple[NDArray, NDArray, NDArray]:
    """Return the entries (i, j, X_ij) of the symmetric matrix of weighted co-occurrences.

    >>> count_neighbours(np.array([0, 1, 2]), np.zeros(3), 3, window=2)[2].tolist()
    [1.0, 0.5, 1.0, 1.0, 0.5, 1.0]
    """
    keys, weights = [], []
    for offset in range(1, window + 1):
        is_near = places[offset:] == places[:-offset]
        left, right = tokens[:-offset][is_near], tokens[offset:][is_near]
        for i, j in ((left, right), (right, left)):
            keys.append(i * vocab_size + j)
            weights.append(np.full(len(i), 1.0 / offset))
    found, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    return found // vocab_size, found % vocab_size, np.bincount(inverse, weights=np.concatenate(weights))


def train_glove(sentences: Iterable[Sentence], config: GloveConfig | None = None) -> WordVectors:
    """Learn vectors from sentences.

    Raises:
        DataError: Fewer than two words occur often enough, or none stand near each other.
    """
    config = config or GloveConfig()
    words, _, tokens, places = count_words(sentences, config.min_count)
    i, j, x = count_neighbours(tokens, places, len(words), config.window)
    if not len(x):
        raise DataError("No two words stand in one sentence; there is nothing to learn from. Give longer sentences.")
    rows, columns = torch.from_numpy(i), torch.from_numpy(j)
    weight = torch.from_numpy(np.minimum(1.0, (x / config.x_max) ** config.alpha)).float()
    wanted = torch.from_numpy(np.log(x)).float()
    generator = torch.Generator().manual_seed(config.seed)
    # One matrix a side; the last column is the bias.
    sides = [(torch.rand(len(words), config.size + 1, generator=generator) - 0.5) / config.size for _ in range(2)]
    squares = [torch.ones_like(side) for side in sides]
    losses = []
    for _ in range(config.num_epochs):
        total = 0.0
        for at in torch.randperm(len(wanted), generator=generator).split(config.batch_size):
            total += _update(sides, squares, (rows[at], columns[at]), weight[at], wanted[at], config.learning_rate)
        losses.append(total / len(wanted))
    return WordVectors(words, (sides[0] + sides[1])[:, :-1].numpy(), losses)


def _update(
    sides: list[Tensor], squares: list[Tensor], at: tuple[Tensor, Tensor], weight: Tensor, wanted: Tensor, rate: float
) -> float:
    """Do one step of AdaGrad on a batch of entries; return the sum of their losses."""
    w, v = sides[0][at[0]], sides[1][at[1]]  # (B, D + 1)
    error = (w[:, :-1] * v[:, :-1]).sum(1) + w[:, -1] + v[:, -1] - wanted  # (B,)
    slope = (2 * weight * error)[:, None]  # of the loss by the error
    for side, square, place, other in ((sides[0], squares[0], at[0], v), (sides[1], squares[1], at[1], w)):
        gradient = torch.cat([slope * other[:, :-1], slope], 1)
        side.index_add_(0, place, gradient / square[place].sqrt(), alpha=-rate)
        square.index_add_(0, place, gradient**2)
    return float((weight * error**2).sum())
