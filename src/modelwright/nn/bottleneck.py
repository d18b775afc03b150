"""Bottleneck adapters: a small feed-forward after each sublayer, around which the stream goes straight on.

    y = h + U act(D h),   h the sublayer's output, D (R, d), U (d, R) zero at first

Placed on the layer that writes into the stream (``o`` and ``down``), before the sum. What it computes is no change of a
weight, so it cannot be merged and costs a little at every step.
Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1; Pfeiffer et al. 2020,
arXiv:2005.00052 (after ``down`` alone).
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.nn.adapters import AdapterLayer, check_rank
from modelwright.nn.linear import replace_module, select_linears


@dataclass(frozen=True)
class BottleneckConfig:
    """Where the adapters stand, and how wide they are inside."""

    targets: tuple[str, ...] = ("o", "down")  # Houlsby; ("down",) is Pfeiffer's
    width: int = 16

    def attach(self, model: nn.Module) -> list[str]:
        """Put the adapters in place."""
        chosen = select_linears(model, self.targets)
        for name, layer in chosen.items():
            replace_module(model, name, BottleneckLinear(layer, self.width))
        return list(chosen)


class BottleneckLinear(AdapterLayer):
    """A frozen linear layer followed by an adapter."""

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features: int = base.in_features  # type: ignore[assignment]
        self.out_features: int = base.out_features  # type: ignore[assignment]
        check_rank(width, self.out_features, self.out_features)
        device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
        self.down = nn.Linear(self.out_features, width, device=device)
        self.up = nn.Linear(width, self.out_features, device=device)
        nn.init.normal_(self.down.weight, std=0.01)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        h = self.base(x)
        inner = F.silu(F.linear(h, self.down.weight.to(h.dtype), self.down.bias.to(h.dtype)))  # (..., R)
        return h + F.linear(inner, self.up.weight.to(h.dtype), self.up.bias.to(h.dtype))
