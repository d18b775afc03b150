"""Gemma: which layers see what, how numbers are rounded, adapters that keep the scale; equality is in test_parity."""

import json
from dataclasses import replace

import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.models.gemma import Gemma, Gemma1, GemmaConfig, GemmaRope
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights
from modelwright.nn.lora import add_lora, lora_parameters, merge_lora
from modelwright.nn.rope import RopeScaling

SMALL = GemmaConfig(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=96,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_seq_len=256,
    attention_softcap=5.0,
    logit_softcap=3.0,
    sliding_window=24,
    full_layers=(1, 3),
)
GEMMA3 = replace(
    SMALL,
    family="gemma3_text",
    num_layers=7,
    attention_softcap=None,
    logit_softcap=None,
    full_layers=(5,),
    rope=GemmaRope(1_000_000.0, 10_000.0, RopeScaling("linear", 8.0)),
)
GEMMA1 = replace(SMALL, family="gemma", attention_softcap=None, logit_softcap=None, sliding_window=None, full_layers=())
VARIANTS = {"gemma": GEMMA1, "gemma2": SMALL, "gemma3_text": GEMMA3, "gemma2 without caps and windows": GEMMA1}
VARIANTS["gemma2 without caps and windows"] = replace(GEMMA1, family="gemma2", query_size=20.0)


def random_model(config: GemmaConfig, seed: int = 0) -> Gemma:
    model = init_weights((Gemma1 if config.family == "gemma" else Gemma)(config), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def random_ids(length: int = 60, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 101, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_and_loaded_is_the_same_model(name, tmp_path):
    model = random_model(VARIANTS[name])
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(random_ids()).logits, model(random_ids()).logits)


@pytest.mark.parametrize("name", VARIANTS)
def test_config_goes_to_json_and_back(name):
    config = replace(VARIANTS[name], eos_token_id=(1, 106), bos_token_id=2, pad_token_id=0)
    assert GemmaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_the_pattern_of_windows_where_the_config_names_no_layers():
    """Every second layer of Gemma 2 is full, and every sixth of Gemma 3."""
    for config, every in ((SMALL, 2), (GEMMA3, 6)):
        values = {k: v for k, v in config.to_hf().items() if k != "layer_types"} | {"num_hidden_layers": 13}
        read = GemmaConfig.from_hf(values)
        assert [i for i in range(13) if read.window(i) is None] == list(range(every - 1, 13, every))
        assert read.window(0) == 24
    values = {k: v for k, v in GEMMA3.to_hf().items() if k != "layer_types"} | {"sliding_window_pattern": 3}
    assert GemmaConfig.from_hf(values).full_layers == (2, 5)


@pytest.mark.parametrize("config", [SMALL, GEMMA3])
def test_a_windowed_layer_is_blind_beyond_it_and_a_full_one_is_not(config):
    """Four tokens' reach: with windows alone, what stands further back than all windows together changes nothing."""
    blind = random_model(replace(config, num_layers=2, full_layers=(), sliding_window=4))
    seeing = random_model(replace(config, num_layers=2, full_layers=(1,), sliding_window=4))
    ids = random_ids(40, batch=1)
    changed = ids.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 101
    with torch.no_grad():
        gap = [(m(ids).logits - m(changed).logits).abs().amax(-1)[0] for m in (blind, seeing)]
    assert gap[0][:7].min() > 0 and gap[0][7:].max() == 0  # each of two layers reaches 3 back
    assert gap[1][-1] > 0


def test_local_and_global_layers_turn_by_their_own_angles():
    ids, positions = random_ids(), torch.arange(60)[None] * 3
    model = random_model(GEMMA3)
    with torch.no_grad():
        rope = model.positional(model.embed_tokens(ids, None), positions, None)
        assert not torch.equal(rope.full[0], rope.local[0])
        assert torch.equal(rope.local[0], random_model(GEMMA3).local_rope(60, positions)[0])
        # The stretched rotation is that of the full layers: position 8 there is position 1 unstretched.
        plain = random_model(replace(GEMMA3, rope=GemmaRope(1_000_000.0, 10_000.0))).rope(2)
        assert torch.allclose(model.rope(9)[0][0, 8], plain[0][0, 1])


def test_the_scale_of_the_embedding_is_rounded_to_the_weights():
    config = replace(GEMMA1, hidden_size=3072, num_layers=1, intermediate_size=8, vocab_size=5)
    model = Gemma1(config)
    with torch.no_grad():
        model.embed.weight.fill_(1.0)
    assert model.embed_tokens(torch.zeros(1, 1, dtype=torch.long), None)[0, 0, 0] == 3072**0.5
    assert model.bfloat16().embed_tokens(torch.zeros(1, 1, dtype=torch.long), None)[0, 0, 0] == 55.5


def test_caps_bound_what_they_should():
    model = random_model(SMALL)
    with torch.no_grad():
        model.embed.weight.mul_(30)
        logits = model(random_ids()).logits
    assert logits.abs().max() <= 3.0 and logits.abs().max() > 2.9


def test_adapters_merge_to_the_same_function():
    """What reads the scaled embedding, is normed after and capped stays right when an adapter is merged."""
    for config in (SMALL, GEMMA3):
        model = random_model(config)
        before = model(random_ids()).logits
        assert len(add_lora(model, ("all-linear",), rank=4)) == 7 * config.num_layers  # the tied head is left out
        with torch.no_grad():
            for p in lora_parameters(model):
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
            adapted = model(random_ids()).logits
            merge_lora(model)
            assert (model(random_ids()).logits - adapted).abs().max() < 1e-4
        assert (adapted - before).abs().max() > 1e-2


@pytest.mark.parametrize("name", VARIANTS)
def test_first_weights_leave_nothing_as_it_was(name):
    """On the meta device nothing is set: norms begin at zero (a scale of one), tables are computed."""
    config = VARIANTS[name]
    with torch.device("meta"):
        model = (Gemma1 if config.family == "gemma" else Gemma)(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    init_weights(model, 0)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not model.layers[0].attention_norm.weight.any()
    assert model.lm_head.weight is model.embed.weight
    fresh = init_weights((Gemma1 if config.family == "gemma" else Gemma)(config), 0)
    assert torch.equal(model(random_ids()).logits, fresh(random_ids()).logits)


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma2", {"attention_bias": True}, "attention_bias is True"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("gemma2", {"layer_types": ["full_attention"]}, "for each of 4 layers"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "Gemma 3 has none"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "'linear'"),
        ("gemma", {"num_key_value_heads": 3}, "must divide the query heads"),
        ("gemma", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("gemma", {"model_type": "gemma4"}, "model_type is 'gemma4'"),
    ],
)
def test_refuses_what_it_does_not_compute(family, changes, match):
    with pytest.raises(ConfigError, match=match):
        GemmaConfig.from_hf({**VARIANTS[family].to_hf(), **changes})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"full_layers": (4,)}, "from 0 to 3"),
        ({"sliding_window": None}, "only where there is a window"),
        ({"family": "gemma"}, "first Gemma has no window"),
        ({"rope": GemmaRope(1e6, 1e4)}, "differ in gemma3_text alone"),
        ({"logit_softcap": 0.0}, "logit_softcap is 0.0"),
    ],
)
def test_refuses_contradictory_settings(changes, match):
    with pytest.raises(ConfigError, match=match):
        replace(SMALL, **changes)
