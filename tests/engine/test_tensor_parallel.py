"""Two processes compute what one computes; what they cannot is refused by name; a dead one is an error, not a wait."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.engine.conftest import make_model, needs_bf16

from modelwright.base.errors import ConfigError, DeviceError
from modelwright.base.types import SamplingParams
from modelwright.engine.engine import Engine, EngineConfig
from modelwright.engine.llm import LLM
from modelwright.engine.prepare import rounded
from modelwright.engine.speculative import SpeculationConfig
from modelwright.engine.stream import AsyncEngine
from modelwright.engine.tensor_parallel import Exchange, cut_model
from modelwright.models.gemma import Gemma, GemmaConfig
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.mamba import Mamba, MambaConfig
from modelwright.models.mixtral import Mixtral, MixtralConfig
from modelwright.nn.init import init_weights
from modelwright.tokenizer.bpe import Tokenizer

# Small chunks, and memory for two of the requests below: most of them are preempted.
TIGHT: dict[str, Any] = {"max_tokens_per_step": 24, "num_blocks": 12, "max_context": 100}


@pytest.fixture(scope="module")
def two(model: Llama, tokenizer: Tokenizer) -> Iterator[LLM]:
    llm = LLM(model, tokenizer=tokenizer, config=EngineConfig(tensor_parallel=2, **TIGHT))
    yield llm
    llm.close()


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    text = "the quick brown fox jumps over the lazy dog; pack my box with five liquor jugs"
    return [tokenizer.encode(text[start : start + 20 + 5 * start]) for start in range(0, 12, 2)]


def test_two_processes_give_the_tokens_and_logits_of_one(two: LLM, model: Llama, tokenizer: Tokenizer):
    one = LLM(model, tokenizer=tokenizer, config=EngineConfig(**TIGHT))
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=20, prompt_logprobs=True)
    mine, expected = two.generate(prompts(tokenizer), params), one.generate(prompts(tokenizer), params)
    for a, b in zip(mine, expected, strict=True):
        assert a.token_ids == b.token_ids and a.text == b.text
        assert a.prompt_logprobs is not None and b.prompt_logprobs is not None
        assert a.prompt_logprobs[1:] == pytest.approx(b.prompt_logprobs[1:], abs=1e-4)
        for top, other in zip(a.top_logprobs or (), b.top_logprobs or (), strict=True):
            assert dict(top) == pytest.approx(dict(other), abs=1e-4)
    assert two.stats().num_preemptions > 0
    two.engine.pool.check([])
    drawn = SamplingParams(temperature=1.0, seed=3, max_tokens=20, top_p=0.9)
    assert [c.token_ids for c in two.generate(prompts(tokenizer), drawn)] == [
        c.token_ids for c in one.generate(prompts(tokenizer), drawn)
    ]


def test_each_process_keeps_the_keys_of_its_own_heads(two: LLM, model: Llama):
    whole = sum(pool.numel() for pool in LLM(model, config=EngineConfig(**TIGHT)).engine.runner.pools)
    assert sum(pool.numel() for pool in two.engine.runner.pools) == whole // 2
    assert two.engine.model.layers[0].attention.q.out_features == model.layers[0].attention.q.out_features // 2
    assert two.engine.model.embed.weight is model.embed.weight  # what is not cut is not copied


def test_a_cut_model_is_not_called_outside_of_steps(two: LLM):
    with pytest.raises(ConfigError, match="outside of the engine's steps"):
        two.embed([[5, 6, 7]])
    with pytest.raises(ConfigError, match="adapter 'law' cannot be loaded: tensor_parallel is 2"):
        two.load_adapter("law", "nowhere")
    assert two.generate([[5, 6]], SamplingParams(max_tokens=2))  # and goes on


@needs_bf16
def test_requests_do_not_change_each_other(model_bf16: Llama, tokenizer: Tokenizer):
    settings: dict[str, Any] = {"kv_dtype": "int8", "speculation": SpeculationConfig(is_timed=False)}
    llm = LLM(model_bf16, tokenizer=tokenizer, config=EngineConfig(tensor_parallel=2, **TIGHT, **settings))
    params = [SamplingParams(temperature=t, seed=7, max_tokens=24) for t in (0.0, 0.7, 1.0) * 2]
    together = llm.generate(prompts(tokenizer), params)
    alone = [llm.generate([p], q)[0] for p, q in zip(prompts(tokenizer), params, strict=True)]
    assert [(c.token_ids, c.logprobs) for c in together] == [(c.token_ids, c.logprobs) for c in alone]
    llm.close()


FAMILIES: list[Any] = [
    lambda: Gemma(
        GemmaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
            max_seq_len=64,
        )
    ),
    lambda: Llama(
        LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, attention_bias=True,
            mlp_bias=True, max_seq_len=64,
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("make", FAMILIES)
def test_the_parts_of_a_layer_add_up(make: Any):
    model = init_weights(make(), 0).eval()
    parts = [cut_model(model, rank, Exchange(2)) for rank in (0, 1)]
    x = torch.randn(1, 5, 32)
    for name, module in parts[0].named_modules():
        if type(module).__name__ != "RowPart":
            continue
        whole, other = model.get_submodule(name), parts[1].get_submodule(name)
        inputs = torch.randn(1, 5, whole.in_features)
        halves = inputs.chunk(2, dim=-1)
        added = sum(torch.nn.functional.linear(h, p.weight) for h, p in zip(halves, (module, other), strict=True))
        bias = 0 if whole.bias is None else module.bias
        torch.testing.assert_close(added + bias, whole(inputs))
    first = model.layers[0].attention
    mine = [part.layers[0].attention for part in parts]
    torch.testing.assert_close(torch.cat([a.q(x) for a in mine], -1), first.q(x))
    assert [c.num_kv_heads for c in parts[0].cache_layout()] == [c.num_kv_heads // 2 for c in model.cache_layout()]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel is 0; it must be at least 1"),
        ({"tensor_parallel": 2, "quantize": "int4"}, "tensor_parallel is 2 and quantize"),
        ({"tensor_parallel": 2, "kernels": "native"}, "tensor_parallel is 2 and kernels='native'"),
        ({"tensor_parallel": 2, "speculation": SpeculationConfig("early_exit")}, "early_exit'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        EngineConfig(**settings)


def test_models_that_are_not_cut_are_refused_before_a_process_is_started(model: Llama):
    mamba = Mamba(MambaConfig(vocab_size=64, hidden_size=64, num_layers=1))
    mixed = Mixtral(MixtralConfig(vocab_size=64, hidden_size=32, num_layers=1, num_heads=2))
    for refused, words in (
        (make_model(), "2 key/value heads, which it does not divide"),
        (mamba, "which is not cut here. Serve it by one process"),
        (mixed, "which is not cut here"),
        (rounded(make_model(torch.bfloat16), "int8"), "which is not cut here"),
    ):
        num = 4 if isinstance(refused, Llama) and "divide" in words else 2
        with pytest.raises(ConfigError, match=words):
            Engine(refused, config=EngineConfig(tensor_parallel=num))
    odd = Llama(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=33, num_layers=1, num_heads=2))
    with pytest.raises(ConfigError, match="mlp.gate has 33 outputs, which it does not divide"):
        Engine(odd, config=EngineConfig(tensor_parallel=2))


def test_a_process_that_dies_is_an_error_and_no_wait(model: Llama):
    with AsyncEngine(model, config=EngineConfig(tensor_parallel=2, num_blocks=40)) as engine:
        ((process, _),) = engine.engine._ranks._others  # type: ignore[union-attr]

        async def work() -> None:
            params = SamplingParams(max_tokens=200, ignore_eos=True)
            num = 0
            async for _ in engine.stream_tokens([5, 6, 7], params):
                num += 1
                if num == 3:
                    os.kill(process.pid, signal.SIGKILL)

        started = time.monotonic()
        with pytest.raises(Exception, match="rank 1 has died .exit code -9"):
            asyncio.run(work())
        assert time.monotonic() - started < 30
        assert not engine.is_healthy
        with pytest.raises(DeviceError, match="rank 1 has died"):
            engine.engine.runner.run([])
