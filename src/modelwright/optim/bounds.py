"""What every update rule's settings must keep to: rates above zero, decays of a mean from 0 to below 1."""

import math

from modelwright.base.errors import ConfigError


def check_rates(name: str, learning_rate: float, weight_decay: float) -> None:
    """Refuse a learning rate that is not above zero, and a weight decay below zero.

    Raises:
        ConfigError: One of them is, or is not finite.
    """
    if not (0 < learning_rate < math.inf and 0 <= weight_decay < math.inf):
        raise ConfigError(
            f"optimizer.{name} has the learning rate {learning_rate} and the weight decay {weight_decay}; the rate "
            "must be above 0, for instance 0.001, the decay 0 or more."
        )


def check_betas(name: str, betas: tuple[float, ...]) -> None:
    """Refuse rates of decay outside of [0, 1).

    Raises:
        ConfigError: One of them is, or there are not two.
    """
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise ConfigError(f"optimizer.{name}.betas is {betas}; it must be two numbers from 0 to below 1.")
