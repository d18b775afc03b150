"""RMSNorm against the published implementation written out, and at the edges of bfloat16."""

import pytest
import torch

from modelwright.nn.init import init_weights
from modelwright.nn.norm import RMSNorm, ShiftedRMSNorm


def published(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The Llama norm as transformers has it."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_equals_the_published_norm(dtype, tolerance):
    torch.manual_seed(0)
    norm = RMSNorm(96, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight += torch.randn(96).to(dtype)
    x = (torch.randn(4, 7, 96) * 5).to(dtype)
    expected = published(x, norm.weight, 1e-5)
    assert norm(x).dtype == dtype
    assert ((norm(x) - expected).abs() <= tolerance * expected.abs() + tolerance).all()


def test_statistics_are_float32():
    """In bfloat16 arithmetic the mean of 4,096 squares of 0.1 would stop growing early."""
    x = torch.full((1, 4096), 0.1, dtype=torch.bfloat16)
    assert torch.allclose(RMSNorm(4096).to(torch.bfloat16)(x).float(), torch.ones(1, 4096), atol=1e-2)
    large = torch.full((1, 8), 3e20, dtype=torch.bfloat16)  # its square overflows float32: zero, never NaN
    assert not RMSNorm(8).to(torch.bfloat16)(large).isnan().any()


def test_gradient():
    norm = RMSNorm(6).double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shifted_norm_is_rounded_once(dtype):
    """Gemma's order: float32 until after the scaling. Llama's order, or 1 + w in bfloat16, would differ."""
    torch.manual_seed(0)
    norm = ShiftedRMSNorm(96, eps=1e-6).to(dtype)
    with torch.no_grad():
        norm.weight += (0.3 * torch.randn(96)).to(dtype)
    x = (torch.randn(4, 7, 96) * 5).to(dtype)
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + norm.weight.float())
    assert norm(x).dtype == dtype
    assert torch.equal(norm(x), h.to(dtype)) or (norm(x).float() - h).abs().max() < 1e-6 * h.abs().max()
    if dtype == torch.bfloat16:
        assert not torch.equal(norm(x), published(x, 1 + norm.weight, 1e-6))


def test_a_shifted_norm_begins_as_one():
    norm = ShiftedRMSNorm(8)
    norm.weight.data.fill_(float("nan"))
    init_weights(norm, 0)
    assert not norm.weight.any()
    assert torch.allclose(norm(torch.ones(8)), torch.ones(8))
