"""IA3: keys, values and the inner activations of the feed-forward are multiplied by learned vectors.

    y = l * (x W^T) for keys and values,   y = (l * x) W^T for the second matrix of the feed-forward;   l at first one

A few thousand numbers a model; they go into the weights without a rest.
Source: Liu et al. 2022, arXiv:2205.05638, section 3.3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelwright.nn.adapters import AdapterLayer
from modelwright.nn.linear import dense_weight, replace_module, select_linears
from modelwright.nn.lora import with_weight


@dataclass(frozen=True)
class IA3Config:
    """Which layers are scaled, and on which side."""

    targets: tuple[str, ...] = ("k", "v")  # their outputs are scaled
    input_targets: tuple[str, ...] = ("down",)  # their inputs are

    def attach(self, model: nn.Module) -> list[str]:
        """Put the vectors in place."""
        outputs = select_linears(model, self.targets) if self.targets else {}
        inputs = select_linears(model, self.input_targets) if self.input_targets else {}
        for name, layer in {**outputs, **inputs}.items():
            replace_module(model, name, IA3Linear(layer, scales_input=name in inputs))
        return [name for name, module in model.named_modules() if isinstance(module, IA3Linear)]


class IA3Linear(AdapterLayer):
    """A frozen linear layer with a learned factor for each output, or for each input."""

    def __init__(self, base: nn.Module, *, scales_input: bool) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features: int = base.in_features  # type: ignore[assignment]
        self.out_features: int = base.out_features  # type: ignore[assignment]
        self.scales_input = scales_input
        device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
        self.factor = nn.Parameter(torch.ones(self.in_features if scales_input else self.out_features, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self.scales_input:
            return self.base(x * self.factor.to(x.dtype))
        y = self.base(x)
        return y * self.factor.to(y.dtype)  # a bias is scaled too, as in PEFT

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return the base with the factors in its weight."""
        factor = self.factor.float() if self.scales_input else self.factor.float()[:, None]
        bias = getattr(self.base, "bias", None)
        if bias is not None and not self.scales_input:
            bias.mul_(self.factor.to(bias.dtype))
        return with_weight(self.base, dense_weight(self.base).float() * factor)
