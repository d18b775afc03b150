"""Latent attention against the paper written out, step by step against the whole, and with heads of two sizes."""

import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.nn.attention import record_attention, use_backend
from modelwright.nn.decode_state import KVState
from modelwright.nn.init import init_weights
from modelwright.nn.latent_attention import LatentAttention, LatentShape
from modelwright.nn.rope import RotaryTable

SHAPE = LatentShape(kv_rank=20, q_rank=24, nope_dim=12, rope_dim=8, value_dim=14)


def make_layer(shape: LatentShape = SHAPE, seed: int = 0, **options) -> LatentAttention:
    return init_weights(LatentAttention(32, 3, shape, **options), seed, std=0.3).eval()


def random_input(length: int = 20) -> torch.Tensor:
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(0))


def written_out(layer: LatentAttention, x: torch.Tensor) -> torch.Tensor:
    """Equations 37 to 47 of the paper, a head and a query at a time, positions as complex numbers."""
    s, length = layer.shape, x.shape[1]
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, s.rope_dim, 2) / s.rope_dim)

    def turn(v):  # (T, rope_dim)
        pairs = torch.view_as_complex(v.reshape(length, -1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)

    rows = []
    for row in x:
        q = layer.q(row) if layer.q is not None else layer.q_up(layer.q_norm(layer.q_down(row)))
        pressed = layer.kv_down(row)
        latent, shared_key = layer.kv_norm(pressed[:, : s.kv_rank]), turn(pressed[:, s.kv_rank :])
        expanded = layer.kv_up(latent).view(length, 3, -1)
        heads = []
        for n in range(3):
            query = q.view(length, 3, -1)[:, n]
            query = torch.cat((query[:, : s.nope_dim], turn(query[:, s.nope_dim :])), 1)
            key = torch.cat((expanded[:, n, : s.nope_dim], shared_key), 1)
            scores = query @ key.T * layer.scale
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
            heads.append(scores.softmax(-1) @ expanded[:, n, s.nope_dim :])
        rows.append(layer.o(torch.cat(heads, 1)))
    return torch.stack(rows)


@pytest.mark.parametrize("shape", [SHAPE, LatentShape(kv_rank=20, nope_dim=12, rope_dim=8, value_dim=30)])
def test_equals_the_equations(shape):
    layer, x = make_layer(shape), random_input()
    rope = RotaryTable(8, 32, 10000.0)
    with torch.no_grad():
        assert (layer(x, rope(20)) - written_out(layer, x)).abs().max() < 1e-5


@pytest.mark.parametrize("backend", ["plain", "sdpa", "flash"])
def test_backends_take_values_of_another_size(backend):
    layer, x, rope = make_layer(), random_input(), RotaryTable(8, 32, 10000.0)
    with torch.no_grad(), use_backend(backend):
        assert (layer(x, rope(20)) - written_out(layer, x)).abs().max() < 1e-5


def test_steps_equal_the_whole_and_store_both_sizes():
    layer, x, rope = make_layer(), random_input(), RotaryTable(8, 32, 10000.0)
    state = KVState(batch_size=2, max_seq_len=32)
    pieces = []
    with torch.no_grad():
        for piece in x.split([7, 1, 1, 11], dim=1):
            positions = state.positions(piece.shape[1])
            pieces.append(layer(piece, rope(0, positions), state=state))
            state.advance(piece.shape[1])
        assert (torch.cat(pieces, 1) - layer(x, rope(20))).abs().max() < 1e-5
    keys, values = state._keys[0]
    assert keys.shape == (2, 32, 3, 20) and values.shape == (2, 32, 3, 14)


def test_maps_can_be_asked_for():
    layer, rope = make_layer(), RotaryTable(8, 32, 10000.0)
    with record_attention() as maps:
        layer(random_input(), rope(20))
    assert maps[0].shape == (2, 3, 20, 20) and torch.allclose(maps[0].sum(-1), torch.ones(2, 3, 20))


def test_scores_depend_on_the_distance_alone():
    layer, x, rope = make_layer(), random_input(), RotaryTable(8, 64, 10000.0)
    with torch.no_grad():
        near = layer(x, rope(0, torch.arange(20)[None]))
        far = layer(x, rope(0, torch.arange(40, 60)[None]))
        assert (near - far).abs().max() < 1e-4
        stretched = layer(x, rope(0, 2 * torch.arange(20)[None]))
        assert (near - stretched).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"rope_dim": 7}, "even number"), ({"kv_rank": 0}, "kv_rank is 0"), ({"q_rank": 0}, "q_rank")],
)
def test_refuses_sizes(changes, match):
    with pytest.raises(ConfigError, match=match):
        LatentShape(**changes)
