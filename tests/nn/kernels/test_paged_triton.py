"""Paged attention in Triton: equal to its plain twin under Triton's interpreter, and compiled for real GPUs.

The interpreter is chosen before Triton is imported, so the checks run in a process of their own: one test starts them.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.nn.attention import AttentionRule
from modelwright.nn.paged import Cache, Pages, TileGroup, attend_pages_plain, tile_span

pytest.importorskip("triton")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
inner = pytest.mark.skipif(not IS_INTERPRETED and DEVICE == "cpu", reason="runs in the process with the interpreter")
MIXED = ((0, 5), (70, 1), (130, 3), (0, 1))  # a new prompt, a token, a chunk behind others, a first token
RULES = {
    "plain": AttentionRule(),
    "window": AttentionRule(window=20),
    "window of one": AttentionRule(window=1),
    "softcap": AttentionRule(softcap=3.0),
}


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


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    """Parts of 64 keys, so that short sequences have several."""
    from modelwright.nn.kernels import paged_triton

    monkeypatch.setattr(paged_triton, "PART", 64)


class Step:
    """Queries of some chunks, (start, number of tokens) each, over a cache of which all that is not theirs is NaN."""

    def __init__(self, chunks, heads=(4, 2), size=16, value_size=None, block_size=5, dtype=torch.float32, seed=0):
        draw = torch.Generator().manual_seed(seed)
        num_heads, num_kv_heads = heads
        width = size + (value_size or size)
        self.span, self.chunks = tile_span(num_heads // num_kv_heads), chunks
        lengths = [-(-(start + num) // block_size) for start, num in chunks]
        free = (torch.randperm(sum(lengths), generator=draw) + 1).tolist()
        pool = torch.full(((sum(lengths) + 1) * block_size, num_kv_heads, width), float("nan"), dtype=dtype)
        self.tables = [[free.pop() for _ in range(length)] for length in lengths]
        self.slots = []
        for (start, num), table in zip(chunks, self.tables, strict=True):
            slots = [table[s // block_size] * block_size + s % block_size for s in range(start + num)]
            pool[slots] = torch.randn(len(slots), num_kv_heads, width, generator=draw).to(dtype)
            self.slots.append(slots[start:])
        self.q = [torch.randn(num, num_heads, size, generator=draw).to(dtype).to(DEVICE) for _, num in chunks]
        self.cache = Cache(pool.to(DEVICE), block_size, size)

    def pages(self, chosen=None, has_work=True):
        """Lay out all chunks, or those chosen, in that order; what stands behind the tables is nonsense."""
        chosen = range(len(self.chunks)) if chosen is None else chosen
        tables, tiles, work, slots = [], [], [], []
        for i in chosen:
            start, num = self.chunks[i]
            for at in range(0, num, self.span):
                count = min(self.span, num - at)
                tiles.append((len(slots) + at, count, len(tables), start + at, len(work)))
                work += [(len(tiles) - 1, part) for part in range(-(-(start + at + count) // 64))]
            tables += self.tables[i]
            slots += self.slots[i]
        longest = max(sum(self.chunks[i]) for i in chosen)
        slots, tables, tiles, work = (torch.tensor(x, device=DEVICE) for x in (slots, tables + [2**40], tiles, work))
        return Pages(slots, tables, (TileGroup(tiles, self.span, work if has_work else None),), longest)

    def attend(self, chosen=None, rule=RULES["plain"], has_work=True):
        from modelwright.nn.kernels import paged_triton

        chosen = range(len(self.chunks)) if chosen is None else chosen
        q = torch.cat([self.q[i] for i in chosen])
        return paged_triton.attend(q, self.cache, self.pages(chosen, has_work), 0.3, rule)

    def plain(self, rule=RULES["plain"]):
        exact = replace(self.cache, pool=self.cache.pool.float())
        return attend_pages_plain(torch.cat(self.q).float(), exact, self.pages(), scale=0.3, rule=rule)


def compare(step, rule=RULES["plain"], tolerance=2e-6):
    ours, plain = step.attend(rule=rule), step.plain(rule)
    assert bool(torch.isfinite(ours).all())
    assert float((ours.float() - plain).abs().max()) < tolerance * max(1.0, float(plain.abs().max()))
    assert torch.equal(ours, step.attend(rule=rule, has_work=False))  # whoever walks


@inner
@pytest.mark.parametrize("rule", ["plain", "window"])
def test_few_equal_the_plain_twin(rule):
    compare(Step(MIXED), RULES[rule])


@inner
@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("heads", "block_size"), [((2, 2), 16), ((4, 2), 1), ((6, 2), 5), ((8, 1), 64), ((20, 1), 16)])
def test_equals_the_plain_twin(rule, heads, block_size):
    compare(Step(MIXED, heads, block_size=block_size), RULES[rule])


@inner
@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (24, 24), (80, 80), (192, 128), (16, 24)])
@pytest.mark.parametrize("rule", ["plain", "window"])
def test_heads_of_any_size(sizes, rule):
    compare(Step(((0, 3), (63, 1), (64, 1), (65, 2)), (4, 2), *sizes, block_size=16), RULES[rule])


@inner
@pytest.mark.slow
def test_sinks():
    sinks = torch.tensor([-1.0, 0.5, 2.0, 9.0], device=DEVICE)
    compare(Step(MIXED), AttentionRule(sinks=sinks))
    compare(Step(MIXED), AttentionRule(sinks=sinks, window=20))


@inner
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_as_its_rounding(dtype):
    if IS_INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 as if its bits were whole numbers (Triton 3.9)")
    compare(Step(MIXED, (4, 2), 64, block_size=16, dtype=dtype), tolerance=2e-2)


@inner
def test_few_rows_have_the_same_bits_alone_and_in_company():
    step = Step(MIXED)
    together = step.attend().split([num for _, num in MIXED])
    shuffled = step.attend([3, 1, 0, 2])
    for i, whole in enumerate(together):
        assert torch.equal(step.attend([i]), whole), i
    assert torch.equal(shuffled, torch.cat([together[i] for i in (3, 1, 0, 2)]))


@inner
@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bits_do_not_depend_on_chunks(rule, dtype):
    """One sequence of 150 positions, its last 80 in one chunk and in chunks of 1 and 7: the same keys, other tiles."""
    whole = Step(((70, 80),), (4, 2), 32, block_size=16, dtype=dtype)
    expected = whole.attend(rule=RULES[rule])
    for size in (1, 7):
        found = []
        for start in range(70, 150, size):
            num = min(size, 150 - start)
            whole.chunks = ((start, num),)
            rows = slice(start - 70, start - 70 + num)
            part = Step(((0, 1),), (4, 2), 32, block_size=16, dtype=dtype)
            part.chunks, part.tables, part.cache = whole.chunks, whole.tables, whole.cache
            part.slots, part.q = [whole.slots[0][rows]], [whole.q[0][rows]]
            found.append(part.attend(rule=RULES[rule]))
        assert torch.equal(torch.cat(found), expected), size


@inner
def test_few_rows_that_see_nothing_are_zero_and_harm_nobody():
    """Padding: a tile at position -1 whose table is stale, and a piece of work of no tile."""
    step = Step(((70, 1), (9, 1)))
    pages = step.pages()
    group = pages.groups[0]
    tiles = torch.cat((group.tiles, torch.tensor([[2, 1, 2**40, -1, 2**40]], device=DEVICE)))
    work = torch.cat((group.work, torch.tensor([[-1, 7], [-1, 0]], device=DEVICE)))
    padded = replace(pages, groups=(TileGroup(tiles, step.span, work),))
    q = torch.cat((*step.q, torch.full_like(step.q[0], float("nan"))))
    from modelwright.nn.kernels import paged_triton

    out = paged_triton.attend(q, step.cache, padded, 0.3, RULES["plain"])
    assert torch.equal(out[:2], step.attend()) and bool((out[2] == 0).all())
    plain = attend_pages_plain(q, step.cache, padded, scale=0.3)
    assert torch.allclose(plain[:2], step.plain(), atol=1e-6) and bool((plain[2] == 0).all())


@inner
def test_few_written_tokens_are_where_they_belong_and_nothing_else_is_touched():
    from modelwright.nn.kernels import paged_triton

    pool = torch.full((30, 2, 24 + 10), float("nan"), device=DEVICE)
    k, v = torch.randn(4, 2, 24, device=DEVICE), torch.randn(4, 2, 10, device=DEVICE)
    slots = torch.tensor([7, 29, 0, 12], device=DEVICE)
    # Views, as a layer gives them: values straight out of a wider product.
    wide = torch.cat((v.flatten(1), k.flatten(1)), dim=1)
    paged_triton.write(Cache(pool, 5, 24), k, wide[:, :20].unflatten(1, (2, 10)), slots)
    assert torch.equal(pool[slots], torch.cat((k, v), dim=-1))
    assert int(pool.isfinite().all(-1).all(-1).sum()) == 4


@inner
@pytest.mark.slow
def test_addresses_beyond_32_bits():
    """A block whose numbers begin beyond 2^31: the product of its index and the stride must not wrap around."""
    block_size, slot = 16, 1 * (16 + 16)
    block = 2**31 // (block_size * slot) + 3
    # Reserved and not touched but for one block: 4.3 GB of addresses in half precision.
    pool = torch.empty((block + 1) * block_size, 1, 32, dtype=torch.float16, device=DEVICE)
    step = Step(((9, 1),), (2, 1), 16, block_size=block_size, dtype=torch.float16)
    at = step.tables[0][0] * block_size
    pool[block * block_size :] = step.cache.pool[at : at + block_size]
    expected = step.attend()
    step.cache, step.tables = replace(step.cache, pool=pool), [[block]]
    assert torch.equal(step.attend(), expected)
    from modelwright.nn.kernels import paged_triton

    k = torch.ones(1, 1, 16, dtype=torch.float16, device=DEVICE)
    paged_triton.write(step.cache, k, 2 * k, torch.tensor([len(pool) - 1], device=DEVICE))
    assert pool[-1].flatten().tolist() == [1.0] * 16 + [2.0] * 16


@inner
def test_few_heads_without_a_kernel_are_refused():
    with pytest.raises(ConfigError, match="heads have 300 and 300 numbers"):
        Step(((0, 1),), (1, 1), 300).attend()
    step = Step(((0, 1),), (1, 1))
    step.q = [x.double() for x in step.q]
    with pytest.raises(ConfigError, match=r"queries are torch.float64 and keys torch.float32"):
        step.attend()


@pytest.mark.skipif(IS_INTERPRETED or DEVICE == "cuda", reason="on a CPU without the interpreter")
def test_a_cpu_is_refused():
    with pytest.raises(ConfigError, match="given tensors on cpu; it needs a GPU"):
        Step(((0, 1),)).attend()


@pytest.mark.slow
@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter has no compiler")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("size", "group"), [(64, 7), (128, 4), (128, 1), (256, 2)])
def test_compiles_for_gpus_without_one(size, group, arch, monkeypatch):
    """To PTX, with the tensor cores' instructions and within the shared memory of an A100 and an H100."""
    monkeypatch.undo()
    from modelwright.nn.kernels import paged_triton

    launch = paged_triton.LAUNCHES[size]
    shape = {"N": 2 * group, "K": 2, "KEY": size, "VALUE": size, "KEY_PAD": size, "VALUE_PAD": size, "BLOCK": 16}
    for window, softcap, has_parts in ((0, False, True), (1000, True, True), (0, False, False)):
        fixed = {**shape, "WINDOW": window, "HAS_SOFTCAP": softcap, "ROWS": 16, "COLUMNS": launch.columns}
        fixed |= {"PART": paged_triton.PART, "SPAN": tile_span(group), "HAS_PARTS": has_parts, "HAS_SINKS": False}
        for kernel in (paged_triton._parts, paged_triton._finish):
            made = compile_for(arch, kernel, fixed, launch)
            assert made.metadata.shared < {80: 163, 90: 227}[arch] * 1024
            does_products = kernel is paged_triton._parts or not has_parts
            assert ("mma" in made.asm["ptx"]) == does_products
            assert "fma.rn.f32" not in made.asm["ptx"]  # not contracted
    compile_for(arch, paged_triton._write, {x: shape[x] for x in ("K", "KEY", "VALUE", "KEY_PAD", "VALUE_PAD")}, launch)


def compile_for(arch, kernel, fixed, launch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    whole_numbers = dict.fromkeys(("tiles_base", "tables_base", "work_base", "slots_base"), "*i64")
    types = {"scale": "fp32", "softcap": "fp32", "kept_base": "*fp32", "sums_base": "*fp32", **whole_numbers}
    signature = {x: "constexpr" if x in fixed else types.get(x, "*bf16") for x in kernel.arg_names}
    whole = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(kernel.arg_names) if x.endswith("base")}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": False}
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=whole)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
