"""Learning-rate schedules: plain functions from a step to a factor on the peak rate.

Each maps the progress of the run (0 to 1, after the warm-up) to a number from 0 to 1.
Source: cosine, Loshchilov & Hutter 2017 (arXiv:1608.03983); warm-up-stable-decay, Hu et al. 2024 (arXiv:2404.06395).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from modelwright.base.errors import ConfigError
from modelwright.base.registry import lookup
from modelwright.optim import SCHEDULES


@dataclass(frozen=True)
class ScheduleConfig:
    """The course of the learning rate."""

    name: str = "wsd"  # constant, linear, cosine or wsd
    warmup_steps: int = 10  # steps of linear rise from zero
    decay_fraction: float = 0.6  # wsd: last part of the run, in which the rate falls linearly to zero

    def __post_init__(self) -> None:
        lookup(SCHEDULES, self.name, "schedule.name")
        if self.warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps is {self.warmup_steps}; it must be 0 or more.")
        if not 0 <= self.decay_fraction <= 1:
            raise ConfigError(f"schedule.decay_fraction is {self.decay_fraction}; it must lie between 0 and 1.")


def constant(progress: float, decay_fraction: float) -> float:
    """Stay at the peak."""
    return 1.0


def linear(progress: float, decay_fraction: float) -> float:
    """Fall in a straight line from the peak to zero."""
    return 1.0 - progress


def cosine(progress: float, decay_fraction: float) -> float:
    """Fall along half a cosine from the peak to zero."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def wsd(progress: float, decay_fraction: float) -> float:
    """Stay at the peak, then fall in a straight line to zero over the last ``decay_fraction``.

    >>> wsd(0.25, 0.5), wsd(0.75, 0.5), wsd(1.0, 0.5)
    (1.0, 0.5, 0.0)
    """
    if decay_fraction == 0:
        return 1.0
    return min(1.0, (1.0 - progress) / decay_fraction)


def make_schedule(config: ScheduleConfig, num_steps: int) -> Callable[[int], float]:
    """Return the factor as a function of the step, warm-up included."""
    shape = lookup(SCHEDULES, config.name, "schedule.name")
    warmup = min(config.warmup_steps, max(num_steps - 1, 0))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return shape((step - warmup) / max(num_steps - warmup, 1), config.decay_fraction)

    return factor
