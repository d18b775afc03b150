"""Cross-entropy of an output matrix and its input, in pieces: logits of all positions never stand in memory at once.

    loss = sum_i logsumexp(W h_i) - (W h_i)[label_i],   dloss/d(W h_i) = softmax(W h_i) - onehot(label_i)

The gradient of a piece needs nothing but the piece, so it is computed at once in the forward pass and its logits are
forgotten: three matrix products in all, as without pieces, and a peak that does not grow with positions x V. Products
are taken in the dtype of autocast, sums and the softmax in float32; the gradient of W is summed in float32 over pieces.

A head that is not a plain linear layer (an adapter, low-bit weights) is called piece by piece as it is and computed
again in the backward pass: nothing that is attached to it is left out.

Source: Milakov & Gimelshein 2018, arXiv:1805.02867 (the sums); Hsu et al. 2024, arXiv:2410.10989, section 3.2 (gradient
in the forward pass). Not done: a piece of the vocabulary at a time, which would need a fourth product.
Symbols: M positions, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Logits that stand in memory at once: 32 MiB in bfloat16, and once or twice that for their softmax. Products of
# 512 x 288 x 32,000 run at 313 to 405 GFLOP/s on two cores, those of twice the rows at 271 to 378 (fresh pages).
MAX_LOGITS = 2**24


def head_loss(
    head: nn.Module, hidden: Tensor, labels: Tensor, *, ignored: int = -100, max_logits: int = MAX_LOGITS
) -> Tensor:
    """Return the cross-entropy of ``head(hidden)`` summed over the labels that are not ignored, in float32.

    Args:
        head: Maps (..., D) to (..., V); its ``cap``, if it has one, caps the logits (`SoftcapLinear`).
        hidden: (..., D).
        labels: (...) int64.
        ignored: The label of positions without a loss.
        max_logits: How many logits may stand in memory at once.

    >>> head = nn.Linear(2, 3, bias=False); _ = head.weight.data.zero_()
    >>> head_loss(head, torch.ones(1, 4, 2), torch.tensor([[0, 1, -100, 2]])).item() / 3  # log 3
    1.0986...
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()  # (M, D), (M,)
    if not torch.compiler.is_compiling():
        # Instructions are mostly prompt: what has no loss needs no logits. Compiled shapes cannot depend on labels.
        trained = labels != ignored
        if not bool(trained.all()):
            hidden, labels = hidden[trained], labels[trained]
    vocab_size: int = head.out_features  # type: ignore[assignment]
    longest = max(1, max_logits // vocab_size)
    num_pieces = max(1, -(-hidden.shape[0] // longest))
    piece_len = max(1, -(-hidden.shape[0] // num_pieces))  # pieces of one length, for compilation
    is_linear = isinstance(head, nn.Linear) and head.bias is None and not head._forward_hooks
    if not (is_linear and (type(head).forward is nn.Linear.forward or hasattr(head, "cap"))):
        return _by_calls(head, hidden, labels, ignored, piece_len)
    weight: Tensor = head.weight  # type: ignore[assignment]
    wants = (
        torch.is_grad_enabled() and hidden.requires_grad,
        torch.is_grad_enabled() and weight.requires_grad,
    )
    return _PieceByPiece.apply(hidden, weight, labels, (ignored, piece_len, getattr(head, "cap", None), *wants))


def _by_calls(head: nn.Module, hidden: Tensor, labels: Tensor, ignored: int, piece_len: int) -> Tensor:
    def piece(h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(h).float(), y, ignore_index=ignored, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for h, y in zip(hidden.split(piece_len), labels.split(piece_len), strict=True):
        total = total + (checkpoint(piece, h, y, use_reentrant=False) if torch.is_grad_enabled() else piece(h, y))
    return total


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype in which products with ``hidden`` are to be taken: that of autocast where it is on."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


class _PieceByPiece(torch.autograd.Function):
    """The sum of losses, with both gradients computed on the way."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, options: tuple[Any, ...]) -> Tensor:
        ignored, piece_len, cap, wants_hidden, wants_weight = options
        dtype = product_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.detach().to(dtype)
            total = hidden.new_zeros((), dtype=torch.float32)
            by_hidden: list[Tensor] = []
            by_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
            for h, y in zip(hidden.detach().split(piece_len), labels.split(piece_len), strict=True):
                h = h.to(dtype)
                logits = h @ matrix.T  # (piece, V)
                loss, slope = _loss_and_slope(logits, y, ignored, cap, wants_hidden or wants_weight)
                total = total + loss
                if slope is None:
                    continue
                if wants_hidden:
                    by_hidden.append((slope @ matrix).to(hidden.dtype))  # (piece, D)
                if by_weight is not None:
                    by_weight += slope.T @ h  # (V, D)
        ctx.save_for_backward(torch.cat(by_hidden) if by_hidden else None, by_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        by_hidden, by_weight = ctx.saved_tensors
        return (
            None if by_hidden is None else by_hidden * gradient.to(by_hidden.dtype),
            None if by_weight is None else (by_weight * gradient).to(ctx.weight_dtype),
            None,
            None,
        )


def _loss_and_slope(
    logits: Tensor, labels: Tensor, ignored: int, cap: float | None, wants_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss of one piece, and its derivative by the logits in their dtype."""
    dtype = logits.dtype
    if wants_slope and cap is None and not torch.compiler.is_compiling():
        return _in_place(logits, labels, ignored)
    z = logits.float()
    if cap is not None:
        z = cap * torch.tanh(z / cap)
    is_trained = labels != ignored
    safe = torch.where(is_trained, labels, 0)
    log_sum = z.logsumexp(-1)  # (piece,)
    own = z.gather(1, safe[:, None])[:, 0]
    loss = torch.where(is_trained, log_sum - own, 0.0).sum()
    if not wants_slope:
        return loss, None
    slope = (z - log_sum[:, None]).exp()
    is_own = torch.arange(z.shape[1], device=z.device) == safe[:, None]
    slope = torch.where(is_own, slope - 1.0, slope)
    if cap is not None:
        slope = slope * (1.0 - (z / cap).square())
    return loss, torch.where(is_trained[:, None], slope, 0.0).to(dtype)


def _in_place(logits: Tensor, labels: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """Return the same in one buffer of float32; the logits are spent. A compiler fuses the plain form by itself.

    Of 108 x 151,936 bfloat16 logits the plain form holds 345 MB at once, this one 131 MB.
    """
    is_trained = labels != ignored
    safe = torch.where(is_trained, labels, 0)[:, None]
    z = logits.float()  # (piece, V)
    own = z.gather(1, safe)
    largest = z.amax(-1, keepdim=True)
    sums = z.sub_(largest).exp_().sum(-1, keepdim=True)
    loss = torch.where(is_trained, (sums.log() + largest - own)[:, 0], 0.0).sum()
    z.mul_(is_trained[:, None] / sums)
    z.scatter_add_(1, safe, -is_trained[:, None].to(z.dtype))
    return loss, z.to(logits.dtype)
