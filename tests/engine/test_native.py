"""The compiled step gives the PyTorch step's numbers within rounding, and its own to the bit however work is cut."""

import random
from dataclasses import replace

import pytest
import torch
from tests.engine.conftest import VOCAB_SIZE
from tests.engine.test_engine import idle, make_params, make_prompts

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.base.types import Completion, SamplingParams
from modelwright.engine.engine import Engine, EngineConfig
from modelwright.engine.llm import LLM
from modelwright.engine.native import NativeRunner, refusal
from modelwright.engine.prepare import rounded
from modelwright.engine.runner import Runner
from modelwright.engine.speculative import SpeculationConfig
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.nn.kernels import build
from modelwright.nn.kernels.packed import multiply_plain
from modelwright.nn.lowbit import Int4Linear, LowBitLinear

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
NATIVE = EngineConfig(kernels="native")
pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"no CPU kernels: {build.missing()}")


def make_model(**changes: object) -> Llama:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE - 3, hidden_size=64, intermediate_size=160, num_layers=3, num_heads=8, num_kv_heads=2,
        head_dim=16, max_seq_len=256,
    )  # fmt: skip
    model = Llama(replace(config, **changes))
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.bfloat16().eval()


@pytest.fixture(scope="module")
def dense() -> Llama:
    return make_model()


@pytest.fixture(scope="module")
def int4(dense: Llama) -> Llama:
    return rounded(dense, "int4")  # type: ignore[return-value]


def prompts_of(num: int) -> list[list[int]]:
    return [[token % (VOCAB_SIZE - 3) for token in prompt] for prompt in make_prompts(num)]


class Twin(torch.nn.Module):
    """A linear layer computed by the twin of the compiled product."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return multiply_plain(self.layer, x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


FAMILIES = {
    "llama": {},
    "qwen2": {"family": "qwen2", "attention_bias": True},
    "qwen3": {"family": "qwen3"},
    "mistral": {"family": "mistral", "sliding_window": 20},
    "odd heads": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 48},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize", ["int4", "int8", None])
def test_logprobs_equal_the_twins_within_rounding(family: str, quantize: str | None):
    changes = FAMILIES[family]
    model = make_model(**changes)
    if quantize:
        model = rounded(model, quantize)  # type: ignore[assignment]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=True, ignore_eos=True)
    prompt = prompts_of(3)[2] + list(range(150))
    found = LLM(model, config=NATIVE).generate(prompt, params)[0].prompt_logprobs
    assert found is not None
    expected = twin_logprobs(model, changes, prompt)
    picked = expected[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    difference = torch.tensor(found[1:]) - picked
    assert difference.abs().max() < 0.1 and difference.abs().mean() < 0.01


def twin_logprobs(model: Llama, changes: dict, ids: list[int]) -> torch.Tensor:
    """What the compiled step computes, but for its cache: the plain pass in float32 with the products' twins."""
    plain = make_model(**changes).float()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, (LowBitLinear, torch.nn.Linear)):
            parent, _, last = name.rpartition(".")
            setattr(plain.get_submodule(parent), last, Twin(layer))
    with torch.inference_mode():
        return torch.log_softmax(plain(torch.tensor([ids])).logits[0], -1)


CUTTINGS = {
    "one token a step": EngineConfig(max_tokens_per_step=1, has_prefix_cache=False),
    "chunks of 7": EngineConfig(max_tokens_per_step=7),
    "whole, together": EngineConfig(),
    "two at a time": EngineConfig(max_running=2),
    "blocks of 32": EngineConfig(block_size=32),
    "preempted": EngineConfig(num_blocks=13, block_size=16, max_tokens_per_step=50),
    "guessing": EngineConfig(speculation=SpeculationConfig(is_timed=False)),
}


@pytest.fixture(scope="module")
def alone(int4: Llama) -> list[Completion]:
    llm = LLM(int4, config=replace(NATIVE, has_prefix_cache=False))
    return [llm.generate(p, q)[0] for p, q in zip(prompts_of(16), make_params(16), strict=True)]


@pytest.mark.parametrize("cutting", CUTTINGS)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_bits_do_not_depend_on_how_the_work_is_cut(
    int4: Llama, alone: list[Completion], cutting: str, num_threads: int
):
    torch.set_num_threads(num_threads)
    llm = LLM(int4, config=replace(CUTTINGS[cutting], kernels="native"))
    for pool in llm.engine.runner.pools:
        pool[llm.engine.config.block_size :] = float("nan")  # what free blocks hold reaches nobody
    num = 5 if cutting == "one token a step" else 16
    for order in (range(num), random.Random(1).sample(range(num), num)):
        found = llm.generate([prompts_of(16)[i] for i in order], [make_params(16)[i] for i in order])
        for i, completion in zip(order, found, strict=True):
            assert completion.token_ids == alone[i].token_ids, (cutting, i)
            assert completion.logprobs == alone[i].logprobs, (cutting, i)
    assert idle(llm.engine)
    assert (llm.stats().num_preemptions > 0) == (cutting == "preempted")
    torch.set_num_threads(1)


