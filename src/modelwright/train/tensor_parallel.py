"""Tensor parallelism: each rank computes a part of every layer, cut as `modelwright.models.cut` says.

The halves meet in one sum a layer and direction. The embedding and the output matrix are cut by tokens. The loss of a
language model is taken from the parts of the logits (`modelwright.nn.cross_entropy_parts`); whoever calls the output
matrix gets all logits gathered. Norms stand on every rank.

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

from modelwright.models.cut import layer_cuts
from modelwright.models.decoder import Decoder
from modelwright.nn.attention import Attention


def tensor_plan(model: nn.Module, num_ranks: int) -> dict[str, ParallelStyle]:
    """Return how each layer is cut, by name.

    Raises:
        ConfigError: The model is no decoder of known layers, or its heads do not divide.
    """
    cuts = layer_cuts(model, num_ranks, setting="loop.parallel.tensor", advice="Use shard, which cuts any layer.")
    plan: dict[str, ParallelStyle] = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    return plan | {name: ColwiseParallel() if cut == "columns" else RowwiseParallel() for name, cut in cuts.items()}


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
