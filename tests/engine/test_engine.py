"""The engine gives what the model alone would give, to the bit, however the work is cut and mixed."""

import random
from typing import Any

import pytest
import torch
from tests.engine.conftest import VOCAB_SIZE, make_model, needs_bf16

from modelwright.base.errors import CheckpointError, ConfigError, RequestError
from modelwright.base.types import Completion, SamplingParams
from modelwright.engine.engine import Engine, EngineConfig
from modelwright.engine.llm import LLM
from modelwright.engine.runner import Runner
from modelwright.engine.speculative import SpeculationConfig
from modelwright.models.bert import Bert, BertConfig
from modelwright.models.llama import Llama

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def make_prompts(num: int, seed: int = 0, longest: int = 100) -> list[list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(40)]
    prompts = []
    for i in range(num):
        own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 3, 16, 33, rng.randint(1, longest)]))]
        prompts.append((shared[: rng.randint(1, 40)] if i % 2 else []) + own)
    return prompts


def make_params(num: int, seed: int = 0) -> list[SamplingParams]:
    rng = random.Random(seed)
    kinds = [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.2, "top_k": 20}, {}]
    return [
        SamplingParams(**rng.choice(kinds), max_tokens=rng.randint(1, 12), seed=i, ignore_eos=True) for i in range(num)
    ]


def idle(engine: Engine) -> bool:
    engine.pool.check([])
    stats = engine.stats()
    return stats.free_blocks == stats.total_blocks and stats.running == stats.waiting == 0


def naive(model: Llama, prompt: list[int], num: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(num):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_equals_the_plain_greedy_loop(model: Llama):
    prompts = make_prompts(12)
    llm = LLM(model)
    for prompt, completion in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
        assert list(completion.token_ids) == naive(model, prompt, 12)
    assert idle(llm.engine)


def test_logprobs_equal_the_plain_forward(model: Llama):
    prompt = make_prompts(1)[0]
    completion = LLM(model).generate(prompt, GREEDY)[0]
    ids = torch.tensor([prompt + list(completion.token_ids)])
    with torch.inference_mode():
        rows = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1].float(), -1)
    expected = rows.gather(1, ids[0, len(prompt) :, None])[:, 0]
    assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)


CUTTINGS = {
    "one token a step": EngineConfig(max_tokens_per_step=1, has_prefix_cache=False),
    "chunks of 7": EngineConfig(max_tokens_per_step=7),
    "chunks of 64": EngineConfig(max_tokens_per_step=64),
    "whole, together": EngineConfig(),
    "two at a time": EngineConfig(max_running=2),
    "blocks of 1": EngineConfig(block_size=1),
    "blocks of 5": EngineConfig(block_size=5),
    "preempted": EngineConfig(num_blocks=24, block_size=8, max_tokens_per_step=50),
}


@pytest.fixture(scope="module")
def alone(model_bf16: Llama) -> list[Completion]:
    """Each prompt computed whole, by itself, from nothing."""
    llm = LLM(model_bf16, config=EngineConfig(has_prefix_cache=False))
    return [llm.generate(p, q)[0] for p, q in zip(make_prompts(16), make_params(16), strict=True)]


@needs_bf16
@pytest.mark.parametrize("cutting", CUTTINGS)
def test_the_bits_do_not_depend_on_chunks_neighbours_cache_or_preemption(
    model_bf16: Llama, alone: list[Completion], cutting: str
):
    llm = LLM(model_bf16, config=CUTTINGS[cutting])
    num = 5 if cutting == "one token a step" else 16
    for order in (range(num), random.Random(1).sample(range(num), num)):
        found = llm.generate([make_prompts(16)[i] for i in order], [make_params(16)[i] for i in order])
        for i, completion in zip(order, found, strict=True):
            assert completion.token_ids == alone[i].token_ids, (cutting, i)
            assert completion.logprobs == alone[i].logprobs, (cutting, i)
    assert (llm.stats().cached_tokens > 0) == llm.engine.config.has_prefix_cache
    assert idle(llm.engine)
    assert (llm.stats().num_preemptions > 0) == (cutting == "preempted")


