"""Every causal family in the engine: pages, states, chunks and shared prefixes give what stepping gives, greedily."""

from dataclasses import replace

import pytest
import torch
from tests.engine.conftest import needs_bf16

from modelwright.base.errors import ConfigError
from modelwright.base.types import SamplingParams
from modelwright.engine.engine import EngineConfig
from modelwright.engine.llm import LLM
from modelwright.engine.prepare import rounded
from modelwright.engine.speculative import SpeculationConfig
from modelwright.models.deepseek import Deepseek, DeepseekConfig
from modelwright.models.gemma import Gemma, Gemma1, GemmaConfig, GemmaRope
from modelwright.models.gpt2 import GPT2, GPT2Config
from modelwright.models.hybrid import Hybrid, HybridConfig
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.mamba import Mamba, MambaConfig
from modelwright.models.mixtral import Mixtral, MixtralConfig
from modelwright.models.phi3 import Phi3, Phi3Config
from modelwright.models.qwen_moe import QwenMoe, QwenMoeConfig
from modelwright.models.rwkv import Rwkv, RwkvConfig
from modelwright.nn.init import init_weights
from modelwright.nn.latent_attention import LatentShape
from modelwright.nn.moe import MoeOptions
from modelwright.nn.rope import RopeScaling
from modelwright.nn.ssd import SsdShape

VOCAB_SIZE = 97
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_seq_len": 160}
WIDE = SIZES | {"intermediate_size": 48, "num_kv_heads": 2}
EXPERTS = MoeOptions(num_experts=4, top_k=2, expert_size=24)
LATENT = LatentShape(kv_rank=12, q_rank=10, nope_dim=6, rope_dim=4, value_dim=10)
GEMMA = GemmaConfig(**WIDE, head_dim=12, sliding_window=24, full_layers=(1,))

FAMILIES = {
    "llama": (Llama, LlamaConfig(**WIDE)),
    "mistral, window": (Llama, LlamaConfig(**WIDE, family="mistral", sliding_window=24)),
    "qwen3": (Llama, LlamaConfig(**WIDE, family="qwen3", head_dim=12)),
    "gemma": (Gemma1, replace(GEMMA, family="gemma", sliding_window=None, full_layers=())),
    "gemma2": (Gemma, replace(GEMMA, attention_softcap=5.0, logit_softcap=30.0)),
    "gemma3": (Gemma, replace(GEMMA, family="gemma3_text", rope=GemmaRope(1e6, 1e4, RopeScaling("linear", 4.0)))),
    "phi3": (Phi3, Phi3Config(**WIDE, sliding_window=24, rotary_fraction=0.5)),
    "gpt2": (GPT2, GPT2Config(**SIZES)),
    "mixtral": (Mixtral, MixtralConfig(**SIZES, num_kv_heads=2, experts=EXPERTS, sliding_window=24)),
    "qwen2_moe": (
        QwenMoe,
        QwenMoeConfig(
            **WIDE,
            experts=replace(EXPERTS, shared_size=16, has_shared_gate=True, is_renormalised=False),
            attention_bias=True,
            family="qwen2_moe",
        ),
    ),
    "qwen3_moe": (QwenMoe, QwenMoeConfig(**WIDE, experts=EXPERTS, dense_layers=(0,))),
    "deepseek_v2": (
        Deepseek,
        DeepseekConfig(
            **SIZES, heads=replace(LATENT, q_rank=None), experts=replace(EXPERTS, shared_size=24, is_renormalised=False)
        ),
    ),
    "deepseek_v3": (
        Deepseek,
        DeepseekConfig(
            **SIZES,
            heads=LATENT,
            experts=replace(EXPERTS, score="sigmoid", num_groups=2, num_kept_groups=2, shared_size=24, scale=2.5),
            rope_scaling=RopeScaling("yarn", 2.5, original_max_seq_len=64, mscale=1.0, mscale_all_dim=1.0),
            family="deepseek_v3",
        ),
    ),
}
RECURRENT = {
    "mamba": (Mamba, MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_layers=2)),
    "rwkv": (Rwkv, RwkvConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_layers=2)),
    "hybrid": (
        Hybrid,
        HybridConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            num_layers=2,
            attention_layers=(1,),
            mixer=SsdShape(num_heads=4, head_dim=16, state_size=8),
        ),
    ),
}
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
CUTTINGS = {
    "whole": EngineConfig(max_context=160),
    "chunks of 7, blocks of 5": EngineConfig(max_context=160, max_tokens_per_step=7, block_size=5),
}


