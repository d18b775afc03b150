"""Attention over a paged cache: each query looks at the keys of its own sequence, which lie in scattered blocks.

`Pages` says where everything is, in tensors of whole numbers that are made once a step and used by every layer. Their
shapes say nothing about lengths, so a step over fixed buffers (`modelwright.engine.graphs`) can be recorded once and
replayed with other contents. `attend_pages` and `write_pages` go to the Triton kernels on a GPU and to the plain twin
elsewhere; the engine's own path on CPUs is another one (`modelwright.engine.runner`), in the canonical shape that
training shares.

Source: Kwon et al. 2023, arXiv 2309.06180, section 4. Not here: rounded caches, biases.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelwright.base.errors import MissingExtraError
from modelwright.nn.attention import NO_RULE, AttentionRule

MIN_ROWS = 16  # of a product on tensor cores
PART = 256  # keys that are worth a program of their own


@dataclass(frozen=True)
class Cache:
    """The memory of one layer: ``pool`` (slots, K, Hk + Hv), keys before values."""

    pool: Tensor
    block_size: int
    key_dim: int

    @property
    def value_dim(self) -> int:
        """Hv."""
        return self.pool.shape[2] - self.key_dim


@dataclass(frozen=True)
class TileGroup:
    """Queries of at most ``span`` neighbouring positions of one sequence, tile by tile.

    ``tiles`` (tiles, 5): the first query, how many, where the sequence's blocks begin in `Pages.tables`, the first
    query's position (-1: a tile that sees nothing), and its first piece of work. ``work`` (pieces, 2): a tile and a
    part of the keys; those of a tile stand together, from part 0 on, and a tile of -1 is no work. None: each tile is
    walked over by one program.
    """

    tiles: Tensor
    span: int
    work: Tensor | None = None


@dataclass(frozen=True)
class Pages:
    """Where the tokens of a step are stored and what they look at."""

    slots: Tensor  # (T,) where the new keys and values go
    tables: Tensor  # (entries,) the blocks of all sequences, one behind the other; a rest may be stale
    groups: tuple[TileGroup, ...]
    num_keys: int  # no sequence has more


def tile_rows(group_size: int) -> int:
    """Return the rows of a tile of queries, heads times positions; ``group_size`` is G, query heads of a kv head.

    >>> tile_rows(4), tile_rows(1), tile_rows(20)
    (16, 16, 32)
    """
    return max(MIN_ROWS, 1 << (group_size - 1).bit_length())


def tile_span(group_size: int) -> int:
    """Return the positions of a tile of queries.

    >>> tile_span(4), tile_span(1), tile_span(3)
    (4, 16, 5)
    """
    return tile_rows(group_size) // group_size


def write_pages(cache: Cache, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Store keys (T, K, Hk) and values (T, K, Hv) in the slots (T,)."""
    if cache.pool.is_cuda:
        _triton().write(cache, k, v, slots)
    else:
        cache.pool.index_copy_(0, slots, torch.cat((k, v), dim=-1))


def attend_pages(q: Tensor, cache: Cache, pages: Pages, *, scale: float, rule: AttentionRule = NO_RULE) -> Tensor:
    """Return what the queries (T, N, Hk) see of the keys of their sequences up to themselves, (T, N, Hv).

    Args:
        q: Queries of all tokens of the step, whose keys are in the cache already.
        cache: Keys and values.
        pages: Who looks where; queries in no tile, and those that see nothing, get zeros.
        scale: Multiplies the scores.
        rule: Window, soft-cap and sinks.
    """
    if q.is_cuda:
        out: Tensor = _triton().attend(q, cache, pages, scale, rule)
        return out
    return attend_pages_plain(q, cache, pages, scale=scale, rule=rule)


def attend_pages_plain(q: Tensor, cache: Cache, pages: Pages, *, scale: float, rule: AttentionRule = NO_RULE) -> Tensor:
    """Compute what `attend_pages` computes in the open, float32 inside: the readable twin that tests compare with."""
    out = torch.zeros(len(q) + 1, q.shape[1], cache.value_dim, dtype=q.dtype, device=q.device)
    for group in pages.groups:
        token, count, table, position, _ = group.tiles.unbind(1)
        step = torch.arange(group.span, device=q.device)
        is_row = step < count[:, None]  # (tiles, span)
        rows = torch.where(is_row, token[:, None] + step, len(q))  # a row that is none goes behind the last
        seen = _see(cache, pages, table, position + count)  # (tiles, S, K, Hk + Hv)
        distance = (position[:, None] + step)[..., None] - torch.arange(pages.num_keys, device=q.device)
        is_seen = is_row[..., None] & (distance >= 0)  # (tiles, span, S)
        if rule.window is not None:
            is_seen &= distance < rule.window
        queries = torch.cat((q, torch.zeros_like(q[:1])))[rows]  # (tiles, span, N, Hk)
        out[rows.flatten()] = _weigh(queries, seen, is_seen, cache, scale, rule).flatten(0, 1).to(q.dtype)
    return out[:-1]


def _see(cache: Cache, pages: Pages, table: Tensor, ends: Tensor) -> Tensor:
    """Return the keys and values of each tile's sequence up to ``ends`` (tiles,), zeros behind: (tiles, S, K, ...)."""
    s = torch.arange(pages.num_keys, device=table.device)
    is_there = s < ends[:, None]  # (tiles, S)
    entries = torch.where(is_there, table[:, None] + s // cache.block_size, 0)
    slots = torch.where(is_there, pages.tables[entries] * cache.block_size + s % cache.block_size, 0)
    return torch.where(is_there[..., None, None], cache.pool[slots], 0.0)


def _weigh(queries: Tensor, seen: Tensor, is_seen: Tensor, cache: Cache, scale: float, rule: AttentionRule) -> Tensor:
    """Attend from (tiles, span, N, Hk) to what each tile sees: (tiles, span, N, Hv), float32."""
    keys, values = seen.float().split((cache.key_dim, cache.value_dim), dim=-1)
    grouped = queries.float().unflatten(2, (keys.shape[2], -1))  # (tiles, span, K, G, Hk)
    scores = torch.einsum("btkgh,bskh->btkgs", grouped, keys) * scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~is_seen[:, :, None, None], float("-inf"))
    if rule.sinks is not None:
        sinks = rule.sinks.float().view(grouped.shape[2:4]).expand(*scores.shape[:4])[..., None]
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : seen.shape[1]]  # a row that sees nothing has no softmax
    return torch.einsum("btkgs,bskh->btkgh", weights, values).flatten(2, 3)


def _triton() -> Any:
    try:
        from modelwright.nn.kernels import paged_triton
    except ImportError as error:
        raise MissingExtraError("triton", "gpu", "paged attention on a GPU") from error
    return paged_triton
