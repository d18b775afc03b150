"""The Triton twin of FlashAttention: equal to the plain one under Triton's interpreter, and compiled for real GPUs.

The interpreter is chosen before Triton is imported, so the checks run in a process of their own: one test starts them.
"""

import os
import subprocess
import sys

import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.nn.attention import AttentionRule, attend_plain
from modelwright.nn.flash import attend_triton

pytest.importorskip("triton")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
inner = pytest.mark.skipif(not IS_INTERPRETED and DEVICE == "cpu", reason="runs in the process with the interpreter")
SCALE = 0.3


@pytest.mark.slow
@pytest.mark.skipif(IS_INTERPRETED, reason="this is that process")
def test_all_of_this_under_the_interpreter():
    run_interpreted("-m", "slow or not slow")


@pytest.mark.skipif(IS_INTERPRETED, reason="this is that process")
def test_a_few_of_these_under_the_interpreter():
    run_interpreted("-k", "few")


def run_interpreted(*chosen: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, *chosen],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout


def compare(num_queries, num_keys, heads, size, tolerance=1e-5, dtype=torch.float32, **given):
    torch.manual_seed(0)
    num_heads, num_kv_heads = heads
    shapes = ((num_queries, num_heads), (num_keys, num_kv_heads), (num_keys, num_kv_heads))
    q, k, v = (torch.randn(2, *shape, size, device=DEVICE).to(dtype).requires_grad_() for shape in shapes)
    up = torch.randn(2, num_queries, num_heads, size, device=DEVICE).to(dtype)
    found = []
    for function, x in ((attend_triton, (q, k, v)), (attend_plain, [x.float() for x in (q, k, v)])):
        out = function(*x, scale=size**-0.5, **given)
        out.backward(up.to(out.dtype))
        found.append((out.detach(), *(x.grad for x in (q, k, v))))
        for x in (q, k, v):
            x.grad = None
    for ours, plain in zip(*found, strict=True):
        assert float((ours.float() - plain.float()).abs().max()) < tolerance * max(1.0, float(plain.abs().max()))


@inner
@pytest.mark.parametrize("rule", [AttentionRule(), AttentionRule(window=21)])
def test_few_equal_the_plain_twin(rule):
    compare(70, 70, (2, 1), 16, is_causal=True, rule=rule)


@inner
@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"is_causal": True},
        {"is_causal": True, "rule": AttentionRule(window=1)},
        {"is_causal": True, "rule": AttentionRule(window=50)},
        {"is_causal": True, "rule": AttentionRule(window=150)},
        {"rule": AttentionRule(window=70)},
        {"rule": AttentionRule(window=500)},
    ],
)
def test_equals_the_plain_twin(size, heads, given):
    compare(300, 300, heads, size, **given)


@inner
@pytest.mark.slow
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 200), (130, 64), (33, 300), (256, 256), (300, 7)])
def test_lengths_may_differ(num_queries, num_keys):
    compare(num_queries, num_keys, (2, 1), 16)
    compare(num_queries, num_keys, (2, 1), 64, is_causal=True)


@inner
@pytest.mark.slow
def test_half_precision_is_as_near_as_its_rounding():
    compare(200, 200, (4, 2), 64, 2e-2, torch.float16, is_causal=True)


@inner
def test_few_rows_that_see_nothing_are_zero():
    q, k, v = (torch.randn(1, n, 1, 16, device=DEVICE, requires_grad=True) for n in (90, 20, 20))
    out = attend_triton(q, k, v, scale=SCALE, is_causal=True, rule=AttentionRule(window=3))
    assert (out[:, 22:] == 0).all() and (out[:, :22] != 0).all()
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v)) and (q.grad[:, 22:] == 0).all()


@inner
def test_few_heads_without_a_kernel_are_refused():
    q = torch.randn(1, 4, 1, 24, device=DEVICE)
    with pytest.raises(ConfigError, match="given heads of 24 and values of 24"):
        attend_triton(q, q, q, scale=SCALE)


@pytest.mark.skipif(IS_INTERPRETED or DEVICE == "cuda", reason="on a CPU without the interpreter")
def test_a_cpu_is_refused():
    q = torch.randn(1, 4, 1, 64)
    with pytest.raises(ConfigError, match="given tensors on cpu; it needs a GPU"):
        attend_triton(q, q, q, scale=SCALE)


@pytest.mark.slow
@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter has no compiler")
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("window", [0, 1000])
def test_compiles_for_hopper_without_one(size, window):
    """To machine code, with the tensor cores' instructions and within the shared memory of an H100 (228 KB)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from modelwright.nn.kernels import flash_triton

    kernels = {"_forward": "FORWARD", "_backward_keys": "BACKWARD_KEYS", "_backward_queries": "BACKWARD_QUERIES"}
    for name, launches in kernels.items():
        kernel, launch = getattr(flash_triton, name), getattr(flash_triton, launches)[size]
        fixed = {"N": 8, "K": 2, "HEAD": size, "IS_CAUSAL": True, "WINDOW": window}
        fixed |= {"ROWS": launch.rows, "COLUMNS": launch.columns}
        types = {"scale": "fp32", "num_queries": "i32", "num_keys": "i32", "sum_base": "*fp32", "drop_base": "*fp32"}
        signature = {x: "constexpr" if x in fixed else types.get(x, "*bf16") for x in kernel.arg_names}
        whole = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(kernel.arg_names) if x.endswith(("base", "ys"))}
        made = triton.compile(
            ASTSource(kernel, signature, constexprs=fixed, attrs=whole),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
        )
        assert "wgmma.mma_async" in made.asm["ptx"]
        assert made.metadata.shared < 227 * 1024
