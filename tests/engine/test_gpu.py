"""The GPU's step by the kernels' plain twins on a CPU: recorded and padded or not, its answers are the plain runner's.

In place of a CUDA graph stands a function that runs the recorded work again over the same buffers.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.engine.conftest import make_model, needs_bf16
from tests.engine.test_families import FAMILIES, make_prompts
from tests.engine.test_families import make_model as make_family
from torch import nn

from modelwright.base.errors import ConfigError
from modelwright.base.types import Completion, SamplingParams
from modelwright.engine import gpu, graphs
from modelwright.engine.engine import Engine, EngineConfig
from modelwright.engine.gpu import GpuRunner, PagePlanner
from modelwright.engine.llm import LLM
from modelwright.engine.speculative import SpeculationConfig
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.nn.rope import RopeScaling

PROMPTS = [[5, 6, 7] * 6, [9], [11, 3, 250, 8], list(range(40, 110)), [1, 2], [100] * 33]
PARAMS = [SamplingParams(temperature=t, seed=3, max_tokens=n, ignore_eos=True) for t, n in ((0, 30), (0.9, 14)) * 3]


def rerun(work: Any) -> Any:
    """Stand for a recording: whatever the buffers hold is computed again."""
    return work


def on_gpu_path(model: nn.Module, record: Any = rerun, **settings: Any) -> LLM:
    """An engine whose steps go the GPU's way."""
    llm = LLM(model, config=EngineConfig(**settings))
    config, pool = llm.engine.config, llm.engine.pool
    sizes = {"num_blocks": pool.num_blocks, "block_size": pool.block_size, "max_rows": config.max_running}
    llm.engine._steps.runner = GpuRunner(model, **sizes, record=record)
    return llm


def generate(llm: LLM, prompts: Sequence[list[int]] = PROMPTS, params: Any = None) -> list[Completion]:
    return llm.generate(list(prompts), PARAMS[: len(prompts)] if params is None else params)


def near(found: Sequence[Completion], expected: Sequence[Completion]) -> bool:
    """The same tokens, and log-probabilities up to the rounding of float32."""
    return all(
        a.token_ids == b.token_ids and torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)
        for a, b in zip(found, expected, strict=True)
    )


@pytest.fixture(scope="module")
def plain(model: Llama) -> list[Completion]:
    return generate(LLM(model))


CUTTINGS = {
    "as it comes": {},
    "chunks of 7": {"max_tokens_per_step": 7},
    "two at a time": {"max_running": 2},
    "blocks of 5": {"block_size": 5},
    "preempted": {"num_blocks": 24, "block_size": 8, "max_tokens_per_step": 50},
}


@pytest.mark.parametrize("cutting", CUTTINGS)
def test_answers_are_the_plain_runners(model: Llama, plain: list[Completion], cutting: str):
    llm = on_gpu_path(model, **CUTTINGS[cutting])
    assert near(generate(llm), plain)
    assert llm.engine.runner.graphs.num_replays > 10
    assert (llm.stats().num_preemptions > 0) == (cutting == "preempted")


def test_long_prompts_and_many_parts(model: Llama, monkeypatch: pytest.MonkeyPatch):
    """Parts of 16 keys and tiles that are walked over whole, so that every kind of group occurs."""
    for module in (gpu, graphs):
        monkeypatch.setattr(module, "PART", 16)
    monkeypatch.setattr(gpu, "MAX_SPLIT_TOKENS", 8)
    llm = on_gpu_path(model)
    assert near(generate(llm), generate(LLM(model)))
    assert len({work for _, work in llm.engine.runner.graphs._recorded}) > 1


@needs_bf16
def test_the_bits_do_not_depend_on_padding_or_recording(model_bf16: Llama):
    """Each prompt alone, all together, recorded and not: the same bits, for here products do not depend on rows."""
    llm = on_gpu_path(model_bf16, has_prefix_cache=False)
    alone = [bits(generate(llm, [p], [q])) for p, q in zip(PROMPTS, PARAMS, strict=True)]
    for settings in ({}, {"max_running": 4}, {"max_tokens_per_step": 7}):
        assert bits(generate(on_gpu_path(model_bf16, **settings))) == sum(alone, []), settings
    eager = on_gpu_path(model_bf16)
    eager.engine.runner.graphs.why_not = "a test"
    assert bits(generate(eager)) == sum(alone, [])
    assert eager.engine.runner.graphs.num_replays == 0


def bits(found: Sequence[Completion]) -> list[Any]:
    return [(completion.token_ids, completion.logprobs) for completion in found]


def test_the_largest_class_comes_first_and_closer_ones_when_wanted(model: Llama):
    llm = on_gpu_path(model, max_running=8)
    made = llm.engine.runner.graphs
    params = SamplingParams(temperature=0, max_tokens=graphs.PATIENCE, ignore_eos=True)  # the first is of the prompt
    generate(llm, [[5, 6]], [params])
    assert [rows for rows, _ in made._recorded] == [8]
    generate(llm, [[5, 6]], [params])  # now often enough
    assert [rows for rows, _ in made._recorded] == [8, made.limits.min_rows]
    generate(llm, PROMPTS[:5], [PARAMS[0]] * 5)
    assert [rows for rows, _ in made._recorded] == [8, made.limits.min_rows, 6]
    assert made.num_replays == 2 * (graphs.PATIENCE - 1) + PARAMS[0].max_tokens - 1


def test_steps_larger_than_what_is_recorded_are_computed_as_ever(model: Llama):
    llm = on_gpu_path(model, max_running=6)
    llm.engine._steps.runner = runner = GpuRunner(
        model, num_blocks=llm.engine.pool.num_blocks, block_size=16, max_rows=2, record=rerun
    )
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    assert near(generate(llm, params=[params] * 6), generate(LLM(model), params=[params] * 6))
    assert runner.graphs.num_replays == 0


