"""Lion: the sign of an interpolation of momentum and gradient; one state a weight, half of AdamW's.

    u = sign(b1 m + (1 - b1) g),   w <- w - lr (u + decay w),   m <- b2 m + (1 - b2) g

Every weight moves by the same amount, so rates are a third to a tenth of AdamW's, and decays as much larger.

Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from modelwright.optim.bounds import check_betas, check_rates


@dataclass(frozen=True)
class LionConfig:
    """Settings of Lion."""

    learning_rate: float = 3e-4  # peak, before the schedule
    betas: tuple[float, float] = (0.95, 0.98)  # of the update, of the momentum: the paper's for language models
    weight_decay: float = 0.5  # decoupled, times the learning rate

    def __post_init__(self) -> None:
        check_rates("lion", self.learning_rate, self.weight_decay)
        check_betas("lion", self.betas)


class Lion(torch.optim.Optimizer):
    """Lion over lists of parameters, all of a group at once."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.95, 0.98),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        assert closure is None, "Lion takes no closure"
        for group in self.param_groups:
            first, second = group["betas"]
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            for p in weights:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p, dtype=torch.float32)
            momenta = [self.state[p]["momentum"] for p in weights]
            gradients = [p.grad.float() for p in weights]
            updates = list(torch._foreach_lerp(momenta, gradients, 1 - first))
            torch._foreach_sign_(updates)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(
                weights, [u.to(w.dtype) for u, w in zip(updates, weights, strict=True)], alpha=-group["lr"]
            )
            torch._foreach_lerp_(momenta, gradients, 1 - second)
