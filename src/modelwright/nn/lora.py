"""Low-rank adapters: train a rank-R change to a frozen linear layer, then merge it or keep it beside the weights.

    y = x W^T + s dropout(x) A^T B^T,   A (R, in) random, B (out, R) zero,   s = alpha / R

so that an untrained adapter changes nothing. With rank-stabilised scaling s = alpha / sqrt(R). LoRA+ gives B a larger
learning rate than A: B begins at zero and must travel further. The base may be any linear layer, a low-bit one too;
merging into a low-bit layer makes it dense, because rounding the sum again would lose the small change.

Kin in their own files: `modelwright.nn.dora`, `modelwright.nn.lora_init` (PiSSA, QPiSSA, LoftQ),
`modelwright.nn.lora_embedding`, `modelwright.nn.adalora`.
Source: Hu et al. 2021, arXiv:2106.09685, sections 4.1 and 4.2; Kalajdzievski 2023, arXiv:2312.03732 (scaling by the
square root); Hayou et al. 2024, arXiv:2402.12354 (LoRA+).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.base.errors import ConfigError
from modelwright.base.registry import lookup
from modelwright.nn.adapters import AdapterLayer, adapter_layers, attach_adapter, check_rank, merge_adapters
from modelwright.nn.linear import dense_weight, replace_module, select_layers


@dataclass(frozen=True)
class LoraConfig:
    """Which layers get an adapter, and of what size."""

    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")  # ends of layer names, or ("all-linear",)
    rank: int = 8
    alpha: float = 16.0  # the change is scaled by alpha / rank
    dropout: float = 0.0  # on the adapter's input
    use_rslora: bool = False  # scale by alpha / sqrt(rank) instead, for large ranks
    use_dora: bool = False  # train the length of each row of the weight apart from its direction
    init: str = "kaiming"  # of A and B: kaiming, pissa, qpissa or loftq (`modelwright.nn.lora_init`)
    rate_ratio: float = 1.0  # LoRA+: the learning rate of B over that of A; the paper advises 16

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}; a low-rank adapter needs at least 1.")
        if not self.rate_ratio > 0:
            raise ConfigError(f"lora.rate_ratio is {self.rate_ratio}; it must be above 0 (1: one rate for both).")
        if self.init not in LORA_INITS:
            raise ConfigError(f"lora.init is {self.init!r}; known: {', '.join(LORA_INITS)}.")
        if self.use_dora and self.init != "kaiming":
            raise ConfigError(
                f"lora.init is {self.init!r} with use_dora; DoRA begins with kaiming. Choose one of both."
            )

    def attach(self, model: nn.Module) -> list[str]:
        """Put the adapters in place."""
        return _attach(model, self)


# Where the first values come from; the function takes the adapted layer and changes it in place.
LORA_INITS = {
    "kaiming": "modelwright.nn.lora:init_kaiming",
    "pissa": "modelwright.nn.lora_init:init_pissa",
    "qpissa": "modelwright.nn.lora_init:init_qpissa",
    "loftq": "modelwright.nn.lora_init:init_loftq",
}

# What stands in the place of a layer.
LORA_LAYERS = {
    "linear": "modelwright.nn.lora:LoraLinear",
    "dora": "modelwright.nn.dora:DoraLinear",
    "embedding": "modelwright.nn.lora_embedding:LoraEmbedding",
}


class LoraLinear(AdapterLayer):
    """A frozen linear layer with a trainable low-rank change beside it.

    Args:
        base: Any module with ``in_features`` and ``out_features`` that maps (..., in) to (..., out).
        alpha: Scale before division by the rank (by its square root with ``use_rslora``).
    """

    def __init__(
        self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, *, use_rslora: bool = False
    ) -> None:
        super().__init__()
        self.in_features: int = base.in_features  # type: ignore[assignment]
        self.out_features: int = base.out_features  # type: ignore[assignment]
        if rank < 1:
            raise ConfigError(f"rank is {rank}; a low-rank adapter needs at least 1.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout is {dropout}; it must be at least 0 and below 1.")
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.use_rslora = rank, alpha, use_rslora
        self.scaling = alpha / math.sqrt(rank) if use_rslora else alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.init_name = "kaiming"  # what `modelwright.nn.lora_init` made of it
        # Adapters stay in float32 beside bfloat16 weights: they are small, and small updates must not be rounded away.
        device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, device=device, dtype=torch.float32))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.train(base.training)  # a model in evaluation mode stays in it: no dropout by surprise

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return self.base(x) + self.change(x)

    def change(self, x: Tensor) -> Tensor:
        """Return what the adapter adds, (..., out)."""
        low = F.linear(self.dropout(x), self.lora_a.to(x.dtype))  # (..., R)
        # The scale goes onto the small side: one pass over (..., R) instead of (..., out).
        return F.linear(low * self.scaling, self.lora_b.to(low.dtype))

    def delta(self) -> Tensor:
        """Return the change to the weight, (out, in) in float32."""
        return self.scaling * (self.lora_b.float() @ self.lora_a.float())

    def total(self) -> Tensor:
        """Return the weight with the change in it, (out, in) in float32."""
        return dense_weight(self.base).float() + self.delta()

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return the base with the change added in float32; a low-bit base comes back as a dense layer."""
        return with_weight(self.base, self.total())

    def undo(self) -> None:
        """Give the base the weight back that it had before an initialisation took a part out of it.

        Over 4 bits the whole weight is rounded then, as it would have been without the adapter, but from its rounded
        rest: the dense weight is gone.
        """
        taken = getattr(self, "taken", None)
        with torch.no_grad():
            if taken is not None and isinstance(self.base, nn.Linear):
                self.base.weight.copy_(taken)
            elif self.init_name == "qpissa":
                first = self.scaling * (self.first_b @ self.first_a)  # type: ignore[operator]
                self.base.fill(dense_weight(self.base).float() + first)  # type: ignore[operator]


