"""Selective scan: chunked equals sequential, finite where the naive scan is not; the layer splits, packs and pads."""

import pytest
import torch

from modelwright.nn.decode_state import KVState
from modelwright.nn.init import init_weights
from modelwright.nn.past import Segments
from modelwright.nn.ssm import MambaMixer, TimeInvariantMixer, selective_scan, selective_scan_sequential

LENGTHS = [1, 2, 7, 16, 63, 64, 65, 130]


def problem(length, batch=2, inner=6, size=4, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)  # noqa: E731
    x, B, C = draw(batch, length, inner), draw(batch, length, size), draw(batch, length, size)
    dt = torch.nn.functional.softplus(draw(batch, length, inner) - 1)
    A = -torch.exp(draw(inner, size))
    state = draw(batch, inner, size)
    starts = torch.rand(batch, length, generator=g) < 0.1
    return [t.requires_grad_() for t in (x, dt, A, B, C, state)], starts


def outcome(scan, length, with_starts, **options):
    """Outputs, last state and every gradient of a scan."""
    (x, dt, A, B, C, state), starts = problem(length)
    y, last = scan(x, dt, A, B, C, state=state, starts=starts if with_starts else None, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    ((y * weights).sum() + last.square().sum()).backward()
    return [y, last, *(t.grad for t in (x, dt, A, B, C, state))]


@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_sequential_in_value_and_gradient(length, with_starts):
    expected = outcome(selective_scan_sequential, length, with_starts)
    for size in (None, 1, 5, 16, 200):
        for mine, wanted in zip(outcome(selective_scan, length, with_starts, chunk_size=size), expected, strict=True):
            assert (mine - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item())


def test_gradients_equal_finite_differences():
    inputs, starts = problem(7, batch=1, inner=2, size=2, dtype=torch.float64)
    x, dt, A, B, C, state = (t.detach().float() for t in inputs)
    direction = torch.randn(A.shape, generator=torch.Generator().manual_seed(2))

    def loss(a):
        return selective_scan(x, dt, a, B, C, state=state, starts=starts, chunk_size=3)[0].sum()

    A.requires_grad_()
    loss(A).backward()
    with torch.no_grad():
        numeric = (loss(A + 1e-2 * direction) - loss(A - 1e-2 * direction)) / 2e-2
    assert (A.grad * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-2)


def test_strong_decay_stays_finite_where_dividing_by_the_product_does_not():
    (x, _, _, B, C, _), _ = problem(256)
    dt = torch.ones_like(x, requires_grad=True)
    A = torch.full((6, 4), -16.0, requires_grad=True)
    y, last = selective_scan(x, dt, A, B, C)
    expected, _ = selective_scan_sequential(x, dt, A, B, C)
    assert torch.allclose(y, expected, atol=1e-5)
    y.sum().backward()
    assert all(torch.isfinite(t).all() for t in (y, last, dt.grad, A.grad, x.grad))
    left = torch.exp((dt[..., None] * A).cumsum(1))  # negative control: the scan found in many a blog
    naive = left * ((dt * x)[..., None] * B[:, :, None] / left).cumsum(1)
    assert not torch.isfinite(naive).all()


def test_a_step_of_zero_leaves_the_state_alone():
    (x, dt, A, B, C, state), _ = problem(9)
    dt = torch.zeros_like(dt)
    _, last = selective_scan(x, dt, A, B, C, state=state)
    assert torch.equal(last, state)


@pytest.fixture(params=[MambaMixer, TimeInvariantMixer], ids=["selective", "time-invariant"])
def mixer(request):
    return init_weights(request.param(8, 16, 4), 3, std=0.5)


def rows(length=29, seed=0):
    return torch.randn(2, length, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pieces", [[1] * 29, [7, 1, 1, 20], [28, 1]])
def test_any_split_equals_the_whole(mixer, pieces):
    x, starts = rows(), torch.zeros(2, 29, dtype=torch.bool)
    starts[0, 6], starts[1, [2, 20]] = True, True
    with torch.no_grad():
        for given in (None, starts):
            whole = mixer(x, segments=Segments(given))
            state = KVState(batch_size=2, max_seq_len=32)
            cut = [None] * len(pieces) if given is None else given.split(pieces, 1)
            parts = [
                mixer(piece, state=state, segments=Segments(start))
                for piece, start in zip(x.split(pieces, 1), cut, strict=True)
            ]
            assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_packed_documents_equal_separate_ones(mixer):
    x, starts = rows(), torch.zeros(2, 29, dtype=torch.bool)
    starts[:, [0, 11, 12]] = True
    with torch.no_grad():
        packed = mixer(x, segments=Segments(starts))
        alone = torch.cat([mixer(x[:, at]) for at in (slice(0, 11), slice(11, 12), slice(12, 29))], 1)
        assert torch.allclose(packed, alone, atol=1e-5)
        assert (mixer(x) - alone).abs().max() > 1e-2  # negative control: without the starts the state leaks


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
    layer = init_weights(MambaMixer(64, 2048, 16), 0)
    assert torch.allclose(layer.A_log.exp()[3], torch.arange(1.0, 17.0)) and (layer.D == 1).all()
    steps = torch.nn.functional.softplus(layer.step.bias)
    assert 0.9e-3 <= steps.min() and steps.max() <= 0.101
    assert steps.log().mean().item() == pytest.approx((-4.605 * 2 + 0.0) / 2, abs=0.15)  # even in the logarithm
    assert layer.step.weight.abs().max() <= layer.step_rank**-0.5


def test_only_the_selective_layer_is_more_than_a_convolution():
    """Doubling one token's input doubles what the time-invariant scan makes of it, and not what the selective makes."""
    for kind, is_linear in ((MambaMixer, False), (TimeInvariantMixer, True)):
        layer = init_weights(kind(8, 16, 4), 3)
        x = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))

        def scan(values, layer=layer):
            dt, B, C = layer.steps_and_gates(values)
            return selective_scan(values, dt, -layer.A_log.exp(), B, C)[0]

        with torch.no_grad():
            difference = (scan(2 * x) - 2 * scan(x)).norm() / scan(x).norm()
        assert (difference < 1e-5) == is_linear
