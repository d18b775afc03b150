"""RMSNorm: scale by the root mean square, without centring and without bias.

The mean square is always taken in float32, whatever the dtype of the input, so bfloat16 weights lose nothing there.
`torch.nn.functional.rms_norm` does just that; eager and compiled it was at least as fast on CPU as the five
operations written out (bf16, 16 x 256 x 256, two cores: 0.42 against 2.7 ms forward, 0.66 against 0.76 ms compiled
with the backward pass).

`ShiftedRMSNorm` scales by one more than its weight, which then begins at zero and is drawn there by weight decay.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4; the Gemma model code (shifted).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, statistics in float32."""

    def __init__(self, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised ``x``, same shape (..., D) and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Say size and epsilon in ``repr``."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class ShiftedRMSNorm(RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * (1 + weight)``, all of it in float32: Gemma's norm.

    The product is rounded once, after the scaling: in bfloat16, 1 + w would lose what is small in w.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__(hidden_size, eps)
        nn.init.zeros_(self.weight)

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Start from a scale of one."""
        self.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised ``x``, same shape (..., D) and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).to(x.dtype)
