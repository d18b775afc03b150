"""DoRA: a low-rank change turns the rows of a weight, and their lengths are trained apart.

    W' = m * (W + s B A) / |W + s B A|,   one length m for each output row, at first |W|

The norm is a constant for the gradient (section 4.3): that halves the memory and costs next to nothing.
Source: Liu et al. 2024, arXiv:2402.09353, equations 5 and 11. Not done: embeddings.
"""

import torch
from torch import Tensor, nn

from modelwright.nn.linear import dense_weight
from modelwright.nn.lora import LoraLinear


class DoraLinear(LoraLinear):
    """A `LoraLinear` whose rows have trained lengths."""

    def __init__(
        self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, *, use_rslora: bool = False
    ) -> None:
        super().__init__(base, rank, alpha, dropout, use_rslora=use_rslora)
        self.magnitude = nn.Parameter(dense_weight(base).detach().float().norm(dim=1))  # (out,)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        with torch.no_grad():
            norm = super().total().norm(dim=1)
        factor = (self.magnitude / norm).to(x.dtype)
        bias = getattr(self.base, "bias", None)
        y = self.base(x)
        if bias is not None:  # the bias is not turned
            y = y - bias.to(y.dtype)
        y = factor.to(y.dtype) * (y + self.change(x))
        return y if bias is None else y + bias.to(y.dtype)

    def total(self) -> Tensor:
        """Return W', (out, in) in float32."""
        turned = super().total()
        return self.magnitude.float()[:, None] * turned / turned.norm(dim=1, keepdim=True)
