"""The feed-forward layers against their formulas written out."""

import torch

from modelwright.nn.mlp import GatedMlp, Mlp


def test_swiglu_is_its_formula():
    torch.manual_seed(0)
    layer, x = GatedMlp(6, 10, bias=True), torch.randn(2, 3, 6)
    gate, up = layer.gate(x), layer.up(x)
    expected = layer.down(gate / (1 + torch.exp(-gate)) * up)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert GatedMlp(6, 10).up.bias is None


def test_gelu_is_the_exact_one():
    torch.manual_seed(0)
    layer, x = Mlp(6, 10), torch.randn(2, 3, 6) * 3
    h = layer.up(x)
    exact = 0.5 * h * (1 + torch.erf(h / 2**0.5))
    assert torch.allclose(layer(x), layer.down(exact), atol=1e-6)
