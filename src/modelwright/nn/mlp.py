"""The feed-forward half of a block: gated (SwiGLU, GeGLU) for the Llama family, two layers for GPT-2 and BERT.

Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 6; Hendrycks and Gimpel 2016 (GELU, and its tanh
approximation); So et al. 2021, "Primer" (squared ReLU). B, T, D as everywhere; F: width of the hidden layer.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.base.errors import ConfigError


def gelu_tanh(x: Tensor) -> Tensor:
    """Return the tanh approximation of the GELU."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """Return ``x * sigmoid(1.702 x)``, the GELU of the first CLIP."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    """Return the square of the ReLU."""
    return F.relu(x).square()


# Published names; the first GELU is exact (erf), the others are approximations.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu2,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the activation with this published name.

    Raises:
        ConfigError: The name is not known.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation is {name!r}; known: {', '.join(sorted(ACTIVATIONS))}. Use one of these.")
    return ACTIVATIONS[name]


class GatedMlp(nn.Module):
    """``down(act(gate(x)) * up(x))``: SwiGLU with silu, GeGLU with a gelu."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, act: str = "silu", bias: bool = False):
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.down(self.act(self.gate(x)) * self.up(x))  # (B, T, F) inside


class Mlp(nn.Module):
    """``down(act(up(x)))``."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, act: str = "gelu", bias: bool = True):
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.down(self.act(self.up(x)))  # (B, T, F) inside