def make_model(family: str, dtype: torch.dtype = torch.float32):
    model_class, config = (FAMILIES | RECURRENT)[family]
    model = init_weights(model_class(config), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.15 * torch.randn(p.shape, generator=generator)  # so that what comes next depends on the past
    return model.to(dtype).eval()


def make_prompts() -> list[list[int]]:
    """Prompts far shorter and far longer than the windows; two of them begin alike."""
    generator = torch.Generator().manual_seed(2)
    long = torch.randint(VOCAB_SIZE, (120,), generator=generator).tolist()
    return [long, long[:60] + long[70:75], [5], long[30:53]]


@torch.inference_mode()
def step_greedily(model, prompt: list[int], count: int) -> list[int]:
    """The plain twin: the prompt at once, then token by token through a dense state."""
    state, piece, out = model.new_state(1), torch.tensor([prompt]), []
    for _ in range(count):
        logits = model(piece, positions=state.positions(piece.shape[1]), state=state, last_only=True).logits
        out.append(int(logits[0, -1].argmax()))
        piece = torch.tensor([[out[-1]]])
    return out


@pytest.mark.parametrize("cutting", CUTTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_writes_what_stepping_writes(family, cutting):
    model, prompts = make_model(family), make_prompts()
    expected = [step_greedily(model, prompt, 16) for prompt in prompts]
    assert len(set(map(tuple, expected))) == len(prompts), "the model's answers depend on the prompt"
    llm = LLM(model, config=CUTTINGS[cutting])
    assert [list(c.token_ids) for c in llm.generate(prompts, GREEDY)] == expected
    assert [list(c.token_ids) for c in llm.generate(prompts, GREEDY)] == expected, "from cached prefixes"
    llm.engine.pool.check([])


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_equal_those_of_one_forward_pass(family):
    model, prompt = make_model(family), make_prompts()[0]
    completion = LLM(model, config=CUTTINGS["chunks of 7, blocks of 5"]).generate(prompt, GREEDY)[0]
    ids = torch.tensor([prompt + list(completion.token_ids)])
    with torch.inference_mode():
        rows = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1], -1)
    expected = rows.gather(1, ids[0, len(prompt) :, None])[:, 0]
    assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_pools_hold_what_the_layout_says(family):
    model = make_model(family)
    llm = LLM(model, config=EngineConfig(max_context=160, num_blocks=20, block_size=4))
    pools = llm.engine.runner.pools
    for pool, cache in zip(pools, model.cache_layout(), strict=True):
        assert pool.shape == (80, cache.num_kv_heads, cache.key_dim + cache.value_dim)
    if family == "deepseek_v3":
        assert pools[0].shape[1:] == (4, 10 + 10)
    state = model.new_state(1)
    ids = torch.zeros(1, 8, dtype=torch.long)
    with torch.inference_mode():
        model(ids, positions=state.positions(8), state=state)
    for i, cache in enumerate(model.cache_layout()):
        keys, values = state._keys[i]
        assert keys.shape[2:] == (cache.num_kv_heads, cache.key_dim)
        assert values.shape[2:] == (cache.num_kv_heads, cache.value_dim)


@pytest.mark.parametrize("family", ["mistral, window", "gemma2", "gemma3", "phi3", "mixtral"])
def test_a_window_that_is_ignored_would_show(family):
    """Negative control: the same weights without the window write something else."""
    model = make_model(family)
    model_class, config = FAMILIES[family]
    changes = {"sliding_window": None} | ({"full_layers": ()} if model_class is Gemma else {})
    if family == "gemma3":  # its windowed layers turn by the other angles, so the window is widened instead
        changes = {"sliding_window": 160}
    blind = model_class(replace(config, **changes)).eval()
    blind.load_state_dict(model.state_dict())
    prompt = make_prompts()[0]
    assert step_greedily(model, prompt, 16) != step_greedily(blind, prompt, 16)


