"""Adafactor: the second moment of a matrix kept as the mean of its rows and of its columns.

    R <- b_t R + (1 - b_t) mean over columns of (G^2 + e1),   C likewise over rows,   V ~ R C' / mean(R)
    U = G / sqrt(V),   U <- U / max(1, rms(U) / d),   W <- W - lr U - lr decay W,   b_t = 1 - t^c

State of a rows x columns matrix: rows + columns numbers instead of twice rows x columns. Vectors keep the whole V.

Source: Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5. The rate is given, as in `torch.optim.Adafactor`
(scaled by the root mean square of the weights). Not done: the first moment, the schedule that Adafactor brings.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelwright.base.errors import ConfigError
from modelwright.optim.bounds import check_rates


@dataclass(frozen=True)
class AdafactorConfig:
    """Settings of Adafactor."""

    learning_rate: float = 0.02  # peak, before the schedule, times the root mean square of the weights
    decay_power: float = -0.8  # c
    weight_decay: float = 0.0  # decoupled, times the learning rate
    max_update: float = 1.0  # d: root mean square of an update at most

    def __post_init__(self) -> None:
        check_rates("adafactor", self.learning_rate, self.weight_decay)
        if self.decay_power > 0 or not self.max_update > 0:
            raise ConfigError(
                f"optimizer.adafactor has decay_power {self.decay_power} and max_update {self.max_update}; the power "
                "must be 0 or less, the largest update above 0."
            )


class Adafactor(torch.optim.Optimizer):
    """Adafactor over lists of parameters."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        *,
        decay_power: float = -0.8,
        weight_decay: float = 0.0,
        max_update: float = 1.0,
        smallest: tuple[float, float] = (torch.finfo(torch.float32).eps, 1e-3),
    ):
        """Make the optimizer; ``smallest`` are e1 and the least root mean square that a weight's rate is scaled by."""
        defaults = {"decay_power": decay_power, "weight_decay": weight_decay, "max_update": max_update}
        super().__init__(params, {"lr": lr, "smallest": smallest, **defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        assert closure is None, "Adafactor takes no closure"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad.float(), group)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        is_factored = gradient.ndim >= 2
        if not state:
            state["step"] = 0
            if is_factored:
                state["rows"] = gradient.new_zeros((*gradient.shape[:-1], 1))
                state["columns"] = gradient.new_zeros((*gradient.shape[:-2], 1, gradient.shape[-1]))
            else:
                state["square"] = torch.zeros_like(gradient)
        state["step"] += 1
        tiny, least = group["smallest"]
        fresh = state["step"] ** group["decay_power"]  # 1 - b_t
        rate = max(least, float(weight.float().square().mean().sqrt())) * min(group["lr"], state["step"] ** -0.5)
        if group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        square = gradient.square()
        if is_factored:
            state["rows"].lerp_(square.mean(-1, keepdim=True), fresh)
            state["columns"].lerp_(square.mean(-2, keepdim=True), fresh)
            mean = state["rows"].mean(-2, keepdim=True).clamp_(min=tiny)
            estimate = state["rows"] @ state["columns"] / mean
        else:
            state["square"].lerp_(square, fresh)
            estimate = state["square"].clone()
        update = gradient * estimate.clamp_(min=tiny * tiny).rsqrt_()
        size = float(update.square().mean().sqrt())
        weight.add_(update.to(weight.dtype), alpha=-rate / max(1.0, size / group["max_update"]))
