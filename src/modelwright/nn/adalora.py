"""AdaLoRA: an adapter as a small singular value decomposition, whose rank goes where it is worth most.

    W' = W + (alpha / R) B diag(E) A,   A A^T ~ I,  B^T B ~ I   (a penalty keeps them so)

All layers begin with rank R. While training, the triplets (a row of A, a number of E, a column of B) of all layers are
ranked by how much the loss depends on them, smoothed over steps, times how unsure that is; the budget falls from R to
``target_rank`` a layer on a cubic curve, and the numbers E of the triplets beyond it are set to zero.

    I = |w dL/dw|,  Ibar <- b1 Ibar + (1 - b1) I,  U <- b2 U + (1 - b2) |I - Ibar|,   S = Ibar U
    S(triplet) = S(E_i) + mean_j S(A_ij) + mean_j S(B_ji)

Source: Zhang et al. 2023, arXiv:2303.10512, sections 3.1 to 3.3. The schedule of steps is run by
`modelwright.train.adalora`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.base.errors import ConfigError
from modelwright.nn.adapters import AdapterLayer, check_rank
from modelwright.nn.linear import dense_weight, replace_module, select_linears
from modelwright.nn.lora import LoraConfig, with_weight


@dataclass(frozen=True)
class AdaLoraConfig:
    """Which layers, and how the budget of ranks falls."""

    targets: tuple[str, ...] = LoraConfig.targets
    rank: int = 12  # of every layer at first
    target_rank: int = 8  # a layer on average at the end
    alpha: float = 16.0
    dropout: float = 0.0
    warmup_fraction: float = 0.1  # of the steps, before the budget falls
    final_fraction: float = 0.3  # of the steps, after it has fallen
    every: int = 5  # steps between two allocations
    betas: tuple[float, float] = (0.85, 0.85)  # smoothing of importance and of its uncertainty
    orthogonality: float = 0.1  # weight of the penalty, added to the mean loss; PEFT's default is 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.target_rank <= self.rank:
            raise ConfigError(
                f"adalora.target_rank is {self.target_rank} and rank {self.rank}; the budget falls, so it must be from "
                f"1 to {self.rank}."
            )
        if self.warmup_fraction + self.final_fraction >= 1:
            raise ConfigError("adalora.warmup_fraction and final_fraction leave no step for the budget to fall.")
        if self.every < 1 or not all(0 < beta < 1 for beta in self.betas):
            raise ConfigError(
                f"adalora.every is {self.every} and betas {self.betas}; expected >= 1, and between 0 and 1."
            )

    def attach(self, model: nn.Module) -> list[str]:
        """Put the adapters in place."""
        chosen = select_linears(model, self.targets)
        for name, layer in chosen.items():
            check_rank(self.rank, layer.in_features, layer.out_features, name)  # type: ignore[arg-type]
            replace_module(model, name, AdaLoraLinear(layer, self.rank, self.alpha, self.dropout))
        model.adalora = self  # type: ignore[assignment]
        return list(chosen)

    def budget(self, step: int, num_steps: int) -> float:
        """Return the mean rank of a layer after ``step`` of ``num_steps`` steps.

        >>> c = AdaLoraConfig(rank=12, target_rank=4, warmup_fraction=0.1, final_fraction=0.3)
        >>> c.budget(0, 100), c.budget(40, 100), c.budget(70, 100)
        (12.0, 5.0, 4.0)
        """
        first, last = self.warmup_fraction * num_steps, (1 - self.final_fraction) * num_steps
        left = 1 - min(1.0, max(0.0, (step - first) / max(last - first, 1e-9)))
        return self.target_rank + (self.rank - self.target_rank) * left**3


class AdaLoraLinear(AdapterLayer):
    """A frozen linear layer with a change B diag(E) A beside it.

    Args:
        divisor: What alpha is divided by; None: the rank.
    """

    def __init__(
        self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, divisor: float | None = None
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features: int = base.in_features  # type: ignore[assignment]
        self.out_features: int = base.out_features  # type: ignore[assignment]
        self.rank, self.alpha, self.divisor = rank, alpha, divisor or rank
        self.scaling = alpha / (self.divisor + 1e-5)  # as in PEFT
        self.dropout = nn.Dropout(dropout)
        device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, device=device).normal_(std=0.02))
        self.lora_e = nn.Parameter(torch.zeros(rank, 1, device=device))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, rank, device=device).normal_(std=0.02))
        self.register_buffer("kept", torch.ones(rank, 1, dtype=torch.bool, device=device))
        for name in ("lora_a", "lora_e", "lora_b"):
            for kind in ("importance", "uncertainty"):
                self.register_buffer(f"{kind}_{name}", torch.zeros_like(getattr(self, name)))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        low = F.linear(self.dropout(x), (self.lora_a * (self.lora_e * self.scaling)).to(x.dtype))  # (..., R)
        return self.base(x) + F.linear(low, self.lora_b.to(low.dtype))

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return the base with the change added in float32."""
        change = self.scaling * (self.lora_b.float() @ (self.lora_a.float() * self.lora_e.float()))
        return with_weight(self.base, dense_weight(self.base).float() + change)

    def penalty(self) -> Tensor:
        """Return how far A and B are from orthogonal: the mean of the two Frobenius norms."""
        eye = torch.eye(self.rank, device=self.lora_a.device)
        return ((self.lora_a @ self.lora_a.T - eye).norm() + (self.lora_b.T @ self.lora_b - eye).norm()) / 2

    @torch.no_grad()
    def note_importance(self, betas: tuple[float, float]) -> None:
        """Smooth the sensitivity of every weight, from its gradient of this step."""
        for name in ("lora_a", "lora_e", "lora_b"):
            weight = getattr(self, name)
            if weight.grad is None:
                continue
            now = (weight * weight.grad).abs()
            importance, uncertainty = getattr(self, f"importance_{name}"), getattr(self, f"uncertainty_{name}")
            importance.lerp_(now, 1 - betas[0])
            uncertainty.lerp_((now - importance).abs(), 1 - betas[1])

    def scores(self) -> Tensor:
        """Return the score of each triplet, (R,)."""
        s_a, s_e, s_b = (
            getattr(self, f"importance_{n}") * getattr(self, f"uncertainty_{n}") for n in ("lora_a", "lora_e", "lora_b")
        )
        return s_e.view(-1) + s_a.mean(1) + s_b.mean(0)

    @torch.no_grad()
    def keep(self, kept: Tensor) -> None:
        """Set the numbers E of the triplets that are not kept (R,) to zero."""
        self.kept.copy_(kept[:, None])  # type: ignore[operator]
        self.silence()

    @torch.no_grad()
    def silence(self) -> None:
        """Set them to zero again after an update."""
        self.lora_e.mul_(self.kept)  # type: ignore[arg-type]


@torch.no_grad()
def allocate(layers: list[AdaLoraLinear], mean_rank: float) -> list[int]:
    """Keep the triplets of the highest scores over all layers, ``mean_rank`` a layer; return each layer's rank."""
    scores = torch.cat([layer.scores() for layer in layers])
    num_kept = max(1, int(mean_rank * len(layers)))
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.argsort(descending=True, stable=True)[:num_kept]] = True
    for layer, kept in zip(layers, chosen.split([layer.rank for layer in layers]), strict=True):
        layer.keep(kept)
    return [int(layer.kept.sum()) for layer in layers]  # type: ignore[operator]
