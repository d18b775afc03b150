"""Attention over a paged cache in Triton: the GPU twin of `modelwright.nn.paged`, decode and prefill alike.

The keys of a sequence are cut into parts at multiples of `PART` positions. Inside a part a program walks over tiles of
keys with a running softmax that starts anew; parts are then joined in order. A row of queries, one position of one
head, goes through the same operations in the same order wherever it stands: its bits depend on its position, its keys
and the launch shape alone, not on the other rows of the step, nor on who walks. There are two ways to walk: `_parts`
gives each part a program of its own and `_finish` joins what they left (decode: few queries, many keys), or `_finish`
walks over all parts itself (long chunks of a prompt, where keeping the parts would cost more than reading keys).
Products are of one shape, `ROWS` queries by `COLUMNS` keys, and multiplications are not contracted with additions.

Keys and values of positions that the sequence does not have yet are never read, so that what free blocks hold, NaN
included, cannot be felt. A row that sees no key gives zeros. Addresses into the cache are 64 bits wide.

Source: Dao et al. 2023, "Flash-Decoding" (parts and their merge); Kwon et al. 2023, arXiv 2309.06180 (block tables);
He 2025, "Defeating Nondeterminism in LLM Inference" (a fixed size of parts, not a fixed number).
Not here: rounded caches, biases, a backward pass.
Tensors: q (T, N, Hk), pool (slots, K, Hk + Hv), out (T, N, Hv); the others are those of `modelwright.nn.paged.Pages`.
"""

# Triton reads a kernel's annotations itself: its parameters are typed by what they are called with.
# mypy: disable-error-code="no-untyped-def"

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelwright.base.errors import ConfigError
from modelwright.nn.attention import AttentionRule
from modelwright.nn.paged import PART, Cache, Pages, TileGroup, tile_rows

LOG2_E = tl.constexpr(math.log2(math.e))
MAX_HEAD_DIM = 256
# What a tile has in `Pages`: numbers of int64.
TILE_FIELDS = tl.constexpr(5)


class Launch(NamedTuple):
    """Keys in a tile, and resources of a program."""

    columns: int
    num_warps: int
    num_stages: int


# Chosen from the shared memory and registers they need, not yet by measuring: benchmarks/gpu_serve.py times them.
LAUNCHES = {64: Launch(64, 4, 3), 128: Launch(64, 4, 2), 256: Launch(32, 4, 2)}
SMALL = Launch(32, 4, 2)  # short heads: tests and toy models


@triton.jit
def _join(a, b):
    """Join two sums over disjoint keys: (weighted values, largest score, sum of weights)."""
    largest = tl.maximum(a[1], b[1])
    anchor = tl.where(largest == float("-inf"), 0.0, largest)
    keep_a, keep_b = tl.exp2(a[1] - anchor), tl.exp2(b[1] - anchor)
    return a[0] * keep_a[:, None] + b[0] * keep_b[:, None], largest, a[2] * keep_a + b[2] * keep_b


@triton.jit
def _nothing(ROWS: tl.constexpr, VALUE_PAD: tl.constexpr):
    """Return the sums over no key."""
    return (
        tl.zeros((ROWS, VALUE_PAD), tl.float32),
        tl.full((ROWS,), float("-inf"), tl.float32),
        tl.zeros((ROWS,), tl.float32),
    )


