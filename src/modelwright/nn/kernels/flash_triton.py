"""FlashAttention in Triton: the GPU twin of `modelwright.nn.flash`, forward and backward.

One program computes one tile of the result and walks over the tiles it needs: a tile of queries over keys (forward, and
the gradient of q), a tile of keys over the queries of all its heads (gradients of k and v, so that grouped heads need
no atomic additions). The walk has three parts, and only the outer two look at single positions: tiles cut by the edge
of the window, whole tiles, tiles cut by the diagonal or the end. Exponentials are of base 2.

Source: Dao 2023, arXiv 2307.08691, section 3; Tillet et al. 2019, "Triton". Not here: masks, biases, soft-cap, sinks,
dropout; heads of q and v of different sizes.
Tensors are contiguous: q, out (B, T, N, H); k, v (B, S, K, H); sums (B, N, T). A tile of queries has ROWS rows, one of
keys COLUMNS.
"""

# Triton reads a kernel's annotations itself: its parameters are typed by what they are called with.
# mypy: disable-error-code="no-untyped-def"

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from modelwright.base.errors import ConfigError

HEAD_DIMS = (16, 32, 64, 128)
LOG2_E = tl.constexpr(math.log2(math.e))


class Launch(NamedTuple):
    """Tile sizes and resources of a kernel."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


# Chosen from the shared memory and registers they need, not yet by measuring: benchmarks/gpu_flash.py times them.
FORWARD = {64: Launch(128, 64, 4, 3), 128: Launch(128, 64, 8, 3)}
BACKWARD_KEYS = {64: Launch(64, 128, 8, 2), 128: Launch(64, 64, 8, 2)}
BACKWARD_QUERIES = {64: Launch(128, 64, 8, 2), 128: Launch(64, 64, 8, 2)}
SMALL = Launch(32, 32, 4, 2)  # short heads: tests and toy models


@triton.jit
def _key_range(
    t0, num_queries, num_keys, IS_CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Return where a tile of queries begins to see keys, where whole tiles begin and end, and where it ends."""
    first = 0
    last = num_keys
    whole_first = 0
    whole_last = (num_keys // COLUMNS) * COLUMNS
    if IS_CAUSAL:
        last = tl.minimum(last, t0 + ROWS)
        whole_last = tl.minimum(whole_last, (t0 + 1) // COLUMNS * COLUMNS)
    if WINDOW > 0:
        first = tl.maximum(0, t0 - WINDOW + 1) // COLUMNS * COLUMNS
        whole_first = (tl.maximum(0, t0 + ROWS - WINDOW) + COLUMNS - 1) // COLUMNS * COLUMNS
        if not IS_CAUSAL:
            last = tl.minimum(last, t0 + ROWS - 1 + WINDOW)
            whole_last = tl.minimum(whole_last, (t0 + WINDOW) // COLUMNS * COLUMNS)
    whole_first = tl.minimum(tl.maximum(first, whole_first), last)
    whole_last = tl.maximum(whole_first, whole_last)
    return first, whole_first, whole_last, last


@triton.jit
def _query_range(
    s0, num_queries, IS_CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Return the same four bounds for a tile of keys and the queries that see it."""
    first = 0
    last = num_queries
    whole_first = 0
    whole_last = (num_queries // ROWS) * ROWS
    if IS_CAUSAL:
        first = s0 // ROWS * ROWS
        whole_first = (s0 + COLUMNS - 1 + ROWS - 1) // ROWS * ROWS
    if WINDOW > 0:
        last = tl.minimum(last, s0 + COLUMNS - 1 + WINDOW)
        whole_last = tl.minimum(whole_last, (s0 + WINDOW) // ROWS * ROWS)
        if not IS_CAUSAL:
            first = tl.maximum(0, s0 - WINDOW + 1) // ROWS * ROWS
            whole_first = (tl.maximum(0, s0 + COLUMNS - WINDOW) + ROWS - 1) // ROWS * ROWS
    whole_first = tl.minimum(tl.maximum(first, whole_first), tl.maximum(first, last))
    whole_last = tl.maximum(whole_first, whole_last)
    return first, whole_first, whole_last, last


@triton.jit
def _seen(t, s, num_queries, num_keys, IS_CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Return which of the positions ``t`` and ``s``, shaped to broadcast, see each other."""
    seen = (t < num_queries) & (s < num_keys)
    if IS_CAUSAL:
        seen = seen & (s <= t)
    if WINDOW > 0:
        seen = seen & (t - s < WINDOW)
        if not IS_CAUSAL:
            seen = seen & (s - t < WINDOW)
    return seen


@triton.jit
def _walk_forward(
    state,
    tile,
    k_at,
    v_at,
    bounds,
    lengths,
    factor,
    IS_CUT: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Take the keys from bounds[0] to bounds[1] into the running sums of one tile of queries."""
    summed, largest, total = state
    q, t = tile
    num_queries, num_keys = lengths
    for s0 in range(bounds[0], bounds[1], COLUMNS):
        s = s0 + tl.arange(0, COLUMNS)
        if IS_CUT:
            k = tl.load(k_at + s0 * KV_ROW, mask=(s < num_keys)[:, None], other=0.0)
            v = tl.load(v_at + s0 * KV_ROW, mask=(s < num_keys)[:, None], other=0.0)
        else:
            k = tl.load(k_at + s0 * KV_ROW)
            v = tl.load(v_at + s0 * KV_ROW)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        if IS_CUT:
            seen = _seen(t[:, None], s[None, :], num_queries, num_keys, IS_CAUSAL, WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        grown = tl.maximum(largest, tl.max(scores, 1))
        anchor = tl.where(grown == float("-inf"), 0.0, grown) if IS_CUT else grown
        weights = tl.exp2(scores - anchor[:, None])
        shrink = tl.exp2(largest - anchor)
        total = total * shrink + tl.sum(weights, 1)
        summed = tl.dot(weights.to(v.dtype), v, summed * shrink[:, None], input_precision="ieee")
        largest = grown
    return summed, largest, total


@triton.jit
def _forward(
    q_base,
    k_base,
    v_base,
    out_base,
    sum_base,
    scale,
    num_queries,
    num_keys,
    N: tl.constexpr,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    t0 = tl.program_id(0) * ROWS
    batch, head = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
    t, s, h = t0 + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, HEAD)
    at = (batch * num_queries + t[:, None]) * (N * HEAD) + head * HEAD + h[None, :]
    kv_at = (batch * num_keys + s[:, None]) * (K * HEAD) + head // (N // K) * HEAD + h[None, :]
    q = tl.load(q_base + at, mask=(t < num_queries)[:, None], other=0.0)
    state = (
        tl.zeros((ROWS, HEAD), tl.float32),
        tl.full((ROWS,), float("-inf"), tl.float32),
        tl.zeros((ROWS,), tl.float32),
    )
    first, whole_first, whole_last, last = _key_range(t0, num_queries, num_keys, IS_CAUSAL, WINDOW, ROWS, COLUMNS)
    tile, lengths, factor, kv_row = (q, t), (num_queries, num_keys), scale * LOG2_E, K * HEAD
    k_at, v_at = k_base + kv_at, v_base + kv_at
    state = _walk_forward(
        state, tile, k_at, v_at, (first, whole_first), lengths, factor, True, IS_CAUSAL, WINDOW, kv_row, COLUMNS
    )
    state = _walk_forward(
        state, tile, k_at, v_at, (whole_first, whole_last), lengths, factor, False, IS_CAUSAL, WINDOW, kv_row, COLUMNS
    )
    state = _walk_forward(
        state, tile, k_at, v_at, (whole_last, last), lengths, factor, True, IS_CAUSAL, WINDOW, kv_row, COLUMNS
    )
    summed, largest, total = state
    is_empty = total == 0.0
    out = summed / tl.where(is_empty, 1.0, total)[:, None]
    tl.store(out_base + at, out.to(q.dtype), mask=(t < num_queries)[:, None])
    # Plus infinity makes every weight of an empty row 2^-inf = 0 in the backward pass.
    log_sum = tl.where(is_empty, float("inf"), largest + tl.log2(tl.where(is_empty, 1.0, total)))
    tl.store(sum_base + (batch * N + head) * num_queries + t, log_sum, mask=t < num_queries)


@triton.jit
def _drops(out_base, grad_base, drop_base, num_queries, N: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr):
    """Sum out * grad over each head: what every gradient of a score in that row is lowered by."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch, head = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
    at = (batch * num_queries + t[:, None]) * (N * HEAD) + head * HEAD + tl.arange(0, HEAD)[None, :]
    out = tl.load(out_base + at, mask=(t < num_queries)[:, None], other=0.0).to(tl.float32)
    grad = tl.load(grad_base + at, mask=(t < num_queries)[:, None], other=0.0).to(tl.float32)
    tl.store(drop_base + (batch * N + head) * num_queries + t, tl.sum(out * grad, 1), mask=t < num_queries)


@triton.jit
def _walk_keys(
    dq,
    tile,
    k_at,
    v_at,
    bounds,
    lengths,
    factor,
    IS_CUT: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add to the gradient of a tile of queries what comes from the keys in ``bounds``."""
    q, grad, t, log_sum, drop = tile
    num_queries, num_keys = lengths
    for s0 in range(bounds[0], bounds[1], COLUMNS):
        s = s0 + tl.arange(0, COLUMNS)
        if IS_CUT:
            k = tl.load(k_at + s0 * KV_ROW, mask=(s < num_keys)[:, None], other=0.0)
            v = tl.load(v_at + s0 * KV_ROW, mask=(s < num_keys)[:, None], other=0.0)
        else:
            k = tl.load(k_at + s0 * KV_ROW)
            v = tl.load(v_at + s0 * KV_ROW)
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * factor - log_sum[:, None])
        if IS_CUT:
            seen = _seen(t[:, None], s[None, :], num_queries, num_keys, IS_CAUSAL, WINDOW)
            weights = tl.where(seen, weights, 0.0)
        dscores = weights * (tl.dot(grad, tl.trans(v), input_precision="ieee") - drop[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _backward_queries(
    q_base,
    k_base,
    v_base,
    grad_base,
    sum_base,
    drop_base,
    dq_base,
    scale,
    num_queries,
    num_keys,
    N: tl.constexpr,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    t0 = tl.program_id(0) * ROWS
    batch, head = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
    t, s, h = t0 + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, HEAD)
    at = (batch * num_queries + t[:, None]) * (N * HEAD) + head * HEAD + h[None, :]
    kv_at = (batch * num_keys + s[:, None]) * (K * HEAD) + head // (N // K) * HEAD + h[None, :]
    is_row = (t < num_queries)[:, None]
    q = tl.load(q_base + at, mask=is_row, other=0.0)
    grad = tl.load(grad_base + at, mask=is_row, other=0.0)
    sum_at = (batch * N + head) * num_queries + t
    log_sum = tl.load(sum_base + sum_at, mask=t < num_queries, other=float("inf"))
    drop = tl.load(drop_base + sum_at, mask=t < num_queries, other=0.0)
    first, whole_first, whole_last, last = _key_range(t0, num_queries, num_keys, IS_CAUSAL, WINDOW, ROWS, COLUMNS)
    tile, lengths, factor, kv_row = (q, grad, t, log_sum, drop), (num_queries, num_keys), scale * LOG2_E, K * HEAD
    k_at, v_at = k_base + kv_at, v_base + kv_at
    dq = tl.zeros((ROWS, HEAD), tl.float32)
    dq = _walk_keys(
        dq, tile, k_at, v_at, (first, whole_first), lengths, factor, True, IS_CAUSAL, WINDOW, kv_row, COLUMNS
    )
    dq = _walk_keys(
        dq, tile, k_at, v_at, (whole_first, whole_last), lengths, factor, False, IS_CAUSAL, WINDOW, kv_row, COLUMNS
    )
    dq = _walk_keys(dq, tile, k_at, v_at, (whole_last, last), lengths, factor, True, IS_CAUSAL, WINDOW, kv_row, COLUMNS)
    tl.store(dq_base + at, (dq * scale).to(q.dtype), mask=is_row)


@triton.jit
def _walk_queries(
    state,
    tile,
    bases,
    bounds,
    lengths,
    factor,
    IS_CUT: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    Q_ROW: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add to the gradients of a tile of keys and values what comes from the queries in ``bounds``."""
    dk, dv = state
    k, v, s = tile
    q_at, grad_at, sum_at, drop_at = bases
    num_queries, num_keys = lengths
    for t0 in range(bounds[0], bounds[1], ROWS):
        t = t0 + tl.arange(0, ROWS)
        if IS_CUT:
            q = tl.load(q_at + t0 * Q_ROW, mask=(t < num_queries)[:, None], other=0.0)
            grad = tl.load(grad_at + t0 * Q_ROW, mask=(t < num_queries)[:, None], other=0.0)
            log_sum = tl.load(sum_at + t, mask=t < num_queries, other=float("inf"))
            drop = tl.load(drop_at + t, mask=t < num_queries, other=0.0)
        else:
            q = tl.load(q_at + t0 * Q_ROW)
            grad = tl.load(grad_at + t0 * Q_ROW)
            log_sum = tl.load(sum_at + t)
            drop = tl.load(drop_at + t)
        # Transposed throughout, (COLUMNS, ROWS): then no product needs its left side turned in registers.
        weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * factor - log_sum[None, :])
        if IS_CUT:
            seen = _seen(t[None, :], s[:, None], num_queries, num_keys, IS_CAUSAL, WINDOW)
            weights = tl.where(seen, weights, 0.0)
        dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
        dscores = weights * (tl.dot(v, tl.trans(grad), input_precision="ieee") - drop[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _backward_keys(
    q_base,
    k_base,
    v_base,
    grad_base,
    sum_base,
    drop_base,
    dk_base,
    dv_base,
    scale,
    num_queries,
    num_keys,
    N: tl.constexpr,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    s0 = tl.program_id(0) * COLUMNS
    batch, kv_head = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    t, s, h = tl.arange(0, ROWS), s0 + tl.arange(0, COLUMNS), tl.arange(0, HEAD)
    kv_at = (batch * num_keys + s[:, None]) * (K * HEAD) + kv_head * HEAD + h[None, :]
    is_key = (s < num_keys)[:, None]
    k = tl.load(k_base + kv_at, mask=is_key, other=0.0)
    v = tl.load(v_base + kv_at, mask=is_key, other=0.0)
    tile, lengths, factor, q_row = (k, v, s), (num_queries, num_keys), scale * LOG2_E, N * HEAD
    first, whole_first, whole_last, last = _query_range(s0, num_queries, IS_CAUSAL, WINDOW, ROWS, COLUMNS)
    state = (tl.zeros((COLUMNS, HEAD), tl.float32), tl.zeros((COLUMNS, HEAD), tl.float32))
    for member in range(N // K):
        head = kv_head * (N // K) + member
        at = (batch * num_queries + t[:, None]) * (N * HEAD) + head * HEAD + h[None, :]
        sum_at = (batch * N + head) * num_queries
        bases = (q_base + at, grad_base + at, sum_base + sum_at, drop_base + sum_at)
        state = _walk_queries(
            state, tile, bases, (first, whole_first), lengths, factor, True, IS_CAUSAL, WINDOW, q_row, ROWS
        )
        state = _walk_queries(
            state, tile, bases, (whole_first, whole_last), lengths, factor, False, IS_CAUSAL, WINDOW, q_row, ROWS
        )
        state = _walk_queries(
            state, tile, bases, (whole_last, last), lengths, factor, True, IS_CAUSAL, WINDOW, q_row, ROWS
        )
    dk, dv = state
    tl.store(dk_base + kv_at, (dk * scale).to(k.dtype), mask=is_key)
    tl.store(dv_base + kv_at, dv.to(v.dtype), mask=is_key)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Return (B, T, N, H) from q, k, v, the scale, is_causal and the window (0: none)."""
        q, k, v, scale, is_causal, window = args
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        batch, length, num_heads, head_dim = q.shape
        out = torch.empty_like(q)
        log_sum = torch.empty(batch, num_heads, length, dtype=torch.float32, device=q.device)
        launch = FORWARD.get(head_dim, SMALL)
        ctx.shape = (num_heads, k.shape[2], head_dim, is_causal, window)
        _forward[(triton.cdiv(length, launch.rows), batch * num_heads)](
            q,
            k,
            v,
            out,
            log_sum,
            scale,
            length,
            k.shape[1],
            *ctx.shape,
            launch.rows,
            launch.columns,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k and v."""
        q, k, v, out, log_sum = ctx.saved_tensors
        grad, scale = grads[0].contiguous(), ctx.scale
        batch, length, num_heads, head_dim = q.shape
        num_keys, num_kv_heads = k.shape[1:3]
        dq, dk, dv, drop = (torch.empty_like(x) for x in (q, k, v, log_sum))
        grid = (triton.cdiv(length, 32), batch * num_heads)
        _drops[grid](out, grad, drop, length, num_heads, head_dim, 32)
        launch = BACKWARD_KEYS.get(head_dim, SMALL)
        _backward_keys[(triton.cdiv(num_keys, launch.columns), batch * num_kv_heads)](
            q,
            k,
            v,
            grad,
            log_sum,
            drop,
            dk,
            dv,
            scale,
            length,
            num_keys,
            *ctx.shape,
            launch.rows,
            launch.columns,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        launch = BACKWARD_QUERIES.get(head_dim, SMALL)
        _backward_queries[(triton.cdiv(length, launch.rows), batch * num_heads)](
            q,
            k,
            v,
            grad,
            log_sum,
            drop,
            dq,
            scale,
            length,
            num_keys,
            *ctx.shape,
            launch.rows,
            launch.columns,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        return dq, dk, dv, None, None, None


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, is_causal: bool = False, window: int | None = None
) -> Tensor:
    """Attend from ``q`` (B, T, N, H) to ``k``, ``v`` (B, S, K, H); returns (B, T, N, H).

    Position t sees s <= t when causal, and |t - s| < ``window`` where one is given. Products are in the dtype of the
    tensors and summed in float32.

    Raises:
        ConfigError: Tensors on a CPU (unless Triton interprets), or heads of a size that has no kernel.
    """
    is_interpreted = triton.knobs.runtime.interpret
    if not (q.is_cuda or is_interpreted):
        raise ConfigError(
            f"The Triton kernel was given tensors on {q.device}; it needs a GPU. Use the backend 'flash' on a CPU."
        )
    if q.shape[-1] not in HEAD_DIMS or v.shape[-1] != q.shape[-1]:
        raise ConfigError(
            f"The Triton kernel was given heads of {q.shape[-1]} and values of {v.shape[-1]}; both must be one of "
            f"{', '.join(map(str, HEAD_DIMS))}. Use the backend 'flash'."
        )
    if q.shape[2] % k.shape[2]:
        raise ConfigError(f"There are {q.shape[2]} query heads and {k.shape[2]} key heads; they must divide evenly.")
    out: Tensor = _Flash.apply(q, k, v, scale, is_causal, window or 0)
    return out