@pytest.mark.parametrize("num_requests", [1, 3, 4, 16])
def test_few_and_many_tokens_are_computed_alike_by_more_threads_than_key_heads(
    int4: Llama, alone: list[Completion], num_requests: int
):
    """Steps of fewer than four tokens go another way (see FEW); two key heads leave a thread without one."""
    torch.set_num_threads(3)
    found = LLM(int4, config=NATIVE).generate(prompts_of(16)[:num_requests], make_params(16)[:num_requests])
    torch.set_num_threads(1)
    for one, other in zip(found, alone, strict=False):
        assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)


def test_low_bit_llamas_take_the_compiled_step_and_others_do_not(dense: Llama, int4: Llama):
    assert isinstance(Engine(int4).runner, NativeRunner)
    assert isinstance(Engine(dense, config=EngineConfig(quantize="int8")).runner, NativeRunner)
    assert isinstance(Engine(dense, config=NATIVE).runner, NativeRunner)
    assert isinstance(Engine(dense).runner, Runner)  # 16 bits: the numbers of training
    assert isinstance(Engine(int4, config=EngineConfig(kernels="plain")).runner, Runner)
    assert isinstance(Engine(int4, config=EngineConfig(block_size=8)).runner, Runner)
    assert not any(isinstance(m, LowBitLinear) for m in dense.modules())  # the given model was not touched


def test_both_ways_agree(int4: Llama):
    prompts = prompts_of(6)
    native = LLM(int4, config=NATIVE).generate(prompts, GREEDY)
    plain = LLM(int4, config=EngineConfig(kernels="plain")).generate(prompts, GREEDY)
    for a, b in zip(native, plain, strict=True):
        assert abs(a.logprobs[0] - b.logprobs[0]) < 0.3


def test_the_engine_changes_over_when_nothing_is_under_way(int4: Llama):
    """As on the first start of a machine, when the compiler is still at work."""
    library = build.wait()
    assert library is not None
    engine = Engine(int4, config=EngineConfig(kernels="plain"))
    sizes = {"num_blocks": engine.pool.num_blocks, "block_size": 16}
    engine._steps._coming = NativeRunner(int4, library, **sizes)
    request = engine.add(prompts_of(1)[0], GREEDY)
    engine.step()
    assert isinstance(engine.runner, NativeRunner)
    running = engine.runner
    engine._steps._coming = NativeRunner(int4, library, **sizes)
    engine.step()
    assert engine.runner is running  # one request is computed one way
    while engine.has_work:
        engine.step()
    again = engine.add(prompts_of(1)[0], GREEDY)
    engine.step()
    assert engine.runner is not running and again.num_cached == 0
    while engine.has_work:
        engine.step()
    assert again.output_ids == request.output_ids


def test_wishes_that_cannot_be_met_are_refused(dense: Llama, int4: Llama):
    with pytest.raises(ConfigError, match="blocks of 8 positions"):
        Engine(int4, config=EngineConfig(kernels="native", block_size=8))
    with pytest.raises(ConfigError, match="float32"):
        Engine(make_model().float(), config=NATIVE)
    with pytest.raises(ConfigError, match="rounded already"):
        Engine(int4, config=EngineConfig(quantize="int4"))
    for name, value in (("quantize", "int3"), ("kernels", "fast")):
        with pytest.raises(ConfigError, match=f"{name} is '{value}'; known"):
            EngineConfig(**{name: value})
    mixed = rounded(dense, "int8")
    mixed.layers[0].attention.q = Int4Linear.from_linear(dense.layers[0].attention.q)
    assert "different bits" in str(refusal(mixed, 16))
    assert "do not fill" in str(refusal(make_model(num_heads=3, num_kv_heads=1), 16))


def test_unnumbers_fail_the_request_and_not_its_neighbours(dense: Llama):
    model = make_model()
    model.embed.weight.data[7] = float("nan")
    llm = LLM(model, config=NATIVE)
    good = llm.generate([1, 2], GREEDY)[0]
    with pytest.raises(CheckpointError, match="not a number"):
        llm.generate([[1, 2], [7, 7]], GREEDY)
    assert idle(llm.engine)
    llm.engine.pool.forget_all()
    assert llm.generate([1, 2], GREEDY)[0] == good
