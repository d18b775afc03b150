"""Several sources in given proportions, exactly and in the same order for every number of ranks.

Source i has the share w_i. At each place the source comes that lags most behind its share, so that after n samples it
has come within one of n * w_i times for two sources, and within a few for many: no drawing of lots, hence no luck in
the proportions and nothing but counts to save. The rows of a source come in its own order, epoch after epoch: small
sources with large shares are read several times.

Shares from sizes: w_i is proportional to size_i ** (1 / temperature); 1 is as large as they are, infinity all equal.
Source: Arivazhagan et al. 2019, arXiv:1907.05019 (temperature); Raffel et al. 2020, section 3.5.2.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from modelwright.base.errors import ConfigError
from modelwright.data.feed import Epochs, Order, Picks, State


def mixing_weights(sizes: Mapping[str, float], temperature: float = 1.0) -> dict[str, float]:
    """Return shares that sum to 1 from sizes, or from weights given by hand.

    >>> mixing_weights({"web": 80, "books": 20}, temperature=2.0)
    {'web': 0.6666666666666666, 'books': 0.3333333333333333}

    Raises:
        ConfigError: A size is not a positive number, or the temperature is not above 0.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; it must be above 0. 1 keeps the sizes, inf makes all equal.")
    wrong = next((name for name, size in sizes.items() if not (size > 0 and math.isfinite(size))), None)
    if wrong is not None or not sizes:
        seen = f"{wrong} has the weight {sizes[wrong]}" if wrong is not None else "no source is given"
        raise ConfigError(
            f"{seen}; every source of a mixture needs a finite weight above 0. Leave out what is not used."
        )
    largest = max(sizes.values())  # before the power, so that nothing overflows
    scaled = {name: (size / largest) ** (1 / temperature) for name, size in sizes.items()}
    total = math.fsum(scaled.values())
    return {name: value / total for name, value in scaled.items()}


class Mixture:
    """The sequence of samples of several sources.

    Args:
        orders: Of each source by name; their places are the numbers of the sources in the feed.
        weights: Share of each by the same names, as `mixing_weights` returns them.
    """

    def __init__(self, orders: Mapping[str, Order], weights: Mapping[str, float]):
        if list(orders) != list(weights):
            raise ConfigError(
                f"The weights are for {', '.join(weights)}; the sources are {', '.join(orders)}. Name the same."
            )
        self._names = list(orders)
        self._shares = np.array([weights[name] for name in self._names]) / math.fsum(weights.values())
        self._streams = [Epochs(order, number) for number, order in enumerate(orders.values())]

    def start(self) -> State:
        """Return the state before the first sample: each source's epoch and row, and how often it came."""
        parts = ("epoch", "row", "taken")
        return {f"{name}.{part}": 0 for name in self._names for part in parts}

    def advance(self, state: State, num: int) -> tuple[Picks, State]:
        """Return the next samples."""
        taken = np.array([state[f"{name}.taken"] for name in self._names], dtype=np.int64)
        sources = self._choose(taken, num)
        picks = np.empty((num, 2), np.int64)
        after: State = {}
        for number, name in enumerate(self._names):
            at = np.flatnonzero(sources == number)
            place = {"epoch": state[f"{name}.epoch"], "row": state[f"{name}.row"]}
            picks[at], place = self._streams[number].advance(place, len(at))
            after |= {f"{name}.{part}": value for part, value in place.items()}
            after[f"{name}.taken"] = int(taken[number]) + len(at)
        return picks, after

    def _choose(self, taken: np.ndarray, num: int) -> np.ndarray:
        counts, first = taken.astype(np.float64), int(taken.sum())
        chosen = np.empty(num, np.int64)
        for step in range(num):
            # Rounded, so that the same lag is a tie on every machine; the first source named wins it.
            lag = np.round(self._shares * (first + step + 1) - counts, 9)
            chosen[step] = int(np.argmax(lag))
            counts[chosen[step]] += 1
        return chosen


def count_epochs(sizes: Sequence[int], shares: Sequence[float], num_samples: int) -> list[float]:
    """Return how often each source is read in a run of so many samples, to see which one is repeated too much.

    >>> count_epochs([100, 900], [0.5, 0.5], 1000)
    [5.0, 0.5555555555555556]
    """
    return [num_samples * share / size for size, share in zip(sizes, shares, strict=True)]
