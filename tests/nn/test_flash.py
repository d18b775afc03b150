"""FlashAttention in plain PyTorch: equal to the readable twin, forward and backward, and memory linear in length."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modelwright.base.errors import ConfigError
from modelwright.nn import flash
from modelwright.nn.attention import AttentionRule, attend_plain, use_backend
from modelwright.nn.flash import attend_triton, flash_attend

SCALE = 0.3


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles that do not divide the lengths, so that every kind of tile occurs in a small case."""
    monkeypatch.setattr(flash, "QUERY_TILE", 8)
    monkeypatch.setattr(flash, "KEY_TILE", 12)


def tensors(num_queries=37, num_keys=37, num_heads=4, num_kv_heads=2, size=8, value_size=8, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = ((num_queries, num_heads, size), (num_keys, num_kv_heads, size), (num_keys, num_kv_heads, value_size))
    return [torch.randn(2, *shape, dtype=dtype, requires_grad=True) for shape in shapes]


def compare(q, k, v, tolerance=1e-5, **given):
    """Both results and every gradient, with respect to a random direction."""
    extra = [x for x in (given.get("bias"), given.get("rule", AttentionRule()).sinks) if x is not None]
    wanted = [q, k, v, *(x for x in extra if x.requires_grad)]
    found = []
    for function in (flash_attend, attend_plain):
        out = function(q, k, v, scale=SCALE, **given)
        up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        found.append((out, *torch.autograd.grad(out, wanted, up)))
    for ours, plain in zip(*found, strict=True):
        assert ours.shape == plain.shape and ours.dtype == plain.dtype
        assert float((ours - plain).detach().abs().max()) < tolerance * max(1.0, float(plain.detach().abs().max()))


def some_mask(*shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[..., 0] = True  # the plain twin needs a key for every row
    return mask


CASES = {
    "everything": {},
    "causal": {"is_causal": True},
    "causal window": {"is_causal": True, "rule": AttentionRule(window=5)},
    "window of one": {"is_causal": True, "rule": AttentionRule(window=1)},
    "window longer than the row": {"is_causal": True, "rule": AttentionRule(window=100)},
    "window to both sides": {"rule": AttentionRule(window=9)},
    "padding": {"mask": some_mask(2, 1, 1, 37)},
    "mask for all heads": {"mask": some_mask(2, 1, 37, 37)},
    "mask for each head": {"mask": some_mask(2, 4, 37, 37)},
    "mask of two axes": {"mask": some_mask(37, 37)},
    "mask and causal": {"mask": some_mask(1, 1, 37, 37), "is_causal": True},
    "soft-cap": {"is_causal": True, "rule": AttentionRule(softcap=0.7)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_equals_plain_forward_and_backward(case, num_kv_heads):
    compare(*tensors(num_kv_heads=num_kv_heads), **CASES[case])


@pytest.mark.parametrize("shape", [(1, 4, 37, 37), (2, 1, 37, 37), (1, 4, 1, 37), (2, 4, 37, 1), (4, 37, 37)])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_bias_and_its_gradient(shape, softcap):
    torch.manual_seed(3)
    bias = torch.randn(shape, requires_grad=True)
    compare(*tensors(), bias=bias, is_causal=True, rule=AttentionRule(softcap=softcap))


@pytest.mark.parametrize("window", [None, 6])
def test_sinks_and_their_gradient(window):
    sinks = torch.tensor([-1.0, 0.5, 2.0, 9.0], requires_grad=True)
    compare(*tensors(), is_causal=True, rule=AttentionRule(sinks=sinks, window=window))


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 37), (5, 61), (40, 7), (8, 12), (1, 1)])
def test_lengths_of_queries_and_keys_may_differ(num_queries, num_keys):
    compare(*tensors(num_queries, num_keys, value_size=5))
    compare(*tensors(num_queries, num_keys, value_size=5), is_causal=True)


def test_gradients_by_finite_differences():
    q, k, v = tensors(5, 5, 2, 1, 3, 2, torch.float64)
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, bias, sinks):
        rule = AttentionRule(sinks=sinks, softcap=1.3, window=3)
        return flash_attend(q, k, v, scale=SCALE, is_causal=True, bias=bias, rule=rule)

    assert torch.autograd.gradcheck(run, (q, k, v, bias, sinks))


def test_real_tiles_at_a_real_length(monkeypatch):
    monkeypatch.undo()
    assert flash.QUERY_TILE == 128
    compare(*tensors(700, 700, size=64, value_size=64), is_causal=True)
    compare(*tensors(300, 700, size=64, value_size=64), rule=AttentionRule(window=260))


