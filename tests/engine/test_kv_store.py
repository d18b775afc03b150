"""A rounded cache: how far off it is, how much smaller, and that rounding changes nothing else."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.conftest import TEXT, make_model, needs_bf16

from modelwright.base.errors import ConfigError
from modelwright.base.types import SamplingParams
from modelwright.engine.engine import Engine, EngineConfig
from modelwright.engine.kv_store import KV_DTYPES, RoundedStore, make_store
from modelwright.engine.llm import LLM
from modelwright.engine.runner import Runner
from modelwright.models.decoder import LayerCache
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.llama2c import read_llama2c
from modelwright.tokenizer.bpe import Tokenizer

CPU = torch.device("cpu")
WEIGHTS = Path(os.environ.get("MODELWRIGHT_DATA", "/nonexistent")) / "weights"
needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="MODELWRIGHT_DATA is not set")
STEPS = {"int8": 1 / 254, "int4": 1 / 30}  # half a step, of the largest (8 bits) or of the range (4 bits)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.0, 0.02, 1.0, 300.0]), kv_dtype=st.sampled_from(KV_DTYPES))
def test_what_is_read_is_what_was_written_within_half_a_step(seed: int, scale: float, kv_dtype: str):
    generator = torch.Generator().manual_seed(seed)
    store = RoundedStore(10, LayerCache(2, 8, 6), kv_dtype, CPU)
    k, v = (torch.randn(3, 2, size, generator=generator) * scale for size in (8, 6))
    store.write(torch.tensor([7, 1, 4]), k, v)
    keys, values = store.read(torch.tensor([[7, 1, 4]]), torch.float32)
    for x, read in ((k, keys), (v, values)):
        span = 2 * x.abs().amax(-1) if kv_dtype == "int8" else x.amax(-1) - x.amin(-1)
        bound = (span * STEPS[kv_dtype] * (1.1 if kv_dtype == "int4" else 0.6) + 1e-6)[..., None]
        assert ((read[0].transpose(0, 1) - x).abs() <= bound + x.abs() * 2e-3).all()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_head_with_an_outlier_does_not_spoil_its_neighbours(kv_dtype: str):
    store = RoundedStore(2, LayerCache(2, 8, 8), kv_dtype, CPU)
    x = torch.linspace(-1, 1, 16).view(1, 2, 8).clone()
    x[0, 0, 3] = 1000.0
    store.write(torch.tensor([1]), x, x)
    keys, _ = store.read(torch.tensor([[1]]), torch.float32)
    assert (keys[0, 1, 0] - x[0, 1]).abs().max() < 0.05
    assert abs(keys[0, 0, 0, 3] - 1000) < 5


def test_slots_of_zeros_are_zeros_in_every_form():
    for kv_dtype in (None, *KV_DTYPES):
        store = make_store(4, LayerCache(1, 4, 4), torch.bfloat16, CPU, kv_dtype)
        store.pool[:] = 0
        keys, values = store.read(torch.tensor([[0, 2]]), torch.bfloat16)
        assert not keys.any() and not values.any() and keys.dtype == torch.bfloat16


def test_memory_of_a_block():
    config = LlamaConfig(vocab_size=64, hidden_size=256, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=128)
    model = Llama(config)
    sizes = [Runner.block_bytes(model, torch.bfloat16, 16, kv_dtype) for kv_dtype in (None, *KV_DTYPES)]
    assert [size / sizes[0] for size in sizes] == [1.0, 260 / 512, 136 / 512]
    blocks = [
        Engine(model.bfloat16(), config=EngineConfig(kv_cache_bytes=2**21, kv_dtype=kv_dtype)).pool.num_blocks
        for kv_dtype in (None, *KV_DTYPES)
    ]
    assert blocks == [64, 126, 240]  # nearly twice and four times as many in the same memory


@needs_bf16
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_same_bits_however_the_work_is_cut(model_bf16: Llama, tokenizer: Tokenizer, kv_dtype: str):
    prompts = [TEXT[i : i + 20 + 7 * i] for i in range(8)]
    params = [SamplingParams(temperature=(0.0, 0.8)[i % 2], seed=i, max_tokens=24, logprobs=1) for i in range(8)]

    def answers(together: bool, **sizes: int) -> list:
        llm = LLM(model_bf16, tokenizer=tokenizer, config=EngineConfig(kv_dtype=kv_dtype, **sizes))
        if together:
            done = llm.generate(prompts, params) + llm.generate(prompts, params)  # the second time from the cache
        else:
            done = [llm.generate(p, q)[0] for p, q in zip(prompts, params, strict=True)] * 2
        assert "num_blocks" not in sizes or llm.stats().num_preemptions > 0
        llm.engine.pool.check([])
        return [(c.token_ids, c.logprobs) for c in done]

    alone = answers(False)
    assert answers(True) == alone
    assert answers(True, max_tokens_per_step=13, num_blocks=14) == alone
    exact = LLM(model_bf16, tokenizer=tokenizer).generate(prompts, params)
    assert [c.logprobs for c in exact] != [logprobs for _, logprobs in alone[:8]], "it does round"


@pytest.mark.parametrize(("kv_dtype", "bound"), [("int8", 0.02), ("int4", 0.6)])
def test_how_far_log_probabilities_move(model: Llama, tokenizer: Tokenizer, kv_dtype: str, bound: float):
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=True)
    exact, rounded = (
        LLM(model, tokenizer=tokenizer, config=EngineConfig(kv_dtype=d)).generate(TEXT * 2, params)[0].prompt_logprobs
        for d in (None, kv_dtype)
    )
    assert exact is not None and rounded is not None
    differences = [abs(a - b) for a, b in zip(exact[1:], rounded[1:], strict=True)]  # type: ignore[operator]
    assert 0 < sum(differences) / len(differences) < bound


@needs_weights
@pytest.mark.parametrize(
    ("weights", "kv_dtype", "mean", "worst", "agreement"),
    [
        ("babyllama105/model5000.bin", "int8", 6e-4, 0.02, 0.97),
        ("babyllama105/model5000.bin", "int4", 0.06, 1.5, 0.85),
        ("stories260K/stories260K.bin", "int8", 5e-3, 0.2, 0.97),
    ],
)
def test_a_trained_model_keeps_its_mind(weights: str, kv_dtype: str, mean: float, worst: float, agreement: float):
    """Kullback-Leibler divergence over a whole context of a published model's own story, and its greedy tokens.

    The bounds are about twice what was measured (docs/engine.md); heads have 16 numbers and 8.
    """
    model, ids = story(weights)
    exact, rounded = (logits_of(model, ids, d) for d in (None, kv_dtype))
    divergence = (exact.exp() * (exact - rounded)).sum(-1)  # (T,)
    late = divergence[len(ids) * 3 // 4 :].mean()  # errors do not pile up towards the end of the context
    assert 0 < float(divergence.mean()) < mean and float(divergence.max()) < worst and float(late) < 2 * mean
    same = (exact.argmax(-1) == rounded.argmax(-1)).float().mean()
    assert float(same) > agreement
    if weights.startswith("babyllama") and kv_dtype == "int8":
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        first, second = (
            LLM(model, config=EngineConfig(kv_dtype=d)).generate([ids[:32]], params)[0] for d in (None, kv_dtype)
        )
        assert first.token_ids == second.token_ids


@needs_weights
def test_four_bits_for_heads_of_eight_numbers_are_too_few_and_the_measure_says_so():
    model, ids = story("stories260K/stories260K.bin")
    exact, rounded = (logits_of(model, ids, d) for d in (None, "int4"))
    assert 0.1 < float((exact.exp() * (exact - rounded)).sum(-1).mean()) < 1.0


def story(weights: str) -> tuple[Llama, list[int]]:
    """A small published model and a text of its own that fills its context."""
    model = read_llama2c(WEIGHTS / weights).to(torch.bfloat16)
    length = model.config.max_seq_len - 2
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=length, ignore_eos=True)
    return model, [1, *LLM(model).generate([[1]], params)[0].token_ids]


def logits_of(model: Llama, ids: list[int], kv_dtype: str | None) -> torch.Tensor:
    engine = Engine(model, config=EngineConfig(kv_dtype=kv_dtype, max_tokens_per_step=512))
    engine.submit(engine.check(ids, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=True)))
    return torch.log_softmax(engine.runner.run(engine.scheduler.schedule()).float(), -1)


def test_what_cannot_be_rounded_is_refused_by_name():
    with pytest.raises(ConfigError, match="kv_dtype is 'int2'; known: int8, int4"):
        EngineConfig(kv_dtype="int2")
    with pytest.raises(ConfigError, match="heads have 5 and 4 numbers; two of them share a byte"):
        make_store(2, LayerCache(1, 5, 4), torch.bfloat16, CPU, "int4")
    with pytest.raises(ConfigError, match="kernels='native' cannot be"):
        Engine(make_model(torch.bfloat16), config=EngineConfig(kv_dtype="int8", kernels="native"))