@needs_bf16
def test_the_bits_do_not_depend_on_the_number_of_threads(model_bf16: Llama):
    prompts, params = make_prompts(8), make_params(8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = LLM(model_bf16).generate(prompts, params)
        torch.set_num_threads(2)
        assert LLM(model_bf16).generate(prompts, params) == one
    finally:
        torch.set_num_threads(before)


@needs_bf16
def test_a_prefix_hit_of_any_length_changes_nothing(model_bf16: Llama):
    base = make_prompts(1, seed=3, longest=200)[0] + list(range(40))
    llm = LLM(model_bf16, config=EngineConfig(block_size=4))
    llm.generate(base[:40], GREEDY)
    cold = LLM(model_bf16, config=EngineConfig(has_prefix_cache=False))
    for length in range(1, 41):
        prompt = [*base[:length], 7, 9]
        warm = llm.generate(prompt, GREEDY)[0]
        assert warm.usage.cached_tokens >= length // 4 * 4 - 4
        assert (warm.token_ids, warm.logprobs) == (lambda c: (c.token_ids, c.logprobs))(
            cold.generate(prompt, GREEDY)[0]
        )


@needs_bf16
@pytest.mark.parametrize("speculation", [None, SpeculationConfig(is_timed=False)], ids=["plain", "with drafts"])
def test_giving_way_at_any_step_changes_nothing(model_bf16: Llama, speculation: SpeculationConfig | None):
    prompts = [[5, 6, 7] * 8, [9, 8] * 10]
    params = [SamplingParams(temperature=t, seed=3, max_tokens=10, logprobs=1, ignore_eos=True) for t in (0.0, 0.9)]

    def run(at: int | None) -> tuple[list[Any], int]:
        engine = Engine(model_bf16, config=EngineConfig(max_tokens_per_step=16, block_size=4, speculation=speculation))
        requests = [engine.add(p, q) for p, q in zip(prompts, params, strict=True)]
        logprobs: dict[int, list[float]] = {r.id: [] for r in requests}
        steps = 0
        while engine.has_work:
            if steps == at:
                engine.scheduler._preempt_last()
            for piece in engine.step():
                logprobs[piece.request_id] += piece.logprobs
            steps += 1
        assert idle(engine) and (at is None or engine.stats().num_preemptions == 1)
        return [(r.output_ids, logprobs[r.id]) for r in requests], steps

    expected, num_steps = run(None)
    for at in range(1, num_steps):
        assert run(at)[0] == expected, at


def test_in_fp32_the_difference_is_only_rounding(model: Llama):
    prompts = make_prompts(10)
    alone = [LLM(model).generate(p, GREEDY)[0] for p in prompts]
    together = LLM(model, config=EngineConfig(max_tokens_per_step=37)).generate(prompts, GREEDY)
    for a, b in zip(alone, together, strict=True):
        assert a.token_ids == b.token_ids
        assert max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)) < 1e-4


def test_what_free_blocks_hold_cannot_reach_an_output(model: Llama):
    prompts = make_prompts(6)
    clean = LLM(model).generate(prompts, GREEDY)
    llm = LLM(model)
    for pool in llm.engine.runner.pools:
        pool[llm.engine.config.block_size :] = float("nan")
    assert [c.token_ids for c in llm.generate(prompts, GREEDY)] == [c.token_ids for c in clean]


