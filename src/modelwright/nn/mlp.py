"""The feed-forward half of a block: SwiGLU for the Llama family, two layers around a GELU for the BERT family.

Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 6; Hendrycks and Gimpel 2016 (GELU).
B, T, D as everywhere; F: width of the hidden layer.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False):
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))  # (B, T, F) inside


class GeluMlp(nn.Module):
    """``down(gelu(up(x)))`` with biases and the exact (erf) GELU."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.down(F.gelu(self.up(x)))  # (B, T, F) inside
