"""First values of low-rank adapters taken from the weight itself: PiSSA, over dense or 4-bit weights, and LoftQ.

PiSSA trains the principal part of the weight and freezes the rest:

    W = U S V^T,   B A = (U_r sqrt(S_r)) (sqrt(S_r) V_r^T) / s,   base = W - s B A

QPiSSA keeps the base as NF4(W - s B A): the rest has smaller numbers than W, so rounding it loses less than rounding W,
and the largest directions stand in the adapter unrounded.

LoftQ lets the adapter begin as what 4-bit rounding lost: B A is the best rank-R fit of W - NF4(W), so that the model
begins nearer to the unrounded one. With one iteration the base is NF4(W) itself, and the adapter fits every model
rounded from the same weights; that is what is done here.

Source: Meng et al. 2024, arXiv:2404.02948, equations 2 to 4 (PiSSA) and section 4 (QPiSSA, with one
iteration); Li et al. 2023, arXiv:2310.08659, algorithm 1 with
T = 1 (LoftQ). Not done: fast randomised factors, more iterations (LoftQ's need a base of their own).
"""

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.nn.lora import LoraLinear
from modelwright.nn.nf4 import NF4Linear


@torch.no_grad()
def _principal(weight: Tensor, layer: LoraLinear) -> tuple[Tensor, Tensor]:
    """Return A (R, in) and B (out, R) with s B A the best fit of a weight (out, in) of the layer's rank."""
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (s[: layer.rank] / layer.scaling).sqrt()
    return root[:, None] * vh[: layer.rank], u[:, : layer.rank] * root


@torch.no_grad()
def init_pissa(layer: LoraLinear) -> None:
    """Give the adapter the principal part of the weight, and leave the base the rest.

    Raises:
        ConfigError: The base is not dense: rounded weights have no exact rest.
    """
    base = layer.base
    if not isinstance(base, nn.Linear):
        raise ConfigError(
            f"lora.init is 'pissa' and the layer is a {type(base).__name__}; PiSSA takes the principal part out of a "
            "dense weight. Load the model dense; with load_in_4bit its layers are rounded while the adapter is made."
        )
    layer.taken = base.weight.detach().clone()  # type: ignore[assignment]
    rest = _take_principal(layer, base.weight)
    base.weight.copy_(rest.to(base.weight.dtype))


@torch.no_grad()
def init_qpissa(layer: LoraLinear) -> None:
    """Give the adapter the principal part of the weight, and keep the rest in NF4.

    Raises:
        ConfigError: The base is rounded already: its largest directions have lost what the adapter should keep.
    """
    base = layer.base
    if not isinstance(base, nn.Linear):
        raise ConfigError(
            f"lora.init is 'qpissa' and the layer is a {type(base).__name__}: what rounding lost is not known any "
            "more, and the rest would be rounded a second time. Load the model dense; its layers are rounded while "
            "the adapter is made."
        )
    rest = _take_principal(layer, base.weight)
    rounded = NF4Linear.from_linear(base)
    rounded.fill(rest)
    layer.base = rounded


def _take_principal(layer: LoraLinear, weight: Tensor) -> Tensor:
    """Begin the adapter with the principal part of a weight (out, in), and return the rest in float32."""
    first_a, first_b = _principal(weight, layer)
    layer.lora_a.copy_(first_a)
    layer.lora_b.copy_(first_b)
    # What a saved adapter needs, to be a plain one over the untouched model.
    layer.register_buffer("first_a", first_a)
    layer.register_buffer("first_b", first_b)
    return weight.float() - layer.delta()


@torch.no_grad()
def init_loftq(layer: LoraLinear) -> None:
    """Put the weight into NF4 if it is not there yet, and let the adapter make up for the rounding.

    Raises:
        ConfigError: The base is rounded already, and what it was before is gone.
    """
    base = layer.base
    if not isinstance(base, nn.Linear):
        raise ConfigError(
            f"lora.init is 'loftq' and the layer is a {type(base).__name__}: what rounding lost is not known any more. "
            "Load the model dense; its layers are rounded while the adapter is made."
        )
    weight = base.weight.detach()
    rounded = NF4Linear.from_linear(base)
    first_a, first_b = _principal(weight.float() - rounded.dequantize(torch.float32), layer)
    layer.base = rounded
    layer.lora_a.copy_(first_a)
    layer.lora_b.copy_(first_b)