@pytest.mark.parametrize("cutting", ["whole", "chunks of 7, blocks of 5", "too little memory"])
@pytest.mark.parametrize("family", RECURRENT)
def test_a_recurrent_model_writes_what_stepping_writes(family, cutting):
    model, prompts = make_model(family), make_prompts()
    expected = [step_greedily(model, prompt, 40) for prompt in prompts]
    assert len(set(map(tuple, expected))) == len(prompts), "the model's answers depend on the prompt"
    tight = EngineConfig(max_context=170, num_blocks=23, block_size=8, max_tokens_per_step=40)
    llm = LLM(model, config=CUTTINGS.get(cutting, tight))
    params = replace(GREEDY, max_tokens=40)
    assert [list(c.token_ids) for c in llm.generate(prompts, params)] == expected
    assert [list(c.token_ids) for c in llm.generate(prompts, params)] == expected
    assert (llm.stats().num_preemptions > 0) == (cutting == "too little memory")
    assert llm.stats().cached_tokens == 0, "a state is that of one position: prefixes are not shared"
    llm.engine.pool.check([])


@needs_bf16
@pytest.mark.parametrize("family", RECURRENT)
def test_states_are_the_same_bits_however_the_work_is_cut(family):
    model, prompts = make_model(family, torch.bfloat16), make_prompts()
    params = [SamplingParams(temperature=t, seed=i, max_tokens=40) for i, t in enumerate((0.0, 0.8, 1.0, 0.8))]
    alone = [LLM(model).generate(p, q)[0] for p, q in zip(prompts, params, strict=True)]
    for cutting in (*CUTTINGS.values(), EngineConfig(max_context=170, num_blocks=24, block_size=8)):
        together = LLM(model, config=cutting).generate(prompts, params)
        assert [(c.token_ids, c.logprobs) for c in together] == [(c.token_ids, c.logprobs) for c in alone]


@needs_bf16
@pytest.mark.parametrize("kernels", [None, "plain"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("family", ["gpt2", "mamba", "hybrid"])
def test_rounded_weights_give_the_same_bits_in_any_company(family, quantize, kernels):
    model = rounded(make_model(family, torch.bfloat16), quantize)
    prompts = [p[: 5 + 9 * i] for i, p in enumerate(make_prompts() * 6)]  # steps of 1 to 24 rows, and more at first
    params = [SamplingParams(temperature=0.8, seed=i, max_tokens=6) for i in range(len(prompts))]
    config = EngineConfig(kernels=kernels, max_context=170)
    llm = LLM(model, config=config)
    alone = [llm.generate(p, q)[0] for p, q in zip(prompts, params, strict=True)]
    together = LLM(model, config=replace(config, max_tokens_per_step=48)).generate(prompts, params)
    assert [(c.token_ids, c.logprobs) for c in together] == [(c.token_ids, c.logprobs) for c in alone]


def test_what_a_state_cannot_do_is_refused_by_name():
    model = make_model("mamba")
    with pytest.raises(ConfigError, match="'one' cannot be loaded: a Mamba has a recurrent state.*Merge it into the"):
        LLM(model).load_adapter("one", "unread")
    with pytest.raises(ConfigError, match="speculation is set, and a Mamba keeps a recurrent state: it cannot go back"):
        LLM(model, config=EngineConfig(speculation=SpeculationConfig()))
    with pytest.raises(ConfigError, match="kv_dtype is set, and a Mamba .* there are no keys and values"):
        LLM(model, config=EngineConfig(kv_dtype="int8"))
    assert len(LLM(make_model("hybrid"), config=EngineConfig(kv_dtype="int8")).generate([[1, 2]], GREEDY)) == 1
