"""A moving average of the weights, which is often better than the last ones.

    average <- d average + (1 - d) weights,   d = min(decay, (1 + t) / (10 + t))

so that the first steps, when the weights still move far, do not stay in the average.

Source: Polyak & Juditsky 1992; the growing decay is that of the exponential moving average of TensorFlow.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.optim.parts import local_part


@dataclass(frozen=True)
class EmaConfig:
    """How slowly the average follows; the trained model ends as the average."""

    decay: float = 0.999  # about 1 / (1 - decay) updates are averaged

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ConfigError(f"loop.ema.decay is {self.decay}; it must lie between 0 and 1, for instance 0.999.")


class Ema:
    """The average of a model's trainable parameters, in float32 beside them."""

    def __init__(self, model: nn.Module, config: EmaConfig):
        self.decay = config.decay
        self.num_updates = 0
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.averages = {n: p.detach().float().clone() for n, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of now into the average."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        current = [local_part(p.detach()).float() for p in self._parameters.values()]
        torch._foreach_lerp_([local_part(a) for a in self.averages.values()], current, 1 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Make the model the average."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.averages[name])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model be the average inside the ``with``, for instance to evaluate it."""
        kept = {n: p.detach().clone() for n, p in self._parameters.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(kept[name])

    @torch.no_grad()
    def load(self, averages: dict[str, Tensor], num_updates: int) -> None:
        """Go to the averages of a checkpoint."""
        for name, value in averages.items():
            self.averages[name].copy_(value)
        self.num_updates = num_updates
