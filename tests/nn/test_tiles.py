"""The rows that a token alone is computed in: the bits of a tile, in no more rows than these need."""

import pytest
import torch
from tests.engine.conftest import needs_bf16

from modelwright.nn.attention import NO_RULE
from modelwright.nn.tiles import KEY_TILE, QUERY_TILE, SAME_ROWS, attend_rows, decode_rows, tile_mask

NUM_KV_HEADS = 128


def attended(rows: int, place: int, group_size: int, head_dim: int, num_keys: int) -> torch.Tensor:
    """Return what the token at a place of the last tile sees, computed with so many rows."""
    generator = torch.Generator().manual_seed(num_keys)
    q = torch.randn(QUERY_TILE, NUM_KV_HEADS * group_size, head_dim, generator=generator).bfloat16()
    k, v = (torch.randn(1, NUM_KV_HEADS, num_keys, head_dim, generator=generator).bfloat16() for _ in range(2))
    first = num_keys - QUERY_TILE
    positions = torch.arange(first, num_keys) if rows == QUERY_TILE else first + place + torch.arange(rows)
    distance = positions[None, :, None] - torch.arange(num_keys)
    mask = tile_mask(distance, None, group_size, q.dtype)
    # As the engine fills a tile: a missing row takes the token's own query.
    taken = q if rows == QUERY_TILE else q[place : place + 1].expand(rows, -1, -1)
    out = attend_rows(taken, k, v, mask, head_dim**-0.5, NO_RULE)
    return out[place if rows == QUERY_TILE else 0]


@needs_bf16
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_a_token_alone_has_the_bits_of_its_tile(group_size: int, head_dim: int):
    rows = decode_rows(group_size, head_dim, head_dim)
    assert rows <= QUERY_TILE and (rows == QUERY_TILE or rows * group_size >= SAME_ROWS)
    for num_keys in (KEY_TILE, 2 * KEY_TILE, 5 * KEY_TILE):
        for place in range(QUERY_TILE):
            alone = attended(rows, place, group_size, head_dim, num_keys)
            assert torch.equal(alone, attended(QUERY_TILE, place, group_size, head_dim, num_keys)), (num_keys, place)


@needs_bf16
def test_fewer_rows_than_that_round_otherwise():
    """The control: if a single row had a tile's bits too, nobody would need to measure."""
    sizes = (1, 64, 5 * KEY_TILE)
    if decode_rows(2, 64, 64) == QUERY_TILE:
        pytest.skip("this CPU's products differ with the rows throughout")
    differing = [not torch.equal(attended(1, p, *sizes), attended(QUERY_TILE, p, *sizes)) for p in range(QUERY_TILE)]
    assert any(differing)
