"""Attention in the shape that the engine computes it in, so that training and scoring get the engine's bits.

The last bits of a product depend on the shape it is computed in. The engine therefore has one shape for every
query: tiles of `QUERY_TILE` positions that begin at multiples of it, against keys 0 to the next multiple of `KEY_TILE`,
later ones masked. A token alone, as in decoding, takes fewer rows where these give the same bits (`decode_rows`). The
backend "tiles" gives the plain forward pass the same shape: with bf16 weights on a CPU that computes bf16,
log-probabilities of `modelwright.models.scoring` are then those of the engine bit for bit, gradients included. It is
slower than the other backends; use it where equality matters (ratios of policies), not to train.
Not done: packed documents, biases, attention that is not causal.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from modelwright.base.errors import ConfigError
from modelwright.nn.attention import NO_RULE, AttentionRule

# 4 rows x the query heads of a kv head: prefill costs 1.2x of what tiles of 16 take (two cores with AVX512-BF16).
QUERY_TILE = 4
KEY_TILE = 128
# Products of fewer rows go through other kernels of oneDNN, which round otherwise: measured over heads of 16, 64 and
# 128, 1 to 8 query heads a kv head, 16 to 1040 keys. From 4 rows on all were equal, up to 16 tokens together.
SAME_ROWS = 4


def tile_mask(distance: Tensor, window: int | None, group_size: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores of tiles, (B, 1, rows * G, S): 0 for what is seen, else minus infinity.

    Args:
        distance: (B, rows, S) position of the query less that of the key.
        window: Keys as far away as this and further are hidden; None: none.
        group_size: G, query heads of a kv head.
        dtype: Of the queries.
    """
    is_hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)  # (B, rows, S)
    mask = torch.zeros(is_hidden.shape, dtype=dtype, device=distance.device)
    mask.masked_fill_(is_hidden, float("-inf"))
    return mask.repeat_interleave(group_size, dim=1)[:, None]


def attend_rows(rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, rule: AttentionRule) -> Tensor:
    """Return what each row of the tiles sees, (B * rows, N, Hv): query heads of a kv head stand under each other.

    Args:
        rows: (B * rows, N, H) queries, tile after tile.
        keys: (B, K, S, H).
        values: (B, K, S, Hv).
        mask: From `tile_mask`.
        scale: Multiplies the scores.
        rule: Soft-cap and sinks; the window is in the mask.
    """
    num_heads, head_dim = rows.shape[1:]
    num_tiles, num_kv_heads = keys.shape[:2]
    tiles = rows.view(num_tiles, -1, num_kv_heads, num_heads // num_kv_heads, head_dim).transpose(1, 2)
    num_rows = tiles.shape[2]
    tiles = tiles.reshape(num_tiles, num_kv_heads, -1, head_dim)  # (B, K, rows*G, H)
    if rule.softcap is None and rule.sinks is None:
        out = F.scaled_dot_product_attention(tiles, keys, values, attn_mask=mask, scale=scale)
    else:
        out = _attend_by_rule(tiles, keys, values, mask, scale, rule)
    out = out.view(num_tiles, num_kv_heads, num_rows, -1, values.shape[-1]).transpose(1, 2)  # (B, rows, K, G, Hv)
    return out.reshape(-1, num_heads, values.shape[-1])


def _attend_by_rule(
    tiles: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, rule: AttentionRule
) -> Tensor:
    """Attend with capped scores or sinks, float32 inside: (B, K, rows*G, Hv)."""
    scores = tiles.float() @ keys.float().transpose(-1, -2) * scale  # (B, K, rows*G, S)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores + mask
    if rule.sinks is None:
        return (scores.softmax(-1) @ values.float()).to(tiles.dtype)
    num_kv_heads, num_rows = tiles.shape[1:3]
    num_groups = len(rule.sinks) // num_kv_heads
    sinks = rule.sinks.float().view(num_kv_heads, 1, -1).expand(-1, num_rows // num_groups, -1)
    sinks = sinks.reshape(num_kv_heads, num_rows, 1)
    joined = torch.cat((scores, sinks.expand(tiles.shape[0], -1, -1, -1)), dim=-1)
    return (joined.softmax(-1)[..., :-1] @ values.float()).to(tiles.dtype)


@functools.cache
def decode_rows(group_size: int, head_dim: int, value_dim: int) -> int:
    """Return how many query rows a bf16 token alone needs on this CPU to get the bits it gets in a tile.

    Told by measurement: random heads, as a tile and in fewer rows; where one bit differs, it is the tile's number.

    Args:
        group_size: Query heads of a kv head.
        head_dim: Of queries and keys.
        value_dim: Of values.
    """
    count = min(QUERY_TILE, -(-SAME_ROWS // group_size))
    generator = torch.Generator().manual_seed(0)
    for num_keys in (KEY_TILE, 3 * KEY_TILE, 5 * KEY_TILE):
        shapes = ((QUERY_TILE, 64 * group_size, head_dim), (1, 64, num_keys, head_dim), (1, 64, num_keys, value_dim))
        q, k, v = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
        positions = torch.arange(num_keys - QUERY_TILE, num_keys)
        distance = positions[None, :, None] - torch.arange(num_keys)
        told = []
        for rows in (QUERY_TILE, count):
            mask = tile_mask(distance[:, :rows], None, group_size, q.dtype)
            told.append(attend_rows(q[:rows], k, v, mask, head_dim**-0.5, NO_RULE)[:count])
        if not torch.equal(told[0], told[1]):
            return QUERY_TILE
    return count


def attend_tiles(
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
    """Attend causally in the engine's shape; arguments and result are those of `modelwright.nn.attention.attend`.

    Raises:
        ConfigError: Attention that is not causal self-attention, or that has a mask or a bias.
    """
    if not is_causal or q.shape[1] != k.shape[1] or mask is not None or bias is not None:
        raise ConfigError(
            "The backend 'tiles' computes causal self-attention without a mask or a bias only. Leave attention_mask "
            "out (padding on the right changes nothing before it), unpack the rows, or use 'auto'."
        )
    length, group_size = q.shape[1], q.shape[2] // k.shape[2]
    padded = -(-length // KEY_TILE) * KEY_TILE
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padded - length)) for x in (q, k, v))
    keys, values = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, S, H)
    positions = torch.arange(padded, device=q.device)
    parts = []
    for start in range(0, padded, KEY_TILE):
        stop = start + KEY_TILE
        end = min(stop, -(-length // QUERY_TILE) * QUERY_TILE)
        own = positions[start:end].view(-1, QUERY_TILE)  # (tiles, 4)
        shape = tile_mask(own[..., None] - positions[:stop], rule.window, group_size, q.dtype)
        texts = range(len(q))
        parts.append(torch.stack([_one_text(q[b, start:end], keys[b], values[b], shape, scale, rule) for b in texts]))
    return torch.cat(parts, dim=1)[:, :length]  # (B, T, N, Hv)


def _one_text(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, rule: AttentionRule) -> Tensor:
    """Attend from the tiles of one text to its first keys, as many as the mask has: (rows, N, Hv)."""
    num_tiles, num_keys = mask.shape[0], mask.shape[-1]
    near = [x[None, :, :num_keys].expand(num_tiles, -1, -1, -1) for x in (keys, values)]
    return attend_rows(q, near[0], near[1], mask, scale, rule)