@triton.jit
def _tile(tiles_base, tile, head, N: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr):
    """Return a tile's rows and bounds, and where its table and its first part stand.

    Rows are (token, head of queries, position, is there one); bounds the first key that any row sees and one past the
    last.
    """
    at = tiles_base + tile.to(tl.int64) * TILE_FIELDS
    token, num_tokens, table, position, part = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), at + 4
    r = tl.arange(0, ROWS)
    step = r // (N // K)
    rows = (token + step, head * (N // K) + r % (N // K), (position + step).to(tl.int32), step < num_tokens)
    last = (position + num_tokens).to(tl.int32)
    first = tl.zeros((), tl.int32)
    if WINDOW > 0:
        first = tl.maximum(first, (position - WINDOW + 1).to(tl.int32))
    return rows, (first, last), table, tl.load(part)


@triton.jit
def _queries(q_base, rows, N: tl.constexpr, KEY: tl.constexpr, KEY_PAD: tl.constexpr):
    """Load the queries of a tile, (ROWS, KEY_PAD); zeros where there is none."""
    token, head, _, is_row = rows
    h = tl.arange(0, KEY_PAD)
    at = (token * N + head)[:, None] * KEY + h[None, :]
    return tl.load(q_base + at, mask=is_row[:, None] & (h < KEY)[None, :], other=0.0)


@triton.jit
def _walk(
    q,
    rows,
    bounds,
    part,
    table_at,
    pool_at,
    scale,
    softcap,
    K: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
):
    """Return the sums of a tile of queries over the keys of one part."""
    summed, largest, total = _nothing(ROWS, VALUE_PAD)
    t, is_row = rows[2], rows[3]
    hk, hv = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    begin = tl.maximum(part * PART, bounds[0] // COLUMNS * COLUMNS)
    end = tl.minimum(part * PART + PART, bounds[1])
    for s0 in range(begin, end, COLUMNS):
        s = s0 + tl.arange(0, COLUMNS)
        is_key = s < end
        block = tl.load(table_at + s // BLOCK, mask=is_key, other=0).to(tl.int64)
        slot_at = pool_at + (block * BLOCK + s % BLOCK) * (K * (KEY + VALUE))
        k = tl.load(slot_at[:, None] + hk[None, :], mask=is_key[:, None] & (hk < KEY)[None, :], other=0.0)
        v = tl.load(slot_at[:, None] + (KEY + hv)[None, :], mask=is_key[:, None] & (hv < VALUE)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * (scores / softcap)) - 1.0)  # tanh
        seen = is_row[:, None] & (s[None, :] <= t[:, None])
        if WINDOW > 0:
            seen = seen & (t[:, None] - s[None, :] < WINDOW)
        scores = tl.where(seen, scores * LOG2_E, float("-inf"))
        grown = tl.maximum(largest, tl.max(scores, 1))
        anchor = tl.where(grown == float("-inf"), 0.0, grown)
        weights = tl.exp2(scores - anchor[:, None])
        shrink = tl.exp2(largest - anchor)
        total = total * shrink + tl.sum(weights, 1)
        summed = tl.dot(weights.to(v.dtype), v, summed * shrink[:, None], input_precision="ieee")
        largest = grown
    return summed, largest, total


@triton.jit
def _kept_at(work, rows, N: tl.constexpr, SPAN: tl.constexpr, token0):
    """Return which of the kept sums a row's are, of a piece of work."""
    return (work * SPAN + (rows[0] - token0)) * N + rows[1]


@triton.jit
def _parts(
    q_base,
    pool_base,
    tiles_base,
    tables_base,
    work_base,
    kept_base,
    sums_base,
    scale,
    softcap,
    N: tl.constexpr,
    K: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Keep the sums of one tile over one part; the tile is that of a piece of work, -1 where there is none."""
    work, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tile = tl.load(work_base + work * 2)
    if tile < 0:
        return
    rows, bounds, table, first_work = _tile(tiles_base, tile, head, N, K, WINDOW, ROWS)
    part = tl.load(work_base + work * 2 + 1).to(tl.int32)
    if (part + 1) * PART <= bounds[0]:
        return  # behind the window: nobody will ask for it
    q = _queries(q_base, rows, N, KEY, KEY_PAD)
    summed, largest, total = _walk(
        q, rows, bounds, part, tables_base + table, pool_base + head * (KEY + VALUE), scale, softcap,
        K, KEY, VALUE, KEY_PAD, VALUE_PAD, BLOCK, WINDOW, HAS_SOFTCAP, ROWS, COLUMNS, PART,
    )  # fmt: skip
    at = _kept_at(work, rows, N, SPAN, tl.load(tiles_base + tile * TILE_FIELDS))
    hv = tl.arange(0, VALUE_PAD)
    tl.store(kept_base + at[:, None] * VALUE + hv[None, :], summed, mask=rows[3][:, None] & (hv < VALUE)[None, :])
    tl.store(sums_base + at * 2, largest, mask=rows[3])
    tl.store(sums_base + at * 2 + 1, total, mask=rows[3])


@triton.jit
def _finish(
    q_base,
    pool_base,
    tiles_base,
    tables_base,
    kept_base,
    sums_base,
    sinks_base,
    out_base,
    scale,
    softcap,
    N: tl.constexpr,
    K: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Join the parts of a tile, kept by `_parts` or walked over here, and store what its rows see."""
    tile, head = tl.program_id(0), tl.program_id(1)
    rows, bounds, table, first_work = _tile(tiles_base, tile, head, N, K, WINDOW, ROWS)
    hv = tl.arange(0, VALUE_PAD)
    is_value = rows[3][:, None] & (hv < VALUE)[None, :]
    q = _queries(q_base, rows, N, KEY, KEY_PAD)
    token0 = tl.load(tiles_base + tile.to(tl.int64) * TILE_FIELDS)
    state = _nothing(ROWS, VALUE_PAD)
    for part in range(bounds[0] // PART, (bounds[1] + PART - 1) // PART):
        if HAS_PARTS:
            at = _kept_at(first_work + part, rows, N, SPAN, token0)
            piece = (
                tl.load(kept_base + at[:, None] * VALUE + hv[None, :], mask=is_value, other=0.0),
                tl.load(sums_base + at * 2, mask=rows[3], other=float("-inf")),
                tl.load(sums_base + at * 2 + 1, mask=rows[3], other=0.0),
            )
        else:
            piece = _walk(
                q, rows, bounds, part, tables_base + table, pool_base + head * (KEY + VALUE), scale, softcap,
                K, KEY, VALUE, KEY_PAD, VALUE_PAD, BLOCK, WINDOW, HAS_SOFTCAP, ROWS, COLUMNS, PART,
            )  # fmt: skip
        state = _join(state, piece)
    if HAS_SINKS:
        sink = tl.load(sinks_base + rows[1], mask=rows[3], other=0.0).to(tl.float32) * LOG2_E
        nothing, _, _ = _nothing(ROWS, VALUE_PAD)
        state = _join(state, (nothing, sink, tl.full((ROWS,), 1.0, tl.float32)))
    summed, _, total = state
    out = summed / tl.where(total == 0.0, 1.0, total)[:, None]
    at = (rows[0] * N + rows[1])[:, None] * VALUE + hv[None, :]
    tl.store(out_base + at, out.to(q.dtype), mask=is_value)


@triton.jit
def _write(
    k_base,
    v_base,
    slots_base,
    pool_base,
    K: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    """Copy the key and the value of one token and head to their slot."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_base + token).to(tl.int64)
    source = token * K + head
    target = pool_base + (slot * K + head) * (KEY + VALUE)
    hk, hv = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    tl.store(target + hk, tl.load(k_base + source * KEY + hk, mask=hk < KEY), mask=hk < KEY)
    tl.store(target + KEY + hv, tl.load(v_base + source * VALUE + hv, mask=hv < VALUE), mask=hv < VALUE)


def is_interpreted() -> bool:
    """Tell whether Triton runs its kernels step by step on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def refusal(key_dim: int, value_dim: int, dtype: torch.dtype) -> str | None:
    """Return why heads of these sizes have no kernel; None: they have."""
    if max(key_dim, value_dim) > MAX_HEAD_DIM:
        return f"its heads have {key_dim} and {value_dim} numbers, and the kernel takes {MAX_HEAD_DIM} at most"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its weights are {dtype}, for which there is no kernel"
    return None


def write(cache: Cache, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Store keys (T, K, Hk) and values (T, K, Hv) in the slots (T,)."""
    pads = (_padded(cache.key_dim), _padded(cache.value_dim))
    _write[(len(slots), k.shape[1])](
        k.contiguous(), v.contiguous(), slots, cache.pool, k.shape[1], cache.key_dim, cache.value_dim, *pads
    )


def attend(q: Tensor, cache: Cache, pages: Pages, scale: float, rule: AttentionRule) -> Tensor:
    """Return what the queries (T, N, Hk) see, (T, N, Hv); arguments are those of `modelwright.nn.paged.attend_pages`.

    Raises:
        ConfigError: Tensors on a CPU (unless Triton interprets), or heads that have no kernel.
    """
    if not (q.is_cuda or is_interpreted()):
        raise ConfigError(
            f"The Triton kernel was given tensors on {q.device}; it needs a GPU. Use its plain twin on a CPU."
        )
    why_not = refusal(cache.key_dim, cache.value_dim, cache.pool.dtype)
    if why_not is not None or q.dtype != cache.pool.dtype:
        why_not = why_not or f"queries are {q.dtype} and keys {cache.pool.dtype}"
        raise ConfigError(f"The Triton kernel cannot be: {why_not}. Use its plain twin.")
    q = q.contiguous()
    # Whatever no tile covers stays zero.
    out = q.new_zeros(*q.shape[:2], cache.value_dim)
    for group in pages.groups:
        _attend_group(q, cache, pages, group, out, (scale, rule))
    return out


def _attend_group(
    q: Tensor, cache: Cache, pages: Pages, group: TileGroup, out: Tensor, how: tuple[float, AttentionRule]
) -> None:
    scale, rule = how
    num_heads, num_kv_heads = q.shape[1], cache.pool.shape[1]
    pads = (_padded(cache.key_dim), _padded(cache.value_dim))
    launch = LAUNCHES.get(max(pads), SMALL)
    shape: tuple[int, ...] = (
        num_heads,
        num_kv_heads,
        cache.key_dim,
        cache.value_dim,
        *pads,
        cache.block_size,
        rule.window or 0,
    )
    shape += (rule.softcap is not None, tile_rows(num_heads // num_kv_heads), launch.columns, PART, group.span)
    resources = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": False}
    numbers = (scale, 1.0 if rule.softcap is None else rule.softcap)
    kept = sums = q  # not read where nothing is kept
    if group.work is not None:
        num_kept = len(group.work) * group.span * num_heads
        kept = torch.empty(num_kept * cache.value_dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(num_kept * 2, dtype=torch.float32, device=q.device)
        _parts[(len(group.work), num_kv_heads)](
            q, cache.pool, group.tiles, pages.tables, group.work, kept, sums, *numbers, *shape, **resources
        )
    sinks = q if rule.sinks is None else rule.sinks
    _finish[(len(group.tiles), num_kv_heads)](
        q,
        cache.pool,
        group.tiles,
        pages.tables,
        kept,
        sums,
        sinks,
        out,
        *numbers,
        *shape,
        group.work is not None,
        rule.sinks is not None,
        **resources,
    )


def _padded(size: int) -> int:
    """Return the next power of two, 16 at least: what a matrix product takes."""
    return max(16, triton.next_power_of_2(size))