def test_scores_far_from_zero_neither_overflow_nor_vanish():
    q, k, v = tensors()
    with torch.no_grad():
        q *= 100
        k *= 10  # scores of some 3,000, whose own rounding is 1e-4
    assert torch.isfinite(flash_attend(q, k, v, scale=1.0, is_causal=True)).all()
    compare(q, k, v, is_causal=True, tolerance=1e-3)


def test_rows_that_see_nothing_are_zero_and_pass_no_gradient():
    q, k, v = tensors()
    mask = some_mask(2, 1, 37, 37)
    mask[0, 0, 3] = False
    mask[1, 0, :, :] = False
    out = flash_attend(q, k, v, scale=SCALE, mask=mask)
    assert (out[0, 3] == 0).all() and (out[1] == 0).all() and (out[0, 4] != 0).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.isfinite(g).all() and (g[1] == 0).all() for g in grads)
    assert (grads[0][0, 3] == 0).all() and (grads[0][0, 4] != 0).any()
    q, k, v = tensors(40, 7)  # a window that slides out of the keys
    out = flash_attend(q, k, v, scale=SCALE, is_causal=True, rule=AttentionRule(window=3))
    assert (out[:, 9:] == 0).all() and (out[:, 8] != 0).all()


def test_minus_infinity_in_a_bias_hides_a_key():
    q, k, v = tensors()
    mask = some_mask(1, 1, 37, 37)
    bias = torch.zeros(1, 1, 37, 37).masked_fill(~mask, float("-inf"))
    masked, biased = (flash_attend(q, k, v, scale=SCALE, **x) for x in ({"mask": mask}, {"bias": bias}))
    assert torch.allclose(masked, biased, atol=1e-6)


def test_tiles_that_nobody_sees_are_skipped(monkeypatch):
    visited = []
    compute = flash._Inputs.scores
    monkeypatch.setattr(flash._Inputs, "scores", lambda self, *a: visited.append(a[2:]) or compute(self, *a))
    q, k, v = (x.detach() for x in tensors(96, 96))

    def tiles(**given):
        visited.clear()
        flash_attend(q, k, v, scale=SCALE, **given)
        return len(visited)

    assert tiles() == 12 * 8  # 96 / 8 by 96 / 12
    assert tiles(is_causal=True) == sum(math.ceil(t1 / 12) for t1 in range(8, 97, 8))
    assert tiles(is_causal=True, rule=AttentionRule(window=4)) < 24
    documents = torch.arange(96) // 24
    assert tiles(mask=(documents[:, None] == documents)[None, None]) == 12 * 2


def test_bfloat16_is_as_near_as_its_rounding():
    q, k, v = tensors(dtype=torch.bfloat16)
    out = flash_attend(q, k, v, scale=SCALE, is_causal=True)
    exact = attend_plain(q.float(), k.float(), v.float(), scale=SCALE, is_causal=True)
    assert out.dtype == torch.bfloat16 and (out.float() - exact).abs().max() < 2e-2
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    want = torch.autograd.grad(exact.sum(), (q, k, v))
    for found, plain in zip(grads, want, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.float() - plain.float()).abs().max() < 3e-2 * max(1.0, float(plain.float().abs().max()))


def test_memory_grows_with_the_length_and_not_with_its_square(monkeypatch):
    """What is kept for the backward pass and the largest tensor made on the way, in bytes."""
    monkeypatch.undo()

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, torch.Tensor):
                    self.size = max(self.size, x.untyped_storage().nbytes())
            return out

    def largest(function, length):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, length, 1, 4, requires_grad=True) for _ in range(3))
        with Largest() as seen:
            function(q, k, v, scale=1.0, is_causal=True).sum().backward()
        return seen.size

    floor = 8 * flash.QUERY_TILE * flash.KEY_TILE  # one tile of distances
    assert largest(flash_attend, 1024) <= largest(flash_attend, 2048) <= max(floor, 4 * 2048 * 4)
    assert largest(attend_plain, 2048) >= 4 * 2048 * 2048  # the control


def test_is_a_backend_by_name():
    from modelwright.nn.attention import attend

    q, k, v = tensors()
    with use_backend("flash"):
        out = attend(q, k, v, scale=SCALE, is_causal=True)
    assert "Flash" in str(out.grad_fn)
    assert torch.allclose(out, attend_plain(q, k, v, scale=SCALE, is_causal=True), atol=1e-5)


@pytest.mark.parametrize(("given", "name"), [({"mask": some_mask(37, 37)}, "mask"), ({"bias": torch.zeros(1)}, "bias")])
def test_the_gpu_twin_refuses_what_it_does_not_compute(given, name):
    with pytest.raises(ConfigError, match=f"given {name}"):
        attend_triton(*tensors(), scale=SCALE, **given)
