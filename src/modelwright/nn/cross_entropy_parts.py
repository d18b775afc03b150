"""Cross-entropy of an output matrix that is cut by tokens over ranks: no rank ever has all logits of a position.

    loss = sum_i log(sum over ranks of sum exp(W_r h_i)) - (W h_i)[label_i]

Per piece of positions: one exchange of the largest logit, one of the sums and of the label's own logit; the gradient
of the input is a sum over the ranks, that of each rank's part of W needs nobody. Otherwise as
`modelwright.nn.cross_entropy`.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3 (parallel cross-entropy).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from modelwright.nn.cross_entropy import MAX_LOGITS, product_dtype


def parts_loss(
    head: nn.Module, hidden: Tensor, labels: Tensor, *, ignored: int = -100, max_logits: int = MAX_LOGITS
) -> Tensor:
    """Return the cross-entropy summed over the labels that are not ignored, in float32, the same on every rank.

    Args:
        head: Its ``weight`` is a DTensor (V, D) that is cut in its first axis over one mesh axis.
        hidden: (..., D), the same on every rank of that axis.
        labels: (...) int64.
        ignored: The label of positions without a loss.
        max_logits: How many logits of one rank may stand in memory at once.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    trained = labels != ignored
    hidden, labels = hidden[trained], labels[trained]
    weight = head.weight
    assert isinstance(weight, DTensor)
    _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    local = weight.to_local()
    longest = -(-weight.shape[0] // weight.device_mesh.size())  # rows of the largest part: pieces of one length for all
    piece_len = max(1, max_logits // longest)
    options = (piece_len, getattr(head, "cap", None), offset[0], weight.device_mesh.get_group())
    out: Tensor = _Parts.apply(hidden, local, labels, options)
    return out


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, options: tuple[Any, ...]) -> Tensor:
        piece_len, cap, offset, group = options
        dtype = product_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.detach().to(dtype)
            total = hidden.new_zeros((), dtype=torch.float32)
            by_hidden: list[Tensor] = []
            by_weight = torch.zeros_like(weight, dtype=torch.float32)
            for h, y in zip(hidden.detach().split(piece_len), labels.split(piece_len), strict=True):
                h = h.to(dtype)
                loss, slope = _loss_and_slope(h @ matrix.T, y - offset, cap, group)
                total = total + loss
                by_hidden.append((slope.to(dtype) @ matrix).float())
                by_weight += slope.to(dtype).T @ h
            gradient = torch.cat(by_hidden) if by_hidden else torch.zeros_like(hidden, dtype=torch.float32)
            dist.all_reduce(gradient, group=group)
        ctx.save_for_backward(gradient.to(hidden.dtype), by_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        by_hidden, by_weight = ctx.saved_tensors
        return by_hidden * gradient.to(by_hidden.dtype), by_weight * gradient.to(by_weight.dtype), None, None


def _loss_and_slope(logits: Tensor, own: Tensor, cap: float | None, group: Any) -> tuple[Tensor, Tensor]:
    """Return the summed loss of a piece, and its derivative by this rank's logits; ``own`` counts from its first."""
    z = logits.float()
    if cap is not None:
        z = cap * torch.tanh(z / cap)
    largest = z.amax(-1) if z.shape[1] else z.new_full(z.shape[:1], float("-inf"))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    weights = (z - largest[:, None]).exp()
    is_mine = (own >= 0) & (own < z.shape[1])
    at = torch.where(is_mine, own, 0)
    found = z.gather(1, at[:, None])[:, 0] if z.shape[1] else torch.zeros_like(largest)
    sums = torch.stack([weights.sum(-1), torch.where(is_mine, found, 0.0)])
    dist.all_reduce(sums, group=group)
    slope = weights / sums[0][:, None]
    slope = torch.where(torch.arange(z.shape[1], device=z.device) == own[:, None], slope - 1.0, slope)
    if cap is not None:
        slope = slope * (1.0 - (z / cap).square())
    return (largest + sums[0].log() - sums[1]).sum(), slope
