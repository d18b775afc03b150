"""The order in which examples come: by difficulty, in stages, or growing with competence.

Difficulty is any number for an example: its length, its perplexity under a model (`by_perplexity` takes a callable), or
one that is given. Every order here is a function from an epoch to row numbers, as `data.feed` takes it, and the same
for the same seed. `sorted` and `stages` bring each example exactly once an epoch; `competence` draws from the easiest
part, which grows to all, over one pass, and every later epoch is shuffled.

Source: Bengio et al. 2009 (curriculum learning); Platanios et al. 2019, arXiv:1903.09848 (competence, square root).
Whether it helps is another matter: benchmarks/curriculum.py measures it against random order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelwright.base.errors import ConfigError, DataError
from modelwright.data.feed import Order, shuffled

Difficulties = npt.NDArray[np.float64]
KINDS = ("random", "sorted", "reverse", "stages", "competence")


@dataclass(frozen=True)
class CurriculumConfig:
    """In which order examples come."""

    kind: str = "random"  # "random", "sorted" (easiest first), "reverse", "stages" or "competence"
    num_stages: int = 4  # of "stages": parts of equal size from easy to hard, shuffled inside
    review_fraction: float = 0.0  # of "stages": so much of each later part changes places with earlier parts
    first_competence: float = 0.1  # of "competence": fraction of the examples that is open at the start
    num_epochs: int = 1  # that follow the curriculum; later ones are random

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"curriculum.kind is {self.kind!r}; known: {', '.join(KINDS)}.")
        if self.num_stages < 1 or not 0 <= self.review_fraction < 1 or not 0 < self.first_competence <= 1:
            raise ConfigError(
                f"num_stages is {self.num_stages}, review_fraction {self.review_fraction}, first_competence "
                f"{self.first_competence}; expected at least 1, from 0 to below 1, and above 0 to 1."
            )


def by_length(examples: Sequence[Sequence[int]]) -> Difficulties:
    """Return the number of tokens of each example."""
    return np.array([len(example) for example in examples], dtype=np.float64)


def by_perplexity(texts: Sequence[str], score: Callable[[str], float]) -> Difficulties:
    """Return what a scorer says of each text, for example `NgramModel`'s or a trained model's perplexity."""
    return np.array([score(text) for text in texts], dtype=np.float64)


def order_by(difficulties: Difficulties, config: CurriculumConfig, seed: int) -> Order:
    """Return the order of examples by their difficulty; equally difficult ones are shuffled.

    Raises:
        DataError: A difficulty is not a number.
    """
    difficulties = np.asarray(difficulties, dtype=np.float64)
    if np.isnan(difficulties).any():
        place = int(np.flatnonzero(np.isnan(difficulties))[0])
        raise DataError(f"The difficulty of example {place} is not a number. Score it, or leave the example out.")
    random = shuffled(len(difficulties), seed)

    def order(epoch: int) -> npt.NDArray[np.int64]:
        if config.kind == "random" or epoch >= config.num_epochs:
            return random(epoch)
        rng = np.random.default_rng([seed, epoch, 1])
        ties = rng.permutation(len(difficulties))
        ranked = ties[np.argsort(difficulties[ties], kind="stable")]
        if config.kind == "sorted":
            return ranked
        if config.kind == "reverse":
            return ranked[::-1].copy()
        if config.kind == "stages":
            return _stages(ranked, config, rng)
        return _competence(ranked, config.first_competence, rng)

    return order


def _stages(ranked: npt.NDArray[np.int64], config: CurriculumConfig, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Shuffle inside parts of equal size; a fraction of each later part trades places with an earlier one."""
    parts = [rng.permutation(part) for part in np.array_split(ranked, config.num_stages)]
    for number in range(1, len(parts)):
        num = int(len(parts[number]) * config.review_fraction)
        for place in rng.permutation(len(parts[number]))[:num]:
            other = parts[int(rng.integers(number))]
            if len(other):
                at = int(rng.integers(len(other)))
                parts[number][place], other[at] = other[at], parts[number][place]
    return np.concatenate([rng.permutation(part) for part in parts])


def _competence(ranked: npt.NDArray[np.int64], first: float, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draw each example from the easiest c(t) = sqrt(t (1 - c0^2) + c0^2), t from 0 to 1 over the pass."""
    progress = np.arange(len(ranked)) / max(1, len(ranked))
    open_fraction = np.sqrt(progress * (1 - first**2) + first**2)
    limits = np.maximum(1, np.ceil(open_fraction * len(ranked))).astype(np.int64)
    return ranked[rng.integers(0, limits)]
