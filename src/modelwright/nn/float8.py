"""Linear layers whose three products are taken in 8 bits on a GPU that has them; weights stay as they are.

    y = x W',   dx = g W,   dW = g' x,   each factor a -> round(a * s) with s = largest / max|a|, one scale a tensor

Inputs and weights are rounded to e4m3 (3 bits of fraction, up to 448), gradients to e5m2 (range before precision, up
to 57,344). Scales are those of the tensor at hand, so that nothing is remembered between steps.

Source: Micikevicius et al. 2022, arXiv:2209.05433. Not here: a scale a row or block, scales of past steps. Elsewhere
than on a GPU the products of the rounded factors are taken in float32: slow, and there to be compared with.
"""

from typing import Any

import torch
from torch import Tensor, nn

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # every axis of a product must be one of it
# The output matrix and the first layers' tables are left alone: their rounding would reach the logits directly.
LEFT_OUT = ("lm_head",)


def to_float8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round a tensor; return it in 8 bits and the factor that gives its size back, float32 ()."""
    largest = x.abs().amax().float().clamp(min=1e-12)
    scale = torch.finfo(dtype).max / largest
    return (x.float() * scale).to(dtype), scale.reciprocal()


def product(a: Tensor, b: Tensor, factors: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Multiply (M, K) by (K, N), both in 8 bits, ``a`` row by row and ``b`` column by column in memory."""
    if a.device.type == "cuda":
        return torch._scaled_mm(a, b, scale_a=factors[0], scale_b=factors[1], out_dtype=dtype)
    return ((a.float() @ b.float()) * (factors[0] * factors[1])).to(dtype)


class _Linear8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x8, by_x = to_float8(x, FORWARD)  # (M, K)
        w8, by_w = to_float8(weight, FORWARD)  # (N, K)
        ctx.save_for_backward(x8, by_x, w8, by_w)
        ctx.dtypes = (x.dtype, weight.dtype, dtype)
        return product(x8, w8.T, (by_x, by_w), dtype)  # (M, N)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x8, by_x, w8, by_w = ctx.saved_tensors
        x_dtype, w_dtype, dtype = ctx.dtypes
        g8, by_g = to_float8(gradient, BACKWARD)  # (M, N)
        by_input = by_weight = None
        if ctx.needs_input_grad[0]:
            by_input = product(g8, w8.T.contiguous().T, (by_g, by_w), dtype).to(x_dtype)  # (M, K)
        if ctx.needs_input_grad[1]:
            by_weight = product(g8.T.contiguous(), x8.T.contiguous().T, (by_g, by_x), dtype).to(w_dtype)  # (N, K)
        return by_input, by_weight, None


class Float8Linear(nn.Linear):
    """A linear layer in 8 bits; an existing one becomes it by `use_float8`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        flat = x.flatten(0, -2)
        if flat.shape[0] % MULTIPLE:
            return super().forward(x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        out = _Linear8.apply(flat, self.weight, dtype).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(dtype)


def use_float8(model: nn.Module) -> list[str]:
    """Compute every plain linear layer of a fitting size in 8 bits, in place; return their names."""
    changed = []
    for name, module in model.named_modules():
        is_plain = type(module) is nn.Linear and name.rpartition(".")[2] not in LEFT_OUT
        if is_plain and module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0:
            module.__class__ = Float8Linear
            changed.append(name)
    return changed


def leave_float8(model: nn.Module) -> None:
    """Make the layers plain again."""
    for module in model.modules():
        if type(module) is Float8Linear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
