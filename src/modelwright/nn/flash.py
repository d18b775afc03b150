"""FlashAttention in plain PyTorch: exact attention, forward and backward, in memory linear in the sequence.

The scores are never whole. A tile of queries walks over the tiles of keys it may see and keeps, for each row, the
largest score so far, the sum of exponentials and the weighted sum of values, each rescaled when the largest grows
(online softmax). The backward pass keeps one number a row, the logarithm of the sum, and computes the tiles again.
Tiles that nobody sees are skipped. A row that sees no key gives zeros and passes no gradient.

Source: Dao et al. 2022, arXiv 2205.14135 (algorithms 1 and 4); Dao 2023, arXiv 2307.08691 (queries outside, keys
inside); Milakov and Gimelshein 2018, arXiv 1805.02867 (online softmax). Not here: dropout, a second derivative.
G: query heads of one key/value head (N / K); t0:t1 and s0:s1: the queries and keys of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modelwright.base.errors import ConfigError, MissingExtraError
from modelwright.nn.attention import NO_RULE, AttentionRule

# Rows of queries and keys in a tile. Forward and backward at T = 4,096, one head of 64, one CPU thread: see
# benchmarks/flash_memory.py; larger tiles gain little and keep more scores at a time.
QUERY_TILE = 128
KEY_TILE = 256


def flash_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    bias: Tensor | None = None,
    rule: AttentionRule = NO_RULE,
) -> Tensor:
    """Attend tile by tile; arguments and result are those of `modelwright.nn.attention.attend`.

    A mask or bias that is given whole is of course quadratic itself; one that broadcasts over queries, (B, 1, 1, S)
    for padding or (1, N, 1, S) for ALiBi, is not. Computes in float32 (float64 for float64).
    """
    mask, bias = (None if x is None else x[(None,) * (4 - x.dim())] for x in (mask, bias))
    plan = _Plan(scale, is_causal, rule.window, rule.softcap, k.shape[2])
    out: Tensor = _Flash.apply(q, k, v, mask, bias, rule.sinks, plan)
    return out


def attend_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    bias: Tensor | None = None,
    rule: AttentionRule = NO_RULE,
) -> Tensor:
    """Attend by the Triton twin of `flash_attend`, on a GPU; arguments and result are those of `attend`.

    Raises:
        ConfigError: A mask, bias, soft-cap or sinks, which the kernel does not have.
        MissingExtraError: Triton is not installed.
    """
    for name, value in (("mask", mask), ("bias", bias), ("softcap", rule.softcap), ("sinks", rule.sinks)):
        if value is not None:
            raise ConfigError(f"The backend 'triton' was given {name}, which it does not compute; use 'flash'.")
    try:
        from modelwright.nn.kernels import flash_triton
    except ImportError as error:
        raise MissingExtraError("triton", "gpu", "FlashAttention on a GPU") from error
    return flash_triton.attend(q, k, v, scale=scale, is_causal=is_causal, window=rule.window)


@dataclass(frozen=True)
class _Plan:
    """What is the same for every tile."""

    scale: float
    is_causal: bool
    window: int | None
    softcap: float | None
    num_kv_heads: int

    def key_tiles(self, t0: int, t1: int, num_keys: int) -> Iterator[tuple[int, int]]:
        """Yield the tiles of keys that causality and the window let any of the queries see."""
        first, last = 0, num_keys
        if self.window is not None:
            first = max(0, t0 - self.window + 1)
            last = min(last, t1 + self.window - 1)
        if self.is_causal:
            last = min(last, t1)
        for s0 in range(first - first % KEY_TILE, last, KEY_TILE):
            yield s0, min(s0 + KEY_TILE, last)

    def visible(self, t0: int, t1: int, s0: int, s1: int, device: torch.device) -> Tensor | None:
        """Return the (t1 - t0, s1 - s0) part of causality and window, or None where every key is seen."""
        nearest, farthest = t0 - (s1 - 1), t1 - 1 - s0  # distances t - s within the tile: nearest .. farthest
        is_cut_by_order = self.is_causal and nearest < 0
        is_cut_by_window = self.window is not None and max(farthest, -nearest) >= self.window
        if not is_cut_by_order and not is_cut_by_window:
            return None
        distance = torch.arange(t0, t1, device=device)[:, None] - torch.arange(s0, s1, device=device)
        seen = distance >= 0 if self.is_causal else torch.ones_like(distance, dtype=torch.bool)
        return seen if self.window is None else seen & (distance.abs() < self.window)


def _tile_of(x: Tensor, num_kv_heads: int, t0: int, t1: int, s0: int, s1: int) -> Tensor:
    """Cut a mask or bias (B|1, N|1, T|1, S|1) to a tile, (B|1, K|1, G|1, t1-t0|1, s1-s0|1)."""
    x = _cut(x, t0, t1, s0, s1)
    return x[:, :, None] if x.shape[1] == 1 else x.unflatten(1, (num_kv_heads, -1))


def _cut(x: Tensor, t0: int, t1: int, s0: int, s1: int) -> Tensor:
    x = x if x.shape[2] == 1 else x[:, :, t0:t1]
    return x if x.shape[3] == 1 else x[:, :, :, s0:s1]


class _Inputs:
    """The tensors, laid out for tiles: query heads beside their key/value head, float32."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, plan: _Plan):
        self.num_queries, self.num_keys, self.plan = q.shape[1], k.shape[1], plan
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.q = q.unflatten(2, (plan.num_kv_heads, -1)).permute(0, 2, 3, 1, 4)  # (B, K, G, T, H), not copied
        self.k, self.v = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, S, H), (B, K, S, Hv)
        self.mask, self.bias = mask, bias

    def query_tiles(self) -> Iterator[tuple[int, int]]:
        for t0 in range(0, self.num_queries, QUERY_TILE):
            yield t0, min(t0 + QUERY_TILE, self.num_queries)

    def key_tiles(self, t0: int, t1: int) -> Iterator[tuple[int, int]]:
        """Yield the tiles of keys that any of the queries sees."""
        for s0, s1 in self.plan.key_tiles(t0, t1, self.num_keys):
            if self.mask is None or bool(_cut(self.mask, t0, t1, s0, s1).any()):
                yield s0, s1

    def rows(self, x: Tensor, t0: int, t1: int) -> Tensor:
        """Return the queries of a tile of ``x`` (B, K, G, T, H), the heads of a group one below the other."""
        return x[..., t0:t1, :].to(self.dtype).flatten(2, 3)  # (B, K, G * tile, H)

    def scores(self, rows: Tensor, keys: Tensor, t0: int, t1: int, s0: int, s1: int) -> Tensor:
        """Return the scores of a tile, (B, K, G, t1-t0, s1-s0), minus infinity where nothing is seen."""
        plan = self.plan
        scores = (rows @ keys.transpose(2, 3)).unflatten(2, (-1, t1 - t0))
        scores.mul_(plan.scale)
        if self.bias is not None:
            scores = scores + _tile_of(self.bias, plan.num_kv_heads, t0, t1, s0, s1)
        if plan.softcap is not None:
            scores = plan.softcap * torch.tanh(scores / plan.softcap)
        seen = plan.visible(t0, t1, s0, s1, scores.device)
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        if self.mask is not None:
            scores = scores.masked_fill(~_tile_of(self.mask, plan.num_kv_heads, t0, t1, s0, s1), float("-inf"))
        return scores


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Return (B, T, N, Hv) from q, k, v, mask, bias, sinks and the plan."""
        q, k, v, mask, bias, sinks, plan = args
        x = _Inputs(q, k, v, mask, bias, plan)
        batch, length, num_heads = q.shape[:3]
        grid = (batch, plan.num_kv_heads, num_heads // plan.num_kv_heads)
        out = torch.empty(*grid, length, v.shape[-1], dtype=q.dtype, device=q.device)
        log_sum = torch.empty(*grid, length, dtype=x.dtype, device=q.device)
        for t0, t1 in x.query_tiles():
            rows = x.rows(x.q, t0, t1)
            if sinks is None:
                largest = torch.full((*grid, t1 - t0), float("-inf"), dtype=x.dtype, device=q.device)
                total = torch.zeros_like(largest)
            else:  # a sink is a key that is there from the start and has no value
                largest = sinks.to(x.dtype).view(1, *grid[1:], 1).expand(*grid, t1 - t0)
                total = torch.ones_like(largest)
            summed = torch.zeros(*grid[:2], grid[2] * (t1 - t0), v.shape[-1], dtype=x.dtype, device=q.device)
            for s0, s1 in x.key_tiles(t0, t1):
                scores = x.scores(rows, x.k[:, :, s0:s1].to(x.dtype), t0, t1, s0, s1)
                grown = torch.maximum(largest, scores.amax(-1))
                anchor = grown.masked_fill(grown == float("-inf"), 0.0)  # nothing seen yet: any finite number does
                weights = scores.sub_(anchor[..., None]).exp_()
                shrink = (largest - anchor).exp()
                total = total * shrink + weights.sum(-1)
                summed.mul_(shrink.flatten(2, 3)[..., None])
                summed += weights.flatten(2, 3) @ x.v[:, :, s0:s1].to(x.dtype)
                largest = grown
            sees_nothing = total == 0
            share = summed.unflatten(2, (-1, t1 - t0)) / total.masked_fill(sees_nothing, 1.0)[..., None]
            out[..., t0:t1, :] = share.to(q.dtype)
            # Plus infinity makes every weight of an empty row exp(-inf) = 0 in the backward pass.
            log_sum[..., t0:t1] = (largest + total.log()).masked_fill(sees_nothing, float("inf"))
        ctx.save_for_backward(q, k, v, mask, bias, sinks, out, log_sum)
        ctx.plan = plan
        return out.permute(0, 3, 1, 2, 4).flatten(2, 3)  # (B, T, N, Hv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k, v, bias and sinks."""
        q, k, v, mask, bias, sinks, out, log_sum = ctx.saved_tensors
        x, plan = _Inputs(q, k, v, mask, bias, ctx.plan), ctx.plan
        grad = grads[0].unflatten(2, (plan.num_kv_heads, -1)).permute(0, 2, 3, 1, 4)  # (B, K, G, T, Hv)
        dq = torch.zeros(x.q.shape, dtype=q.dtype, device=q.device)
        dk, dv = (torch.zeros(y.shape, dtype=x.dtype, device=q.device) for y in (x.k, x.v))
        dbias = torch.zeros_like(bias, dtype=x.dtype) if bias is not None and ctx.needs_input_grad[4] else None
        dsinks = None if sinks is None else torch.zeros(plan.num_kv_heads, x.q.shape[2], dtype=x.dtype, device=q.device)
        for t0, t1 in x.query_tiles():
            rows, up = x.rows(x.q, t0, t1), x.rows(grad, t0, t1)  # (B, K, G * tile, H or Hv)
            norm = log_sum[..., t0:t1, None]
            drop = (up * x.rows(out, t0, t1)).sum(-1).unflatten(2, (-1, t1 - t0))[..., None]  # (B, K, G, tile, 1)
            turned = torch.zeros_like(rows)
            for s0, s1 in x.key_tiles(t0, t1):
                keys, values = x.k[:, :, s0:s1].to(x.dtype), x.v[:, :, s0:s1].to(x.dtype)
                scores = x.scores(rows, keys, t0, t1, s0, s1)
                weights = (scores - norm).exp_()
                dv[:, :, s0:s1] += weights.flatten(2, 3).transpose(2, 3) @ up
                dscores = (up @ values.transpose(2, 3)).unflatten(2, (-1, t1 - t0)).sub_(drop).mul_(weights)
                if plan.softcap is not None:  # tanh' = 1 - tanh^2; where nothing is seen the weight is 0 already
                    dscores.mul_(1 - (scores.clamp(min=-plan.softcap) / plan.softcap) ** 2)
                if dbias is not None:
                    part = _cut(dbias, t0, t1, s0, s1)
                    part += dscores.flatten(1, 2).sum_to_size(part.shape)
                dscores = dscores.flatten(2, 3)
                turned += dscores @ keys
                dk[:, :, s0:s1] += dscores.transpose(2, 3) @ rows
            dq[..., t0:t1, :] = turned.mul_(plan.scale).unflatten(2, (-1, t1 - t0)).to(q.dtype)
            if dsinks is not None:
                weights = (sinks.to(x.dtype).view(*dsinks.shape, 1, 1) - norm).exp()
                dsinks -= (weights * drop).sum((0, 3, 4))
        return (
            dq.permute(0, 3, 1, 2, 4).flatten(2, 3),
            dk.mul_(plan.scale).transpose(1, 2).to(k.dtype),
            dv.transpose(1, 2).to(v.dtype),
            None,
            None if dbias is None else dbias.to(bias.dtype),
            None if dsinks is None else dsinks.flatten().to(sinks.dtype),
            None,
        )
