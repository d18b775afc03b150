"""Looking back: the same whatever the pieces, nothing across a document's start, padding passed over."""

import pytest
import torch

from modelwright.nn.init import init_weights
from modelwright.nn.past import CausalConv, Segments, look_back


def rows(batch=2, length=23, channels=5, seed=0):
    return torch.randn(batch, length, channels, generator=torch.Generator().manual_seed(seed))


def conv(num_taps=4, bias=True):
    return init_weights(CausalConv(5, num_taps, bias), 1)


def test_lags_are_the_tokens_before():
    x = rows()
    one, two = look_back(x, 2)
    assert torch.equal(one[:, 1:], x[:, :-1]) and torch.equal(two[:, 2:], x[:, :-2])
    assert (one[:, 0] == 0).all() and (two[:, :2] == 0).all()


@pytest.mark.parametrize("num_taps", [1, 2, 4])
def test_convolution_equals_the_sum_written_out(num_taps):
    x, layer = rows(), conv(num_taps)
    y = layer(x)
    for t in range(x.shape[1]):
        expected = layer.bias.clone()
        for lag in range(min(num_taps, t + 1)):
            expected = expected + layer.weight[:, 0, num_taps - 1 - lag] * x[:, t - lag]
        assert torch.allclose(y[:, t], expected, atol=1e-6)


@pytest.mark.parametrize("pieces", [[23], [1] * 23, [2, 9, 1, 11], [22, 1]])
def test_any_split_equals_the_whole(pieces):
    x, layer = rows(), conv()
    starts = torch.zeros(2, 23, dtype=torch.bool)
    starts[0, [0, 4, 5, 17]], starts[1, [10]] = True, True
    for given in (None, starts):
        whole = layer(x, segments=Segments(given))
        memory: dict[str, torch.Tensor] = {}
        cut = None if given is None else given.split(pieces, 1)
        parts = [
            layer(piece, memory=memory, segments=Segments(None if cut is None else cut[i]))
            for i, piece in enumerate(x.split(pieces, 1))
        ]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-6)


def test_a_document_sees_nothing_before_its_start():
    x, layer = rows(), conv()
    starts = torch.zeros(2, 23, dtype=torch.bool)
    starts[:, 9] = True
    packed = layer(x, segments=Segments(starts))
    assert torch.allclose(packed[:, :9], layer(x[:, :9]), atol=1e-6)
    assert torch.allclose(packed[:, 9:], layer(x[:, 9:]), atol=1e-6)
    assert (layer(x)[:, 9:12] - packed[:, 9:12]).abs().max() > 1e-2  # negative control


@pytest.mark.parametrize("seed", range(4))
def test_padding_anywhere_is_passed_over(seed):
    generator = torch.Generator().manual_seed(seed)
    x, layer = rows(seed=seed), conv()
    is_token = torch.rand(2, 23, generator=generator) < 0.7
    starts = torch.rand(2, 23, generator=generator) < 0.1
    memory: dict[str, torch.Tensor] = {}
    parts = [
        layer(x[:, at], memory=memory, segments=Segments(starts[:, at], is_token[:, at]))
        for at in (slice(0, 8), slice(8, 15), slice(15, 23))
    ]
    padded = torch.cat(parts, 1)
    for row in range(2):
        keep = is_token[row]
        alone = layer(x[row][keep][None], segments=Segments(starts[row][keep][None]))
        assert torch.allclose(padded[row][keep], alone[0], atol=1e-6)


def test_first_taps_lie_within_their_bound():
    layer = init_weights(CausalConv(4000, 4), 0)
    assert layer.weight.abs().max() <= 0.5 and layer.weight.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.05)
    assert (layer.bias == 0).all()
