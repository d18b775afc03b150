"""Tensor parallelism: each rank computes a part of every layer, read from the types of a decoder's modules.

Columns of q, k, v, gate and up (so whole heads, and a part of the hidden layer), rows of o and down; the halves meet in
one sum a layer and direction. The embedding and the output matrix are cut by tokens. The loss of a language model is
taken from the parts of the logits (`modelwright.nn.cross_entropy_parts`); whoever calls the output matrix gets all
logits gathered. Norms stand on every rank.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3. Not here: adapters, experts, recurrent layers, a sequence
split between the ranks in the norms (Korthikanti et al. 2022).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from modelwright.base.errors import ConfigError
from modelwright.models.decoder import Decoder
from modelwright.nn.attention import Attention
from modelwright.nn.mlp import GatedMlp, Mlp
from modelwright.nn.norm import RMSNorm
from modelwright.nn.positions import LearnedPositions

WHOLE = (RMSNorm, nn.LayerNorm, LearnedPositions)  # modules with weights that every rank keeps


def tensor_plan(model: nn.Module, num_ranks: int) -> dict[str, ParallelStyle]:
    """Return how each layer is cut, by name.

    Raises:
        ConfigError: The model is no decoder of known layers, or its heads do not divide.
    """
    if not isinstance(model, Decoder):
        raise ConfigError(f"loop.parallel.tensor is {num_ranks}; {type(model).__name__} is no decoder. Use shard.")
    plan: dict[str, ParallelStyle] = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    known = {"embed", "lm_head"}
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            _check_heads(name, module, num_ranks)
            plan |= {f"{name}.{part}": ColwiseParallel() for part in "qkv"}
            plan[f"{name}.o"] = RowwiseParallel()
        elif isinstance(module, GatedMlp):
            plan |= {
                f"{name}.gate": ColwiseParallel(),
                f"{name}.up": ColwiseParallel(),
                f"{name}.down": RowwiseParallel(),
            }
        elif isinstance(module, Mlp):
            plan |= {f"{name}.up": ColwiseParallel(), f"{name}.down": RowwiseParallel()}
        elif isinstance(module, WHOLE):
            known.add(name)
    for name, module in model.named_modules():
        has_own = next(iter(module.parameters(recurse=False)), None) is not None
        if has_own and (name not in known | plan.keys() or (name in plan and not _is_plain(module))):
            raise ConfigError(
                f"loop.parallel.tensor is {num_ranks}, and {name} is a {type(module).__name__}, which is not cut here. "
                "Use shard, which cuts any layer."
            )
    return plan


def _is_plain(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, nn.Embedding) or hasattr(module, "cap")


def _check_heads(name: str, layer: Attention, num_ranks: int) -> None:
    if layer.options.context_size is not None or layer.sinks is not None:
        raise ConfigError(f"loop.parallel.tensor is {num_ranks}, and {name} has sinks or looks at another sequence.")
    for part, kind in ((layer.q, "query"), (layer.k, "key/value")):
        width: int = part.out_features  # type: ignore[assignment]
        if (width // layer.head_dim) % num_ranks:
            raise ConfigError(
                f"loop.parallel.tensor is {num_ranks}, and {name} has {width // layer.head_dim} {kind} heads, which it "
                "does not divide. Choose a degree that divides the heads."
            )


def apply_tensor(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cut the model in place over the ranks of the mesh."""
    parallelize_module(model, mesh, tensor_plan(model, mesh.size()))
    assert isinstance(model, Decoder)
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, Attention):
            for norm in (module.q_norm, module.k_norm):
                if norm is not None:
                    norm.forward = _SummedNorm(norm, mesh.get_group())  # type: ignore[method-assign]


class _SummedNorm:
    """The norm of heads: each rank has some of them, so the gradient of its weight is a sum over the ranks."""

    def __init__(self, norm: nn.Module, group: dist.ProcessGroup):
        self.norm, self.group = norm, group

    def __call__(self, x: Tensor) -> Tensor:
        weights = dict(self.norm._parameters)
        for name, weight in weights.items():
            if weight is not None:
                self.norm._parameters[name] = _SumGradient.apply(weight, self.group)
        try:
            return type(self.norm).forward(self.norm, x)
        finally:
            self.norm._parameters.update(weights)


class _SumGradient(torch.autograd.Function):
    """The identity, whose gradient is added over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None
