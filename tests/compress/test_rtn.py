"""Quantized models: what they keep, what they lose, and that their folders load here and elsewhere."""

import copy
import json

import pytest
import torch
from torch import nn

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.compress.report import compare, tensor_bytes
from modelwright.compress.rtn import quantize_model, save_quantized
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.weights import load_model, save_model
from modelwright.nn.lora import add_lora
from modelwright.nn.lowbit import Int4Linear, Int8Linear, LowBitLinear


def test_the_model_has_learned(trained, texts):
    figures = compare(trained, trained, texts[1])
    assert figures["perplexity"] < 7  # 256 before training


@pytest.mark.parametrize(("bits", "limit"), [(8, 1.01), (4, 1.05)])
def test_perplexity_stays_within_the_limit(trained, texts, bits, limit):
    figures = compare(trained, quantize_model(trained, bits), texts[1])
    assert 1 / limit < figures["perplexity_ratio"] < limit
    assert figures["top1_agreement"] > (0.98 if bits == 8 else 0.88)


def test_fewer_bits_lose_more_and_two_bits_fail(trained, texts):
    eight, four, two = (compare(trained, quantize_model(trained, bits), texts[1]) for bits in (8, 4, 2))
    assert 0 <= eight["kl_divergence"] < four["kl_divergence"] < two["kl_divergence"]
    assert two["perplexity_ratio"] > 1.25
    assert two["kl_divergence"] > 10 * four["kl_divergence"]
    assert eight["size_bytes"] > four["size_bytes"] > two["size_bytes"]


def test_shuffled_scales_fail(trained, texts):
    # Negative control: the right integers under each other's scales are another model.
    quantized = quantize_model(trained, 4)
    right = compare(trained, quantized, texts[1])
    torch.manual_seed(0)
    for layer in quantized.modules():
        if isinstance(layer, LowBitLinear):
            scale = layer.weight_scale
            layer.weight_scale.copy_(scale.flatten()[torch.randperm(scale.numel())].view_as(scale))
    wrong = compare(trained, quantized, texts[1])
    assert wrong["kl_divergence"] > 5 * right["kl_divergence"]


def test_smaller_groups_lose_less(trained, texts):
    losses = [compare(trained, quantize_model(trained, 4, g), texts[1])["kl_divergence"] for g in (16, 32)]
    assert losses[0] < losses[1]


def test_the_original_is_not_changed_and_not_shared(trained):
    before = copy.deepcopy(trained.state_dict())
    quantized = quantize_model(trained, 4)
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())
    assert quantized.embed.weight.data_ptr() != trained.embed.weight.data_ptr()
    assert quantized.lm_head.weight is quantized.embed.weight
    assert {p.dtype for p in quantized.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert not any(isinstance(m, LowBitLinear) for m in trained.modules())


def test_every_linear_layer_but_the_head_is_low_bit(trained):
    quantized = quantize_model(trained, 4)
    kinds = {name: type(m) for name, m in quantized.named_modules() if hasattr(m, "in_features")}
    assert kinds.pop("lm_head") is nn.Linear
    assert len(kinds) == 14 and set(kinds.values()) == {Int4Linear}
    kept = quantize_model(trained, 8, ignore=("lm_head", "layers.0.mlp.down"))
    assert type(kept.layers[0].mlp.down) is nn.Linear and type(kept.layers[1].mlp.down) is Int8Linear


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 32), (4, None), (4, 16)])
def test_saved_folder_loads_with_the_same_logits(trained, texts, tmp_path, bits, group_size):
    quantized = quantize_model(trained, bits, group_size)
    save_quantized(quantized, tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded(texts[1][:4]).logits, quantized(texts[1][:4]).logits)
    file = tmp_path / "model.safetensors"
    assert 0 <= file.stat().st_size - tensor_bytes(quantized) < 10_000  # the header
    save_quantized(loaded, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == file.read_bytes()
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads(
        (tmp_path / "config.json").read_text()
    )


def test_layers_left_out_stay_dense_after_loading(trained, texts, tmp_path):
    quantized = quantize_model(trained, 4, ignore=("lm_head", "layers.1.attention.q"))
    save_quantized(quantized, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["model.layers.1.self_attn.q_proj", "lm_head"]
    assert torch.equal(load_model(tmp_path)(texts[1][:2]).logits, quantized(texts[1][:2]).logits)


def test_untied_and_biased_models_round_trip(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_layers=1, attention_bias=True, tie_embeddings=False
    )
    quantized = quantize_model(Llama(config), 4)
    save_quantized(quantized, tmp_path)
    ids = torch.arange(10)[None]
    assert torch.equal(load_model(tmp_path)(ids).logits, quantized(ids).logits)


def test_sizes_are_what_the_bits_say(trained):
    linear = sum(m.weight.numel() for n, m in trained.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    rest = sum(p.numel() for p in trained.parameters()) - linear
    size = tensor_bytes(quantize_model(trained, 4))
    assert size == linear // 2 + linear // 32 * 2 + rest * 2 + 14 * 16  # weights, scales, the rest, shapes


def test_refusals(trained, tmp_path):
    with pytest.raises(ConfigError, match=r"bits is 3; models are quantized to 2, 4, 8"):
        quantize_model(trained, 3)
    with pytest.raises(ConfigError, match=r"layers\.0\.attention\.q: group_size is 36"):
        quantize_model(trained, 4, 36)
    with pytest.raises(ConfigError, match="quantized already"):
        quantize_model(quantize_model(trained, 8), 4)
    with pytest.raises(ConfigError, match="not quantized"):
        save_quantized(trained, tmp_path)
    adapted = copy.deepcopy(trained)
    add_lora(adapted)
    with pytest.raises(ConfigError, match="merge_lora"):
        quantize_model(adapted, 4)
    save_quantized(quantize_model(trained, 4), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["format"] = "marlin-24"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="format is 'marlin-24'"):
        load_model(tmp_path)


@pytest.mark.peer
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 32), (4, 32)])
def test_transformers_reads_the_folder_with_the_same_logits(trained, texts, tmp_path, bits, group_size):
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    quantized = quantize_model(trained, bits, group_size, dtype=torch.float32)
    save_quantized(quantized, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = quantized(texts[1][:4]).logits
        torch.testing.assert_close(theirs(texts[1][:4]).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_dense_copy_of_the_same_values_gives_the_same_logits(trained, texts, tmp_path):
    # Twin: the low-bit layers against nn.Linear layers that hold their dequantized weights.
    quantized = quantize_model(trained, 4, dtype=torch.float32)
    twin = copy.deepcopy(trained)
    for name, layer in quantized.named_modules():
        if isinstance(layer, LowBitLinear):
            twin.get_submodule(name).weight.data = layer.dequantize()
    ids = texts[1][:2]
    torch.testing.assert_close(quantized(ids).logits, twin(ids).logits)
    save_model(twin, tmp_path)
    torch.testing.assert_close(load_model(tmp_path)(ids).logits, quantized(ids).logits)