def test_shared_blocks_are_not_written(model: Llama):
    llm = LLM(model, config=EngineConfig(block_size=4))
    prompt = list(range(30))
    llm.generate(prompt, GREEDY)
    engine = llm.engine
    request = engine.add(prompt, GREEDY)
    engine.scheduler.schedule()
    held = request.block_table[: request.num_cached // 4]
    assert held
    slots = [b * 4 + i for b in held for i in range(4)]
    before = [pool[slots].clone() for pool in engine.runner.pools]
    engine.abort(request)
    llm.generate([prompt, prompt], GREEDY)
    assert all(torch.equal(pool[slots], old) for pool, old in zip(engine.runner.pools, before, strict=True))


def test_aborting_frees_at_once_and_leaves_others_alone(model: Llama):
    prompts = make_prompts(6)
    expected = LLM(model).generate(prompts, GREEDY)
    engine = Engine(model, config=EngineConfig(max_running=4))
    requests = [engine.add(p, GREEDY) for p in prompts]
    rounds = 0
    while engine.has_work:
        engine.step()
        rounds += 1
        if rounds == 3:
            for victim in (requests[0], requests[5]):  # one runs, one waits
                engine.abort(victim)
                engine.abort(victim)
            assert requests[0].block_table == [] and requests[0].finish_reason == "abort"
    assert idle(engine)
    for i in (1, 2, 3, 4):
        assert requests[i].output_ids == expected[i].token_ids


def test_stops_at_the_context_end_with_reason_length(model: Llama):
    params = SamplingParams(temperature=0, max_tokens=10_000, ignore_eos=True)
    for config in (EngineConfig(max_context=50), EngineConfig(num_blocks=6, block_size=10)):
        completion = LLM(model, config=config).generate([1] * 20, params)[0]
        assert completion.finish_reason == "length" and len(completion.token_ids) == 30
        assert completion.usage.completion_tokens == 30 and completion.usage.prompt_tokens == 20
    completion = LLM(model).generate([1] * 250, params)[0]
    assert len(completion.token_ids) == 6  # the model's own 256
    with pytest.raises(RequestError, match=r"maximum context length is 256 tokens.*256 tokens") as caught:
        LLM(model).generate([1] * 256, params)
    assert caught.value.code == "context_length_exceeded"


def test_a_stop_token_ends_it_unless_ignored_or_too_early(model: Llama):
    prompt = make_prompts(1)[0]
    free = LLM(model).generate(prompt, GREEDY)[0].token_ids
    first = next(i for i in range(2, 12) if free[i] not in free[:i])
    engine = Engine(model)
    engine.stop_ids = (free[first],)

    def run(**how: int) -> tuple[tuple[int, ...], str | None]:
        request = engine.add(prompt, SamplingParams(temperature=0, max_tokens=12, **how))
        while engine.has_work:
            engine.step()
        return request.output_ids, request.finish_reason

    assert run() == (free[: first + 1], "stop")
    assert run(ignore_eos=True) == (free, "length")
    output, _ = run(min_tokens=first + 2)
    assert output[:first] == free[:first] and free[first] not in output[: first + 2]


def test_unnumbers_fail_the_request_and_not_the_engine():
    model = make_model()
    model.embed.weight.data[7] = float("nan")
    llm = LLM(model)
    with pytest.raises(CheckpointError, match="not a number"):
        llm.generate([[1, 2], [7, 7]], GREEDY)
    assert idle(llm.engine)
    llm.engine.pool.forget_all()
    assert len(llm.generate([1, 2], GREEDY)[0].token_ids) == 12


def test_a_poisoned_prefix_does_not_reach_other_prompts():
    model = make_model()
    model.embed.weight.data[7] = float("nan")
    llm = LLM(model, config=EngineConfig(num_blocks=8))
    with pytest.raises(CheckpointError):
        llm.generate([7] * 60, GREEDY)
    for prompt in ([1] * 60, [2] * 3):  # takes the same blocks
        assert len(llm.generate(prompt, GREEDY)[0].token_ids) == 12


def test_the_cache_takes_the_memory_it_is_given(model: Llama):
    block = Runner.block_bytes(model, torch.float32, 16)
    assert block == 3 * 16 * 2 * 2 * 16 * 4
    engine = Engine(model, config=EngineConfig(kv_cache_bytes=10 * block + 5))
    assert engine.pool.num_blocks == 10 and sum(p.numel() for p in engine.runner.pools) * 4 == 10 * block
    assert engine.max_context == 9 * 16
    assert Engine(model, config=EngineConfig(max_running=1)).pool.num_blocks == 2 * (16 + 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kv_cache_bytes": 100}, "one block of this model takes"),
        ({"num_blocks": 1}, "at least 2"),
        ({"num_blocks": 9, "kv_cache_bytes": 10**6}, "both given"),
        ({"block_size": 0}, "block_size is 0"),
        ({"dtype": "fp8"}, "known: bfloat16"),
    ],
)
def test_wrong_settings_are_named(model: Llama, settings: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        Engine(model, config=EngineConfig(**settings))


def test_a_model_that_writes_no_text_is_refused():
    config = BertConfig(vocab_size=100, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64)
    with pytest.raises(ConfigError, match="Bert"):
        Engine(Bert(config))
