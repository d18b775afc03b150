"""RWKV-4: the chunked form equals the sequential one, no key is too large or small, the layers split, pack and pad."""

import math

import pytest
import torch

from modelwright.nn.decode_state import KVState
from modelwright.nn.init import init_weights
from modelwright.nn.past import Segments
from modelwright.nn.rwkv import ChannelMix, Past, TimeMix, wkv, wkv_sequential


def problem(length, batch=2, width=5, spread=1.0):
    g = torch.Generator().manual_seed(length)
    k, v = (torch.randn(batch, length, width, generator=g) for _ in range(2))
    w, u = torch.exp(torch.linspace(-5, 3, width)), torch.randn(width, generator=g)
    num, top = torch.randn(batch, width, generator=g), torch.randn(batch, width, generator=g)
    den = torch.rand(batch, width, generator=g) + 0.5
    starts = torch.rand(batch, length, generator=g) < 0.1
    return [t.requires_grad_() for t in (k * spread, v, w, u, num, den)], top, starts


def outcome(scan, length, with_starts, spread=1.0, **options):
    (k, v, w, u, num, den), top, starts = problem(length, spread=spread)
    k = k.detach().requires_grad_()
    starts = starts if with_starts else None
    given = {"starts": starts} if scan is wkv_sequential else {"segments": Segments(starts)}
    y, past = scan(k, v, w, u, past=Past(num, den, top), **given, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    quotient = past.num / past.den  # what of the sums does not depend on the maximum they are divided by
    ((y * weights).sum() + quotient.square().sum()).backward()
    return [y, quotient, *(t.grad for t in (k, v, w, u, num, den))]


@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 16, 63, 64, 65, 130])
def test_chunked_equals_sequential_in_value_and_gradient(length, with_starts):
    expected = outcome(wkv_sequential, length, with_starts)
    for size in (None, 1, 5, 16, 200):
        for mine, wanted in zip(outcome(wkv, length, with_starts, chunk_size=size), expected, strict=True):
            assert (mine - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item())


def test_sequential_equals_the_formula_written_out():
    (k, v, w, u, _, _), _, _ = problem(12)
    y, _ = wkv_sequential(k, v, w, u)
    for t in range(12):
        weights = [torch.exp(-(t - 1 - s) * w + k[:, s]) for s in range(t)] + [torch.exp(u + k[:, t])]
        expected = sum(a * v[:, s] for s, a in enumerate(weights)) / sum(weights)
        assert torch.allclose(y[:, t], expected, atol=1e-5)


def test_keys_of_any_size_give_finite_results():
    for spread in (1e3, 1e6):
        for mine, wanted in zip(outcome(wkv, 64, True, spread), outcome(wkv_sequential, 64, True, spread), strict=True):
            assert torch.isfinite(mine).all()
            assert (mine - wanted).abs().max() <= 1e-4 * max(1.0, wanted.abs().max().item())
    assert not torch.isfinite(torch.exp(1e3 * problem(64)[0][0])).all()  # negative control: without the maximum


def test_a_first_key_far_below_zero_still_counts():
    """With a first maximum of 0 instead of -1e38 the first token's weight would vanish and 0 / 0 follow."""
    k, v = torch.full((1, 3, 1), -1e4), torch.tensor([[[5.0], [5.0], [5.0]]])
    for scan in (wkv, wkv_sequential):
        assert torch.allclose(scan(k, v, torch.ones(1), torch.zeros(1))[0], v)


@pytest.fixture(params=[TimeMix, ChannelMix])
def layer(request):
    torch.manual_seed(0)
    layer = init_weights(request.param(8, 12, layer_index=0, num_layers=2), 3, std=0.5)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn(p.shape)
    return layer


def rows(length=29, seed=0):
    return torch.randn(2, length, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pieces", [[1] * 29, [7, 1, 1, 20], [28, 1]])
def test_any_split_equals_the_whole(layer, pieces):
    x, starts = rows(), torch.zeros(2, 29, dtype=torch.bool)
    starts[0, 6], starts[1, [2, 20]] = True, True
    with torch.no_grad():
        for given in (None, starts):
            whole = layer(x, segments=Segments(given))
            state = KVState(batch_size=2, max_seq_len=32)
            cut = [None] * len(pieces) if given is None else given.split(pieces, 1)
            parts = [
                layer(piece, state=state, segments=Segments(start))
                for piece, start in zip(x.split(pieces, 1), cut, strict=True)
            ]
            assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_packed_documents_equal_separate_ones(layer):
    x, starts = rows(), torch.zeros(2, 29, dtype=torch.bool)
    starts[:, [0, 11, 12]] = True
    with torch.no_grad():
        packed = layer(x, segments=Segments(starts))
        alone = torch.cat([layer(x[:, at]) for at in (slice(0, 11), slice(11, 12), slice(12, 29))], 1)
        assert torch.allclose(packed, alone, atol=1e-5)
        assert (layer(x) - alone).abs().max() > 1e-2  # negative control


@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_is_inert_for_outputs_and_state(layer, side):
    x = rows()
    is_token = torch.ones(2, 29, dtype=torch.bool)
    is_token[0, {"left": slice(0, 9), "right": slice(20, 29), "between": slice(9, 18)}[side]] = False
    state, other = KVState(batch_size=2, max_seq_len=64), KVState(batch_size=1, max_seq_len=64)
    following = rows(5, seed=1)
    with torch.no_grad():
        padded = layer(x, state=state, segments=Segments(is_token=is_token))
        alone = layer(x[:1, is_token[0]], state=other)
        assert torch.allclose(padded[:1, is_token[0]], alone, atol=1e-5)
        assert torch.allclose(layer(following, state=state)[:1], layer(following[:1], state=other), atol=1e-5)


def test_first_values_are_the_published_ones():
    first, last = (init_weights(TimeMix(8, 8, layer_index=i, num_layers=3), 0) for i in (0, 2))
    assert first.time_decay[[0, -1]].tolist() == pytest.approx([-5.0, 3.0])
    assert last.time_decay[3] < first.time_decay[3]  # deeper layers remember longer
    assert first.time_first[:3].tolist() == pytest.approx([math.log(0.3), math.log(0.3) + 0.5, math.log(0.3) - 0.5])
    assert first.mix_key[0, 0, 4].item() == pytest.approx(0.5) and (first.output.weight == 0).all()
