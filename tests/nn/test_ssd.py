"""Mamba-2: the chunked scan equals the sequential one in value and gradient, and the layer splits, packs and pads."""

import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.nn.decode_state import KVState
from modelwright.nn.init import init_weights
from modelwright.nn.past import Segments
from modelwright.nn.ssd import GatedNorm, Mamba2Mixer, SsdShape, segment_sum, ssd, ssd_sequential


def problem(length, batch=2, heads=4, channels=3, groups=2, size=5):
    g = torch.Generator().manual_seed(length)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    x, B, C = (
        draw(batch, length, heads, channels),
        draw(batch, length, groups, size),
        draw(batch, length, groups, size),
    )
    dt = torch.nn.functional.softplus(draw(batch, length, heads) - 1)
    A, state = -torch.exp(draw(heads)), draw(batch, heads, channels, size)
    return [t.requires_grad_() for t in (x, dt, A, B, C, state)], torch.rand(batch, length, generator=g) < 0.1


def outcome(scan, length, with_starts, **options):
    (x, dt, A, B, C, state), starts = problem(length)
    y, last = scan(x, dt, A, B, C, state=state, starts=starts if with_starts else None, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    ((y * weights).sum() + last.square().sum()).backward()
    return [y, last, *(t.grad for t in (x, dt, A, B, C, state))]


@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 16, 63, 64, 65, 130])
def test_chunked_equals_sequential_in_value_and_gradient(length, with_starts):
    expected = outcome(ssd_sequential, length, with_starts)
    for size in (1, 5, 16, 64, 200):
        for mine, wanted in zip(outcome(ssd, length, with_starts, chunk_size=size), expected, strict=True):
            assert (mine - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item())


def test_strong_decay_keeps_its_digits_and_stays_finite():
    (x, _, _, B, C, _), starts = problem(256)
    dt = torch.ones(2, 256, 4, requires_grad=True)
    A = torch.tensor([-0.001, -1.0, -16.0, -200.0], requires_grad=True)
    y, last = ssd(x, dt, A, B, C, starts=starts, chunk_size=128)
    expected, _ = ssd_sequential(x, dt, A, B, C, starts=starts)
    assert (y - expected).abs().max() < 1e-4
    y.sum().backward()
    assert all(torch.isfinite(t).all() for t in (y, last, dt.grad, A.grad, x.grad))


def test_sums_over_stretches_are_not_differences_of_running_sums():
    values = torch.full((128,), -300.0)
    values[-1] = -1e-3
    assert segment_sum(values)[127, 126].item() == pytest.approx(-1e-3)
    running = values.cumsum(0)  # negative control: 38,000 swallows a thousandth
    assert (running[127] - running[126]).item() != pytest.approx(-1e-3, rel=0.1)


def test_gated_norm_gates_first_and_norms_each_group_alone():
    layer = init_weights(GatedNorm(8, 2, 1e-5), 0)
    x, gate = torch.randn(3, 8), torch.randn(3, 8)
    gated = x * torch.nn.functional.silu(gate)
    halves = [half / (half.square().mean(-1, keepdim=True) + 1e-5).sqrt() for half in gated.split(4, dim=-1)]
    assert torch.allclose(layer(x, gate), torch.cat(halves, -1), atol=1e-6)


@pytest.fixture(params=[1, 2], ids=["one group", "two groups"])
def mixer(request):
    shape = SsdShape(num_heads=4, head_dim=4, state_size=5, num_groups=request.param, chunk_size=8)
    return init_weights(Mamba2Mixer(8, shape), 3, std=0.5)


def rows(length=29, seed=0):
    return torch.randn(2, length, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pieces", [[1] * 29, [7, 1, 1, 20], [28, 1]])
def test_any_split_equals_the_whole(mixer, pieces):
    x, starts = rows(), torch.zeros(2, 29, dtype=torch.bool)
    starts[0, 6], starts[1, [2, 20]] = True, True
    with torch.no_grad():
        whole = mixer(x, segments=Segments(starts))
        state = KVState(batch_size=2, max_seq_len=32)
        parts = [
            mixer(piece, state=state, segments=Segments(cut))
            for piece, cut in zip(x.split(pieces, 1), starts.split(pieces, 1), strict=True)
        ]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_packed_documents_equal_separate_ones(mixer):
    x, starts = rows(), torch.zeros(2, 29, dtype=torch.bool)
    starts[:, [0, 11, 12]] = True
    with torch.no_grad():
        packed = mixer(x, segments=Segments(starts))
        alone = torch.cat([mixer(x[:, at]) for at in (slice(0, 11), slice(11, 12), slice(12, 29))], 1)
        assert torch.allclose(packed, alone, atol=1e-5)
        assert (mixer(x) - alone).abs().max() > 1e-2  # negative control


@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_is_inert_for_outputs_and_state(mixer, side):
    x = rows()
    is_token = torch.ones(2, 29, dtype=torch.bool)
    is_token[0, {"left": slice(0, 9), "right": slice(20, 29), "between": slice(9, 18)}[side]] = False
    state, other = KVState(batch_size=2, max_seq_len=64), KVState(batch_size=1, max_seq_len=64)
    following = rows(5, seed=1)
    with torch.no_grad():
        padded = mixer(x, state=state, segments=Segments(is_token=is_token))
        alone = mixer(x[:1, is_token[0]], state=other)
        assert torch.allclose(padded[:1, is_token[0]], alone, atol=1e-5)
        assert torch.allclose(mixer(following, state=state)[:1], mixer(following[:1], state=other), atol=1e-5)


def test_first_values_are_the_published_ones():
    layer = init_weights(Mamba2Mixer(8, SsdShape(num_heads=2048, head_dim=1, state_size=1)), 0)
    rates, steps = layer.A_log.exp(), torch.nn.functional.softplus(layer.dt_bias)
    assert 1 <= rates.min() and rates.max() <= 16 and rates.mean().item() == pytest.approx(8.5, rel=0.05)
    assert 0.9e-3 <= steps.min() and steps.max() <= 0.101


def test_contradictory_shapes_are_refused():
    with pytest.raises(ConfigError, match="num_heads 6 and num_groups 4"):
        SsdShape(num_heads=6, num_groups=4)
    with pytest.raises(ConfigError, match="step_limit is"):
        SsdShape(num_heads=4, step_limit=(1.0, 0.5))
    with pytest.raises(ConfigError, match="state_size of a Mamba-2 layer is 0"):
        SsdShape(num_heads=4, state_size=0)
