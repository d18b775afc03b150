"""Ring attention: a row is cut over several ranks, keys and values go round, and no rank ever holds all of them.

A rank keeps its queries and meets the keys of one rank after the other; the parts are joined by the online softmax
(largest score, sum, weighted sum), and in the backward pass the gradients of keys and values travel with them until
they are home. The next keys are on their way while the present ones are computed with.

A causal row cut into c equal parts would give the last rank c times the work of the first. So it is cut into 2 c
chunks, and rank i has chunks i and 2 c - 1 - i: all have the same number of visible pairs. Pairs of chunks that cannot
see each other are skipped.

Source: Liu et al. 2023, arXiv:2310.01889 (ring); Milakov & Gimelshein 2018, arXiv:1805.02867 (online softmax); the
zigzag order is that of Megatron-LM's and Llama 3's context parallelism. Not here: biases, sinks, dropout.
G: query heads of one key/value head; c: ranks of the ring.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from modelwright.base.errors import ConfigError
from modelwright.nn.attention import NO_RULE, AttentionRule, use_backend

QUERY_TILE = 512  # queries at a time: scores of a tile are (B, N, 512, chunk) in float32


@dataclass(frozen=True)
class Ring:
    """The ranks of a row: which part of it each of them has."""

    group: Any
    rank: int
    size: int
    row_len: int  # positions of the whole row

    @property
    def chunk_len(self) -> int:
        """Positions of one of the 2 c chunks."""
        return self.row_len // (2 * self.size)

    def chunks(self, rank: int) -> tuple[int, int]:
        """Return the two chunks that a rank has, in the order in which it holds them."""
        return rank, 2 * self.size - 1 - rank


_rings: list[Ring] = []  # the innermost last


def zigzag(row_len: int, rank: int, size: int) -> Tensor:
    """Return which positions of a row a rank has, (row_len / size,).

    >>> zigzag(8, 0, 2).tolist(), zigzag(8, 1, 2).tolist()
    ([0, 1, 6, 7], [2, 3, 4, 5])

    Raises:
        ConfigError: The row cannot be cut evenly.
    """
    if row_len % (2 * size):
        raise ConfigError(
            f"Rows of {row_len} tokens are to be cut over {size} context ranks; the length must be a multiple of "
            f"{2 * size}. Change max_seq_len or loop.parallel.context."
        )
    at = torch.arange(row_len).view(2 * size, -1)
    return torch.cat([at[rank], at[2 * size - 1 - rank]])


@contextmanager
def use_ring(group: Any, row_len: int) -> Iterator[None]:
    """Compute all attention inside the ``with`` over the ranks of a group, whose rows are cut by `zigzag`."""
    _rings.append(Ring(group, dist.get_rank(group), dist.get_world_size(group), row_len))
    try:
        with use_backend("ring"):
            yield
    finally:
        _rings.pop()


def attend_ring(
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
    """Attend from this rank's queries to the keys of all ranks; arguments and result are those of `attend`.

    Args:
        q: (B, T/c, N, H), in the order of `zigzag`.
        k: (B, T/c, K, H).
        v: (B, T/c, K, Hv).
        scale: Factor on the scores.
        mask: Broadcast to (B, N, T/c, T): this rank's queries, the keys of the whole row in their own order.
        is_causal: By the positions of the whole row.
        bias: Not computed here.
        rule: Window and soft-cap.

    Raises:
        ConfigError: A bias or sinks, or there is no ring around the call.
    """
    if not _rings or bias is not None or rule.sinks is not None:
        raise ConfigError(
            "The attention backend 'ring' was called outside of use_ring, or with a bias or sinks, which it does not "
            "compute. Use it through loop.parallel.context, with a model that has neither."
        )
    plan = _Plan(_rings[-1], scale, is_causal, rule.window, rule.softcap)
    out: Tensor = _RingAttention.apply(q, k, v, mask, plan)
    return out


@dataclass(frozen=True)
class _Plan:
    ring: Ring
    scale: float
    is_causal: bool
    window: int | None
    softcap: float | None

    def pairs(self, owner: int) -> Iterator[tuple[slice, slice, int, int]]:
        """Yield tiles of my queries beside the chunks of keys of ``owner``: where they are held, where they begin."""
        size = self.ring.chunk_len
        for q_slot, q_chunk in enumerate(self.ring.chunks(self.ring.rank)):
            for k_slot, k_chunk in enumerate(self.ring.chunks(owner)):
                if self.is_causal and k_chunk > q_chunk:
                    continue
                nearest = max(abs(q_chunk - k_chunk) - 1, 0) * size + (1 if q_chunk != k_chunk else 0)
                if self.window is not None and nearest >= self.window:
                    continue
                for start in range(0, size, QUERY_TILE):
                    stop = min(start + QUERY_TILE, size)
                    held = slice(q_slot * size + start, q_slot * size + stop)
                    yield held, slice(k_slot * size, (k_slot + 1) * size), q_chunk * size + start, k_chunk * size

    def visible(self, q_at: int, num_queries: int, k_at: int, num_keys: int, device: torch.device) -> Tensor | None:
        """Return the part of causality and window that belongs to a tile, or None where all is seen."""
        if not self.is_causal and self.window is None:
            return None
        queries = torch.arange(q_at, q_at + num_queries, device=device)[:, None]
        distance = queries - torch.arange(k_at, k_at + num_keys, device=device)
        seen = distance >= 0 if self.is_causal else torch.ones_like(distance, dtype=torch.bool)
        return seen if self.window is None else seen & (distance.abs() < self.window)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, plan: _Plan, held: slice, places: tuple[int, int]) -> Tensor:
    """Return (B, K, G, tile, keys) in float32, minus infinity where nothing is seen."""
    q_at, k_at = places
    scores = torch.einsum("bkgth,bksh->bkgts", q, k).float() * plan.scale
    if plan.softcap is not None:
        scores = plan.softcap * torch.tanh(scores / plan.softcap)
    seen = plan.visible(q_at, q.shape[3], k_at, k.shape[2], q.device)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    if mask is not None:
        part = mask if mask.shape[2] == 1 else mask[:, :, held]
        part = part[..., k_at : k_at + k.shape[2]]
        part = part[:, :, None] if part.shape[1] == 1 else part.unflatten(1, (k.shape[1], -1))
        scores = scores.masked_fill(~part, float("-inf"))
    return scores


def _pass_on(tensors: list[Tensor], ring: Ring) -> tuple[list[Tensor], list[Any]]:
    """Begin to send tensors to the next rank and to receive those of the one before."""
    received = [torch.empty_like(t) for t in tensors]
    after = dist.get_global_rank(ring.group, (ring.rank + 1) % ring.size)
    before = dist.get_global_rank(ring.group, (ring.rank - 1) % ring.size)
    operations = [dist.P2POp(dist.isend, t, after, ring.group) for t in tensors]
    operations += [dist.P2POp(dist.irecv, t, before, ring.group) for t in received]
    return received, list(dist.batch_isend_irecv(operations))


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()


def _grouped(x: Tensor, num_kv_heads: int) -> Tensor:
    """Lay heads out by their key/value head: (B, T, N, H) to (B, K, G, T, H)."""
    return x.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, plan: _Plan) -> Tensor:
        """Return (B, T/c, N, Hv)."""
        ring, dtype = plan.ring, v.dtype
        rows = _grouped(q, k.shape[2]).to(dtype)
        keys, values = k.to(dtype).transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        largest = torch.full(rows.shape[:-1], float("-inf"), device=q.device)
        total = torch.zeros_like(largest)
        summed = torch.zeros(*rows.shape[:-1], v.shape[-1], device=q.device)
        held_keys, held_values = keys, values
        for turn in range(ring.size):
            owner = (ring.rank - turn) % ring.size
            is_last = turn == ring.size - 1
            coming, works = ([], []) if is_last else _pass_on([held_keys, held_values], ring)
            for held, chunk, q_at, k_at in plan.pairs(owner):
                scores = _scores(rows[..., held, :], held_keys[:, :, chunk], mask, plan, held, (q_at, k_at))
                grown = torch.maximum(largest[..., held], scores.amax(-1))
                anchor = grown.masked_fill(grown == float("-inf"), 0.0)
                weights = (scores - anchor[..., None]).exp()
                shrink = (largest[..., held] - anchor).exp()
                total[..., held] = total[..., held] * shrink + weights.sum(-1)
                more = torch.einsum("bkgts,bksh->bkgth", weights.to(dtype), held_values[:, :, chunk]).float()
                summed[..., held, :] = summed[..., held, :] * shrink[..., None] + more
                largest[..., held] = grown
            _wait(works)
            if not is_last:
                held_keys, held_values = coming
        sees_nothing = total == 0
        out = (summed / total.masked_fill(sees_nothing, 1.0)[..., None]).to(q.dtype)
        log_sum = (largest + total.log()).masked_fill(sees_nothing, float("inf"))
        ctx.save_for_backward(rows, keys, values, mask, out, log_sum)
        ctx.plan, ctx.dtypes = plan, (q.dtype, k.dtype, v.dtype)
        return out.permute(0, 3, 1, 2, 4).flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k and v."""
        rows, keys, values, mask, out, log_sum = ctx.saved_tensors
        plan: _Plan = ctx.plan
        ring = plan.ring
        up = _grouped(grads[0], keys.shape[1])
        drop = (up.float() * out.float()).sum(-1, keepdim=True)
        up = up.to(values.dtype)
        dq = torch.zeros(rows.shape, device=rows.device)
        dk, dv = (torch.zeros(x.shape, device=rows.device) for x in (keys, values))
        held_keys, held_values = keys, values
        for turn in range(ring.size):
            owner = (ring.rank - turn) % ring.size
            is_last = turn == ring.size - 1
            coming, works = ([], []) if is_last else _pass_on([held_keys, held_values], ring)
            for held, chunk, q_at, k_at in plan.pairs(owner):
                tile, part, gradient = rows[..., held, :], held_keys[:, :, chunk], up[..., held, :]
                scores = _scores(tile, part, mask, plan, held, (q_at, k_at))
                weights = (scores - log_sum[..., held, None]).exp()
                dv[:, :, chunk] += torch.einsum("bkgts,bkgth->bksh", weights.to(values.dtype), gradient)
                slope = torch.einsum("bkgth,bksh->bkgts", gradient, held_values[:, :, chunk]).float()
                slope = (slope - drop[..., held, :]) * weights
                if plan.softcap is not None:
                    slope = slope * (1 - (scores.clamp(min=-plan.softcap) / plan.softcap).square())
                slope = (slope * plan.scale).to(values.dtype)
                dq[..., held, :] += torch.einsum("bkgts,bksh->bkgth", slope, part)
                dk[:, :, chunk] += torch.einsum("bkgts,bkgth->bksh", slope, tile)
            _wait(works)
            if not is_last:
                held_keys, held_values = coming
            # The gradients follow their keys; after the last turn they are home.
            (dk, dv), works = _pass_on([dk, dv], ring)
            _wait(works)
        q_dtype, k_dtype, v_dtype = ctx.dtypes
        return (
            dq.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q_dtype),
            dk.transpose(1, 2).to(k_dtype),
            dv.transpose(1, 2).to(v_dtype),
            None,
            None,
        )