def test_stale_tables_and_poisoned_blocks_are_not_felt(model: Llama):
    """Whatever no request holds is NaN, the scratch block too, and the buffers are full of nonsense each step."""
    llm = on_gpu_path(model, num_blocks=60, has_prefix_cache=False)
    engine, expected = llm.engine, generate(LLM(model))
    requests = [engine.add(p, q) for p, q in zip(PROMPTS, PARAMS, strict=True)]
    runner = engine.runner
    while engine.has_work:
        held = {block for request in requests for block in request.block_table}
        for pool in runner.pools:
            for block in set(range(1, 61)) - held:
                pool[block * 16 : (block + 1) * 16] = float("nan")
        runner.graphs._host[:] = 2**40
        runner.graphs._numbers[:] = 2**40
        engine.step()
    assert [tuple(r.output_ids) for r in requests] == [c.token_ids for c in expected]
    assert all(bool((pool[:16] == 0).all()) for pool in runner.pools)  # padding does not write to the null block
    assert runner.graphs.num_replays > 10


def test_replaced_weights_are_recorded_anew_and_updated_ones_are_read():
    model = make_model(seed=1)
    llm = on_gpu_path(model)
    recorded = []
    llm.engine.runner.graphs._record = lambda work: recorded.append(work) or work
    generate(llm, PROMPTS[:1])
    assert len(recorded) == 2  # the largest class and that of one row
    with torch.no_grad():
        model.layers[0].mlp.down.weight.mul_(-1.0)
    llm.engine.pool.forget_all()
    assert near(generate(llm, PROMPTS[:1]), generate(LLM(model), PROMPTS[:1]))
    assert len(recorded) == 2
    model.layers[0].mlp.down.weight = nn.Parameter(-model.layers[0].mlp.down.weight.detach())
    llm.engine.pool.forget_all()
    assert near(generate(llm, PROMPTS[:1]), generate(LLM(model), PROMPTS[:1]))
    assert len(recorded) == 4


def test_what_fails_to_record_turns_it_off_and_says_why(model: Llama, plain: list[Completion]):
    def fail(work: Any) -> Any:
        raise RuntimeError("out of memory")

    llm = on_gpu_path(model, fail)
    assert near(generate(llm), plain)
    assert llm.engine.runner.graphs.why_not == "out of memory"


UNRECORDED = {"mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str):
    """Windows, soft-caps, latents; the routing of experts counts on the host, so those steps are not recorded."""
    model = make_family(family)
    llm = on_gpu_path(model, max_context=160)
    params = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)] * 4
    expected = generate(LLM(model, config=EngineConfig(max_context=160)), make_prompts(), params)
    assert near(generate(llm, make_prompts(), params), expected)
    made = llm.engine.runner.graphs
    assert (made.num_replays > 0) == (family not in UNRECORDED)
    assert ("waits for the device" in str(made.why_not)) == (family in UNRECORDED)


def test_a_rotation_that_depends_on_the_length_is_not_recorded():
    scaling = RopeScaling("dynamic", factor=2.0, original_max_seq_len=64)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_layers=1, rope_scaling=scaling)
    runner = GpuRunner(init_weights(Llama(config), 0), num_blocks=8, block_size=16, record=rerun)
    assert "the rotation (dynamic) depends on the length" in str(runner.graphs.why_not)


@pytest.mark.parametrize("method", ["ngram", "early_exit"])
def test_steps_with_drafts_are_computed_as_ever(model: Llama, plain: list[Completion], method: str):
    llm = on_gpu_path(model, speculation=SpeculationConfig(method=method, is_timed=False))
    assert near(generate(llm), plain)
    assert llm.stats().num_drafted > 0


def test_prompt_log_probabilities_and_other_rows_than_the_last(model: Llama):
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=True, ignore_eos=True)
    for chunk in (1, 9, 512):
        found = generate(on_gpu_path(model, max_tokens_per_step=chunk), PROMPTS[:2], [params] * 2)
        for a, b in zip(found, generate(LLM(model), PROMPTS[:2], [params] * 2), strict=True):
            assert a.prompt_logprobs is not None and b.prompt_logprobs is not None
            assert torch.allclose(torch.tensor(a.prompt_logprobs[1:]), torch.tensor(b.prompt_logprobs[1:]), atol=1e-4)


def test_who_takes_it(model: Llama):
    assert gpu.refusal(model, None) == "its weights are on cpu, not on an NVIDIA GPU"
    assert type(LLM(model).engine.runner) is not GpuRunner
    assert gpu.unpaged(model, torch.bfloat16, "int8") == "its cache is not rounded, and kv_dtype is 'int8'"
    pytest.importorskip("triton")
    assert gpu.unpaged(model, torch.bfloat16, None) is None
    assert "torch.float64" in str(gpu.unpaged(model, torch.float64, None))
    with pytest.raises(ConfigError, match="kernels='native' cannot be"):
        Engine(model, config=EngineConfig(kernels="native"))


def test_a_plan_of_padding_alone_sees_nothing(model: Llama):
    runner = GpuRunner(model, num_blocks=4, block_size=16, max_rows=3, record=rerun)
    made = runner.graphs
    ids, positions, slots, tiles, work, _ = made._views((3, 3), made._host)
    made._fill((3, 3), [])  # no step is empty; all of it is padding here
    assert set(slots.tolist()) == {64} and set(tiles[:, 3].tolist()) == {-1} and set(work.ravel().tolist()) == {-1}
    assert isinstance(runner.page_planner, PagePlanner)
    hidden, logits = runner._compute(made._plan((3, 3)))
    assert bool(torch.isfinite(logits).all())
