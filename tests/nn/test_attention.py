"""Attention: fast against plain, masks that compose, and the dense decode state."""

import pytest
import torch

from modelwright.base.errors import ConfigError, RequestError
from modelwright.nn.attention import Attention, attend, attend_plain, attend_products, causal_mask, padding_mask
from modelwright.nn.decode_state import KVState
from modelwright.nn.rope import RotaryTable

SCALE = 0.3


def qkv(batch=2, queries=9, keys=9, heads=6, kv_heads=2, size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    return [torch.randn(batch, t, n, size, generator=generator).to(dtype) for t, n in shapes]


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("masking", ["none", "causal", "mask", "both"])
def test_fast_equals_plain(kv_heads, masking):
    q, k, v = qkv(kv_heads=kv_heads)
    mask = (torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(1)) > 0.4) | torch.eye(9, dtype=torch.bool)
    is_causal = masking in ("causal", "both")
    given = mask if masking in ("mask", "both") else None
    total = torch.ones(9, 9, dtype=torch.bool) if given is None else given
    total = total & causal_mask(9, 9, q.device) if is_causal else total
    expected = attend_plain(q, k, v, scale=SCALE, mask=total)
    found = attend(q, k, v, scale=SCALE, mask=given, is_causal=is_causal)
    assert found.shape == q.shape
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("length", [1, 128, 129, 300])
@pytest.mark.parametrize("masking", ["none", "keys", "rows"])
def test_products_in_blocks_equal_plain_forward_and_backward(kv_heads, length, masking):
    generator = torch.Generator().manual_seed(1)
    mask = None
    if masking == "keys":  # (B, 1, 1, S)
        mask = torch.rand(2, 1, 1, length, generator=generator) > 0.4
        mask[..., 0] = True
    elif masking == "rows":  # (1, 1, T, S)
        mask = (torch.rand(1, 1, length, length, generator=generator) > 0.4) | torch.eye(length, dtype=torch.bool)
    causal = causal_mask(length, length, torch.device("cpu"))
    results = []
    for path in (
        lambda *x: attend_plain(*x, scale=SCALE, mask=causal if mask is None else mask & causal),
        lambda *x: attend_products(*x, scale=SCALE, mask=mask),
        lambda *x: attend(*x, scale=SCALE, mask=mask, is_causal=True),
    ):
        leaves = [x.requires_grad_() for x in qkv(queries=length, keys=length, kv_heads=kv_heads)]
        out = path(*leaves)
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    for result in results[1:]:
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(result, results[0], strict=True))


def test_bfloat16_is_near_plain():
    q, k, v = qkv(dtype=torch.bfloat16)
    found = attend(q, k, v, scale=SCALE, is_causal=True)
    expected = attend_plain(q, k, v, scale=SCALE, mask=causal_mask(9, 9, q.device))
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected.float()).abs().max() < 0.03


def test_heads_share_the_right_keys():
    """Six query heads over two key/value heads: 0-2 read the first, 3-5 the second."""
    q, k, v = qkv()
    v = v.clone()
    v[:, :, 1] = 0
    out = attend(q, k, v, scale=SCALE)
    assert (out[:, :, 3:] == 0).all() and (out[:, :, :3] != 0).all()


def test_padding_rows_stay_finite():
    mask = padding_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])) & causal_mask(4, 4, torch.device("cpu"))
    assert mask[0, 0].tolist() == [
        [True, False, False, False],
        [False, True, False, False],
        [False, False, True, False],
        [False, False, True, True],
    ]
    q, k, v = qkv(queries=4, keys=4)
    assert torch.isfinite(attend(q, k, v, scale=SCALE, mask=mask)).all()


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_decode_state_equals_the_whole_sequence(kv_heads):
    torch.manual_seed(0)
    layer = Attention(48, 6, kv_heads, 8, layer_index=1, bias=True)
    table = RotaryTable(8, 32, 10000.0)
    x = torch.randn(3, 20, 48)
    state = KVState(batch_size=3, max_seq_len=20)
    with torch.no_grad():
        whole = layer(x, table(20))
        pieces = []
        for piece in x.split([5, 1, 6, 1, 1, 6], dim=1):
            start = state.lengths.get(1, 0)
            positions = torch.arange(start, start + piece.shape[1]).expand(3, -1)
            pieces.append(layer(piece, table(piece.shape[1], positions), state=state))
    assert (torch.cat(pieces, dim=1) - whole).abs().max() < 1e-5
    assert state.lengths == {1: 20}


def test_decode_state_refuses_what_does_not_fit():
    q, k, v = qkv(kv_heads=6)
    state = KVState(batch_size=2, max_seq_len=8)
    with pytest.raises(RequestError, match="reaches 9 tokens; this state holds 8"):
        state.attend(0, q, k, v, SCALE)
    with pytest.raises(ConfigError, match="must be at least 1"):
        KVState(batch_size=0, max_seq_len=8)


def test_biases_are_where_they_were_asked_for():
    def has(layer):
        return [p.bias is not None for p in (layer.q, layer.k, layer.v, layer.o)]

    assert has(Attention(8, 2, 1, 4)) == [False] * 4
    assert has(Attention(8, 2, 1, 4, bias=True)) == [True] * 4
    assert has(Attention(8, 2, 1, 4, bias=True, output_bias=False)) == [True, True, True, False]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_products_equal_the_plain_twin_with_gradients(num_heads, num_kv_heads):
    torch.manual_seed(0)
    shapes = ((2, 9, num_heads, 8), (2, 9, num_kv_heads, 8), (2, 9, num_kv_heads, 8))
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    mask = causal_mask(9, 9, torch.device("cpu"))
    fast = attend(q, k, v, scale=0.3, is_causal=True)
    plain = attend_plain(q, k, v, scale=0.3, mask=mask)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(plain)
    for a, b in zip(
        torch.autograd.grad((fast * weights).sum(), (q, k, v)),
        torch.autograd.grad((plain * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
