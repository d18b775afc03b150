"""Low-rank adapters: train a rank-R change to a frozen linear layer, then merge it or keep it beside the weights.

    y = x W^T + s dropout(x) A^T B^T,   A (R, in) random, B (out, R) zero,   s = alpha / R

so that an untrained adapter changes nothing. With rank-stabilised scaling s = alpha / sqrt(R). The base may be any
linear layer, a low-bit one too; merging into a low-bit layer makes it dense, because rounding the sum again would
lose the small change.
Source: Hu et al. 2021, sections 4.1 and 4.2; Kalajdzievski 2023 (scaling by the square root). Not done: DoRA.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.base.errors import ConfigError
from modelwright.nn.linear import dense_weight, replace_module, select_linears


@dataclass(frozen=True)
class LoraConfig:
    """Which layers get an adapter, and of what size. The fields are the arguments of `add_lora`."""

    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")  # ends of layer names, or ("all-linear",)
    rank: int = 8
    alpha: float = 16.0  # the change is scaled by alpha / rank
    dropout: float = 0.0  # on the adapter's input
    use_rslora: bool = False  # scale by alpha / sqrt(rank) instead, for large ranks


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank change beside it.

    Args:
        base: Any module with ``in_features`` and ``out_features`` that maps (..., in) to (..., out).
        alpha: Scale before division by the rank (by its square root with ``use_rslora``).
    """

    def __init__(
        self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, *, use_rslora: bool = False
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ConfigError(f"rank is {rank}; a low-rank adapter needs at least 1.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout is {dropout}; it must be at least 0 and below 1.")
        self.base = base.requires_grad_(False)
        self.in_features: int = base.in_features  # type: ignore[assignment]
        self.out_features: int = base.out_features  # type: ignore[assignment]
        self.rank, self.alpha, self.use_rslora = rank, alpha, use_rslora
        self.scaling = alpha / math.sqrt(rank) if use_rslora else alpha / rank
        self.dropout = nn.Dropout(dropout)
        # Adapters stay in float32 beside bfloat16 weights: they are small, and small updates must not be rounded away.
        device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, device=device, dtype=torch.float32))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.train(base.training)  # a model in evaluation mode stays in it: no dropout by surprise

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        low = F.linear(self.dropout(x), self.lora_a.to(x.dtype))  # (..., R)
        return self.base(x) + self.scaling * F.linear(low, self.lora_b.to(low.dtype))

    def delta(self) -> Tensor:
        """Return the change to the weight, (out, in) in float32."""
        return self.scaling * (self.lora_b.float() @ self.lora_a.float())

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return the base with the change added in float32; a low-bit base comes back as a dense layer."""
        weight = dense_weight(self.base)
        total = (weight.float() + self.delta()).to(weight.dtype)
        if isinstance(self.base, nn.Linear):
            self.base.weight.copy_(total)
            return self.base
        bias = getattr(self.base, "bias", None)
        dense = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        dense.weight = nn.Parameter(total)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().clone())
        return dense


def add_lora(
    model: nn.Module,
    targets: Sequence[str] = LoraConfig.targets,
    rank: int = LoraConfig.rank,
    alpha: float = LoraConfig.alpha,
    dropout: float = 0.0,
    use_rslora: bool = False,
) -> list[str]:
    """Freeze the whole model, wrap the target layers, and return their names.

    Args:
        targets: Layer names or their ends (``q``, ``attention.q``), or ``("all-linear",)``.

    Raises:
        ConfigError: A target matches nothing (the message lists what exists) or a tied layer; the model already has
            adapters.
    """
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise ConfigError("The model already has adapters. Merge them with merge_lora before adding others.")
    chosen = select_linears(model, targets)
    model.requires_grad_(False)
    for name, layer in chosen.items():
        replace_module(model, name, LoraLinear(layer, rank, alpha, dropout, use_rslora=use_rslora))
    return list(chosen)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that the adapters train."""
    return [p for layer in lora_layers(model).values() for p in (layer.lora_a, layer.lora_b)]


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter tensors by name, ``LAYER.lora_a`` and ``LAYER.lora_b``."""
    state = {}
    for name, layer in lora_layers(model).items():
        state[f"{name}.lora_a"] = layer.lora_a.detach()
        state[f"{name}.lora_b"] = layer.lora_b.detach()
    return state


def merge_lora(model: nn.Module) -> list[str]:
    """Add every adapter to its layer, take the wrappers away, make the model trainable again; return the names."""
    layers = lora_layers(model)
    for name, layer in layers.items():
        replace_module(model, name, layer.merged())
    model.requires_grad_(True)
    return list(layers)
