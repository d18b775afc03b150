"""Phi-3: fused matrices, part of a head, factors that change with the length; equality is in test_parity."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.models.phi3 import Phi3, Phi3Config
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights
from modelwright.nn.rope import RopeScaling

SMALL = Phi3Config(
    vocab_size=101, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=256
)
FACTORS = {"short_factor": (1.0,) * 8, "long_factor": tuple(1 + i / 2 for i in range(8))}
LONG = replace(SMALL, rope_scaling=RopeScaling("longrope", 4.0, original_max_seq_len=64, **FACTORS))
VARIANTS = {
    "plain": SMALL,
    "half of a head": replace(SMALL, rotary_fraction=0.5, tie_embeddings=True),
    "window": replace(SMALL, sliding_window=40, norm_eps=1e-3),
    "longrope": LONG,
}


def random_model(config: Phi3Config = SMALL, seed: int = 0) -> Phi3:
    model = init_weights(Phi3(config), seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def random_ids(length: int = 50) -> torch.Tensor:
    return torch.randint(0, 101, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_and_loaded_is_the_same_model(name, tmp_path):
    model = random_model(VARIANTS[name])
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(random_ids()).logits, model(random_ids()).logits)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.0.self_attn.qkv_proj.weight"].shape == (64 + 2 * 32, 64)
    up = stored["model.layers.1.mlp.gate_up_proj.weight"][96:]
    assert torch.equal(up, model.layers[1].mlp.up.weight)


def test_a_fused_matrix_of_another_size_is_named(tmp_path):
    save_model(random_model(), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.0.mlp.gate_up_proj.weight"] = torch.zeros(96, 64)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"gate_up_proj\.weight has 96 rows.*96 \+ 96 = 192"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_config_goes_to_json_and_back(name):
    config = replace(VARIANTS[name], eos_token_id=(0, 2), bos_token_id=1)
    assert Phi3Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("old", ["su", "yarn", "longrope"])
def test_the_first_names_of_longrope_are_read(old):
    values = LONG.to_hf()
    values["rope_scaling"] = {"type": old, **{k: list(v) for k, v in FACTORS.items()}}
    assert Phi3Config.from_hf(values) == LONG


def test_the_part_that_is_not_rotated_sees_no_position():
    """With nothing but that part in q and k, the order of the past does not matter to the last token."""
    model = random_model(replace(SMALL, rotary_fraction=0.5, num_layers=1))
    with torch.no_grad():
        for linear in (model.layers[0].attention.q, model.layers[0].attention.k):
            linear.weight.view(-1, 16, 64)[:, :8] = 0
        ids = random_ids()
        swapped = torch.cat((ids[:, :-1].flip(1), ids[:, -1:]), 1)
        assert (model(ids, last_only=True).logits - model(swapped, last_only=True).logits).abs().max() < 1e-5
        whole = random_model(replace(SMALL, num_layers=1))
        assert (whole(ids, last_only=True).logits - whole(swapped, last_only=True).logits).abs().max() > 1e-3


def test_long_factors_begin_beyond_the_original_length():
    model, short = random_model(LONG), random_model(SMALL)
    factor = (1 + torch.log(torch.tensor(4.0)) / torch.log(torch.tensor(64.0))).sqrt()
    with torch.no_grad():
        assert torch.allclose(model.rope(64)[0], short.rope(64)[0] * factor)  # short factors of 1
        assert not torch.allclose(model.rope(65)[0], short.rope(65)[0] * factor)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_key_value_heads": 3}, "must divide the query heads"),
        ({"hidden_size": 66}, "must divide it evenly"),
        ({"partial_rotary_factor": 0.2}, "rotary_fraction is 0.2 of heads of 16"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "longrope only"),
        ({"sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_refuses_what_it_does_not_compute(changes, match):
    with pytest.raises(ConfigError, match=match):
        Phi3Config.from_hf({**SMALL.to_hf(), **changes})


def test_refuses_to_write_a_factor_that_published_files_cannot_say():
    with pytest.raises(ConfigError, match="factor 2.0"):
        replace(LONG, rope_scaling=replace(LONG.rope_scaling, factor=2.0)).to_hf()
