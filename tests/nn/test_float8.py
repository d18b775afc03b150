"""Linear layers in 8 bits: near to the exact ones, by products of what 8 bits hold; gone again when asked."""

import pytest
import torch
from torch import nn

from modelwright.nn.float8 import BACKWARD, FORWARD, Float8Linear, leave_float8, to_float8, use_float8


@pytest.mark.parametrize(("dtype", "step"), [(FORWARD, 2**-4), (BACKWARD, 2**-3)])
def test_rounding_keeps_the_largest_and_half_a_step_of_the_rest(dtype, step):
    torch.manual_seed(0)
    x = torch.randn(64, 64) * 1e-5
    rounded, factor = to_float8(x, dtype)
    back = rounded.float() * factor
    assert float(back.abs().max()) == pytest.approx(float(x.abs().max()), rel=1e-6)
    large = x.abs() > 0.05 * x.abs().max()
    assert ((back - x).abs() / x.abs())[large].max() <= step * 1.01


def test_output_and_gradients_are_near_the_exact_ones():
    torch.manual_seed(0)
    exact = nn.Linear(64, 48)
    eight = nn.Linear(64, 48)
    eight.load_state_dict(exact.state_dict())
    assert use_float8(nn.ModuleDict({"inner": eight, "lm_head": nn.Linear(16, 16), "odd": nn.Linear(10, 16)})) == [
        "inner"
    ]
    assert type(eight) is Float8Linear
    x = torch.randn(2, 16, 64, requires_grad=True)
    weight = torch.randn(2, 16, 48)
    results = []
    for layer in (exact, eight):
        y = layer(x)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [x, layer.weight, layer.bias])])
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert float((a - b).norm() / a.norm()) < 0.08  # e5m2 has two bits of fraction: steps of 1/8 to 1/4
    assert not torch.equal(results[0][0], results[1][0])
    holder = nn.Sequential(eight)
    leave_float8(holder)
    assert type(eight) is nn.Linear and torch.equal(eight(x), exact(x))


def test_a_number_of_rows_that_does_not_fit_is_computed_exactly():
    layer = nn.Linear(16, 16)
    x = torch.randn(3, 16)
    expected = layer(x)
    use_float8(nn.Sequential(layer))
    assert torch.equal(layer(x), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_products_of_the_gpu_are_those_of_the_rounded_factors():
    torch.manual_seed(0)
    layers = [nn.Linear(64, 48, bias=False) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    use_float8(nn.ModuleList(layers))
    x = torch.randn(32, 64)
    found = layers[1].cuda()(x.cuda()).cpu()
    torch.testing.assert_close(found, layers[0](x), rtol=2e-2, atol=2e-2)