@torch.no_grad()
def with_weight(base: nn.Module, total: Tensor) -> nn.Module:
    """Return a linear layer with another weight (out, in): the layer itself if it is dense, else a dense one."""
    if isinstance(base, nn.Linear):
        base.weight.copy_(total.to(base.weight.dtype))
        return base
    out_features, in_features = total.shape
    bias = getattr(base, "bias", None)
    dense = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    dense.weight = nn.Parameter(total.to(dense_weight(base).dtype))
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
    **options: Any,
) -> list[str]:
    """Freeze the whole model, wrap the target layers, and return their names.

    Args:
        targets: Layer names or their ends (``q``, ``attention.q``), or ``("all-linear",)``. An embedding may be named.
        options: The other fields of `LoraConfig`.

    Raises:
        ConfigError: A target matches nothing (the message lists what exists) or a tied layer; the model already has
            adapters.
    """
    return attach_adapter(model, LoraConfig(tuple(targets), rank, alpha, dropout, use_rslora, **options))


def _attach(model: nn.Module, config: LoraConfig) -> list[str]:
    chosen = select_layers(model, config.targets)
    for name, layer in chosen.items():
        made = _make(name, layer, config)
        made.lora_b.rate_factor = config.rate_ratio  # type: ignore[union-attr]
        replace_module(model, name, made)
    return list(chosen)


def _make(name: str, layer: nn.Module, config: LoraConfig) -> AdapterLayer:
    if isinstance(layer, nn.Embedding):
        if config.use_dora or config.init != "kaiming":
            raise ConfigError(f"{name} is an embedding: only plain LoRA is computed for one. Leave it out of targets.")
        kind = lookup(LORA_LAYERS, "embedding", "layer")
        return kind(layer, config.rank, config.alpha, use_rslora=config.use_rslora)
    check_rank(config.rank, layer.in_features, layer.out_features, name)  # type: ignore[arg-type]
    kind = lookup(LORA_LAYERS, "dora" if config.use_dora else "linear", "layer")
    made: LoraLinear = kind(layer, config.rank, config.alpha, config.dropout, use_rslora=config.use_rslora)
    made.init_name = config.init
    lookup(LORA_INITS, config.init, "lora.init")(made)
    return made


def init_kaiming(layer: LoraLinear) -> None:
    """Leave the first values that every adapter has: A random, B zero."""


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the adapted linear layers by name."""
    return {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, LoraLinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that the adapters train."""
    layers = adapter_layers(model).values()
    return [p for layer in layers for n, p in layer.named_parameters() if not n.startswith("base.")]


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter tensors by name, ``LAYER.lora_a`` and ``LAYER.lora_b``."""
    return {f"{n}.{part}": t for n, layer in adapter_layers(model).items() for part, t in layer.own_state().items()}


def merge_lora(model: nn.Module) -> list[str]:
    """Do what `merge_adapters` does; a model without adapters stays as it is."""
    return merge_adapters(model) if adapter_layers(model) else []
