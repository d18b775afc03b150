"""Mixtral, Qwen and DeepSeek with experts: files, configs, refusals, rounding; equality is in test_parity."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.models.deepseek import Deepseek, DeepseekConfig
from modelwright.models.mixtral import Mixtral, MixtralConfig
from modelwright.models.qwen_moe import QwenMoe, QwenMoeConfig
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights
from modelwright.nn.latent_attention import LatentShape
from modelwright.nn.lora import add_lora
from modelwright.nn.moe import MoeOptions
from modelwright.nn.rope import RopeScaling

SIZES = {"vocab_size": 101, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_seq_len": 128}
EXPERTS = MoeOptions(num_experts=4, top_k=2, expert_size=24)
LATENT = LatentShape(kv_rank=12, q_rank=10, nope_dim=6, rope_dim=4, value_dim=10)
YARN = RopeScaling("yarn", 4.0, original_max_seq_len=32, mscale=1.0, mscale_all_dim=0.7)
VARIANTS = {
    "mixtral": MixtralConfig(**SIZES, num_kv_heads=2, experts=EXPERTS, sliding_window=24),
    "mixtral, trained otherwise": MixtralConfig(
        **SIZES,
        experts=replace(EXPERTS, balance_coefficient=0.02, z_coefficient=0.001, capacity_factor=1.25),
        tie_embeddings=True,
    ),
    "qwen2_moe": QwenMoeConfig(
        **SIZES,
        intermediate_size=48,
        experts=replace(EXPERTS, shared_size=16, has_shared_gate=True, is_renormalised=False),
        attention_bias=True,
        family="qwen2_moe",
    ),
    "qwen3_moe": QwenMoeConfig(**SIZES, intermediate_size=48, head_dim=12, experts=EXPERTS, dense_layers=(0, 2)),
    "deepseek_v2": DeepseekConfig(
        **SIZES,
        heads=replace(LATENT, q_rank=None),
        experts=replace(EXPERTS, num_groups=2, num_kept_groups=1, shared_size=48, is_renormalised=False, scale=16.0),
        rope_scaling=YARN,
    ),
    "deepseek_v3": DeepseekConfig(
        **SIZES,
        heads=LATENT,
        experts=replace(EXPERTS, score="sigmoid", num_groups=2, num_kept_groups=2, shared_size=24, scale=2.5),
        num_dense_layers=2,
        family="deepseek_v3",
    ),
}
CLASS_OF = {MixtralConfig: Mixtral, QwenMoeConfig: QwenMoe, DeepseekConfig: Deepseek}


def random_model(name: str, seed: int = 0):
    model = init_weights(CLASS_OF[type(VARIANTS[name])](VARIANTS[name]), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (*model.parameters(), *(b for n, b in model.named_buffers() if "correction" in n)):
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def random_ids(length: int = 40) -> torch.Tensor:
    return torch.randint(0, 101, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_and_loaded_is_the_same_model(name, tmp_path):
    model = random_model(name)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(random_ids()).logits, model(random_ids()).logits)


@pytest.mark.parametrize("name", VARIANTS)
def test_config_goes_to_json_and_back(name):
    config = replace(VARIANTS[name], eos_token_id=(0, 2), bos_token_id=1)
    assert type(config).from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_experts_are_published_one_by_one(tmp_path):
    expected = {
        "mixtral": "model.layers.2.block_sparse_moe.experts.3.w2.weight",
        "qwen3_moe": "model.layers.1.mlp.experts.3.down_proj.weight",
        "deepseek_v3": "model.layers.2.mlp.gate.e_score_correction_bias",
    }
    for name, tensor in expected.items():
        save_model(random_model(name), tmp_path / name)
        assert tensor in load_file(tmp_path / name / "model.safetensors")


def test_a_missing_expert_is_named(tmp_path):
    save_model(random_model("mixtral"), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*layers\.1\.block_sparse_moe\.experts\.2\.w3"):
        load_model(tmp_path)


def test_the_module_that_predicts_two_tokens_is_passed_over(tmp_path):
    model = random_model("deepseek_v3")
    save_model(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.3.eh_proj.weight"] = torch.zeros(32, 64)
    save_file(stored, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path)(random_ids()).logits, model(random_ids()).logits)


def test_the_scale_of_scores_has_the_square_of_the_temperature():
    plain = replace(VARIANTS["deepseek_v2"], rope_scaling=None)
    assert plain.scale == 10**-0.5
    temperature = 0.1 * 0.7 * torch.log(torch.tensor(4.0)) + 1
    assert VARIANTS["deepseek_v2"].scale == pytest.approx(float(10**-0.5 * temperature**2))
    unweighted = replace(plain, rope_scaling=replace(YARN, mscale_all_dim=None))
    assert unweighted.scale == plain.scale


@pytest.mark.peer
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_bfloat16_is_as_near_to_float32_as_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_model(name)
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    ids = random_ids(100)
    with torch.no_grad():
        exact = model(ids).logits
        mine = (model.to(torch.bfloat16)(ids).logits.float() - exact).abs().mean()
        other = (theirs(ids).logits.float() - exact).abs().mean()
    assert mine < 1.2 * other


def test_adapters_leave_the_router_alone():
    model = random_model("qwen3_moe")
    names = add_lora(model, ("gate", "up", "down"))
    assert len(names) == 3 * 2 + 3 * 4  # two dense layers, four experts
    assert not any("router" in name for name in names)


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("mixtral", {"num_experts_per_tok": 5}, "among 4 experts"),
        ("mixtral", {"partial_rotary_factor": 0.5}, "whole heads"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen2_moe", {"num_key_value_heads": 3}, "must divide the query heads"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size is None"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "as many of both"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias is True"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave is False"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("deepseek_v3", {"n_group": 3}, "groups must divide"),
        ("deepseek_v3", {"model_type": "deepseek_v4"}, "model_type is 'deepseek_v4'"),
    ],
)
def test_refuses_what_it_does_not_compute(name, changes, match):
    with pytest.raises(ConfigError, match=match):
        type(VARIANTS[name]).from_hf({**VARIANTS[name].to_hf(), **changes})


@pytest.mark.parametrize(
    ("name", "experts", "match"),
    [
        ("mixtral", {"shared_size": 8}, "without groups, scale or shared expert"),
        ("qwen2_moe", {"has_shared_gate": False}, "behind a gate"),
        ("qwen3_moe", {"shared_size": 8}, "qwen3_moe has none"),
        ("qwen3_moe", {"scale": 2.0}, "without groups or scale"),
        ("deepseek_v2", {"is_renormalised": True}, "V2 does not renormalise"),
        ("deepseek_v3", {"score": "softmax"}, "chooses by sigmoid"),
        ("deepseek_v3", {"shared_size": 25}, "as wide as one, two, three"),
    ],
)
def test_refuses_experts_of_another_family(name, experts, match):
    config = VARIANTS[name]
    with pytest.raises(ConfigError, match=match):
        replace(config, experts=replace(config.experts, **experts))
