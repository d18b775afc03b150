"""GPT-2: names with and without prefix, matrices stored transposed, positions that end; equality is in test_parity."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelwright.base.errors import CheckpointError, ConfigError, RequestError
from modelwright.models.gpt2 import GPT2, GPT2Config
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights

SMALL = GPT2Config(vocab_size=101, hidden_size=32, num_layers=2, num_heads=4, max_seq_len=64)


def random_model(config: GPT2Config = SMALL, seed: int = 0) -> GPT2:
    model = init_weights(GPT2(config), seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def random_ids(length: int = 20) -> torch.Tensor:
    return torch.randint(0, 101, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_is_the_same_model(tied, tmp_path):
    model = random_model(replace(SMALL, tie_embeddings=tied))
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(again(random_ids()).logits, model(random_ids()).logits)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)  # (in, out), q k v side by side
    assert stored["transformer.h.1.mlp.c_proj.weight"].shape == (128, 32)
    assert torch.equal(stored["transformer.h.0.attn.c_attn.weight"][:, :32].T, model.layers[0].attention.q.weight)
    assert ("lm_head.weight" in stored) is not tied
    assert len({p.data_ptr() for p in again.parameters()}) == len(list(again.parameters()))


def test_the_first_release_has_no_prefix_and_saved_masks(tmp_path):
    model = random_model()
    save_model(model, tmp_path)
    stored = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    stored |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)}
    stored |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    save_file(stored, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path)(random_ids()).logits, model(random_ids()).logits)


def test_a_fused_matrix_of_another_size_is_named(tmp_path):
    save_model(random_model(), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["transformer.h.1.attn.c_attn.weight"] = torch.zeros(32, 64)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.attn\.c_attn\.weight has 64 rows"):
        load_model(tmp_path)


def test_positions_are_those_given():
    model = random_model()
    ids = random_ids()
    with torch.no_grad():
        plain = model(ids).logits
        assert torch.equal(model(ids, positions=torch.arange(20)[None]).logits, plain)
        assert (model(ids, positions=torch.arange(5, 25)[None]).logits - plain).abs().max() > 1e-2
    with pytest.raises(RequestError, match="65 tokens; this model reads at most 64"):
        model(random_ids(65))


def test_the_context_can_be_filled_to_the_last_place():
    model = random_model()
    state, ids = model.new_state(2), random_ids(64)
    with torch.no_grad():
        pieces = [model(t, positions=state.positions(t.shape[1]), state=state).logits for t in ids.split(9, dim=1)]
        assert (torch.cat(pieces, 1) - model(ids).logits).abs().max() < 1e-4


def test_config_goes_to_json_and_back():
    config = replace(SMALL, eos_token_id=(0, 2), bos_token_id=1, intermediate_size=48, act="relu", norm_eps=1e-3)
    assert GPT2Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert SMALL.intermediate_size == 128


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"model_type": "gpt_neo"}, "model_type is 'gpt_neo'"),
        ({"n_head": 5}, "heads must divide it evenly"),
        ({"n_layer": None}, "n_layer is None"),
        ({"activation_function": "mish"}, "activation is 'mish'"),
    ],
)
def test_refuses_what_it_does_not_compute(changes, match):
    with pytest.raises(ConfigError, match=match):
        GPT2Config.from_hf({**SMALL.to_hf(), **changes})
