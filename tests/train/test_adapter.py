"""Adapters in PEFT's format: ours come back unchanged, ours load in PEFT, and theirs load here."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.weights import load_model, save_model
from modelwright.nn.linear import replace_module
from modelwright.nn.lora import LoraLinear, add_lora, lora_layers, lora_parameters, lora_state, merge_lora
from modelwright.train.adapter import load_adapter, save_adapter

IDS = torch.arange(24).view(2, 12) % 64


def small_llama(*, tie_embeddings=True, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        tie_embeddings=tie_embeddings,
    )
    return Llama(config).eval()


def shake(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(std=0.2)


@pytest.mark.parametrize("use_rslora", [True, False])
def test_saved_adapters_come_back_unchanged(tmp_path, use_rslora):
    model = small_llama()
    names = add_lora(model, ("q", "v", "down"), rank=4, alpha=6, use_rslora=use_rslora, dropout=0.1)
    shake(model)
    save_adapter(model, tmp_path, base_model="somewhere")
    other = small_llama()
    assert load_adapter(other, tmp_path) == names
    for name, tensor in lora_state(model).items():
        assert torch.equal(lora_state(other)[name], tensor)
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, model(IDS).logits)
    assert {n for n, p in other.named_parameters() if p.requires_grad} == set(lora_state(other))


def test_the_files_are_those_of_peft(tmp_path):
    model = small_llama()
    add_lora(model, ("q", "layers.1.mlp.up"), rank=4, alpha=8)
    save_adapter(model, tmp_path, base_model="base")
    (tmp_path / "other.txt").write_text("stays")
    save_adapter(model, tmp_path, base_model="base")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "other.txt",
    ]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.up_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, "base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].shape == (48, 4)
    assert len(tensors) == 6


def test_layers_may_differ_in_rank_and_alpha(tmp_path):
    model = small_llama()
    model.requires_grad_(False)
    for i, (rank, alpha) in enumerate(((2, 4.0), (8, 1.5))):
        replace_module(model, f"layers.{i}.attention.q", LoraLinear(model.layers[i].attention.q, rank, alpha))
    replace_module(model, "layers.1.attention.o", LoraLinear(model.layers[1].attention.o, 2, 4.0))
    shake(model)
    save_adapter(model, tmp_path)
    other = small_llama()
    load_adapter(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_merging_a_loaded_adapter_saves_an_ordinary_model(tmp_path):
    model = small_llama()
    add_lora(model)
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="merge_lora"):
        save_model(model, tmp_path / "model")
    expected = model(IDS).logits
    other = small_llama()
    load_adapter(other, tmp_path / "adapter")
    merge_lora(other)
    save_model(other, tmp_path / "model")
    torch.testing.assert_close(load_model(tmp_path / "model")(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def make_adapter(folder, **changes):
    model = small_llama()
    add_lora(model, ("q",), rank=2)
    save_adapter(model, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 3}, r"lora_a of model.layers.0.self_attn.q_proj has shape \(2, 32\); expected \(3, 32\)"),
        ({"r": "two"}, "r is 'two'"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, changes, message):
    model = small_llama()
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, make_adapter(tmp_path, **changes))
    assert not lora_layers(model)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"adapter_config\.json does not exist"):
        load_adapter(small_llama(), tmp_path)
    weights = make_adapter(tmp_path) / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_adapter(small_llama(), tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors does not exist"):
        load_adapter(small_llama(), tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", "belongs to no linear layer"),
        ("base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight", "expected A and B"),
        ("base_model.model.lm_head.weight", "neither a low-rank adapter nor a copy"),
    ],
)
def test_foreign_tensors_are_named(tmp_path, name, message):
    weights = make_adapter(tmp_path) / "adapter_model.safetensors"
    tensors = load_file(weights) | {name: torch.ones(2, 32)}
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(small_llama(), tmp_path)


def test_saving_without_adapters_and_loading_twice_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no adapters to save"):
        save_adapter(small_llama(), tmp_path)
    model = small_llama()
    load_adapter(model, make_adapter(tmp_path))
    with pytest.raises(ConfigError, match="already has adapters"):
        load_adapter(model, tmp_path)


@pytest.mark.peer
@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("targets", [("q", "v"), ("layers.1.attention.o", "down"), ("all-linear",)])
def test_peft_computes_the_same_from_our_adapter(tmp_path, tie_embeddings, targets):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = small_llama(tie_embeddings=tie_embeddings)
    save_model(model, tmp_path / "base")
    add_lora(model, targets, rank=4, alpha=6, use_rslora=True)
    shake(model)
    save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
        merged = theirs.merge_and_unload()
        merge_lora(model)
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.peer
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"], "all-linear"])
def test_we_compute_the_same_from_an_adapter_of_peft(tmp_path, targets):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    save_model(small_llama(tie_embeddings=False), tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    options = {"rank_pattern": {r"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    config = peft.LoraConfig(r=4, lora_alpha=5, target_modules=targets, init_lora_weights=False, **options)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "base")
    load_adapter(ours, tmp_path / "adapter")
    assert lora_layers(ours)["layers.0.attention.q"].rank == 2
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)
