"""NF4: the levels and bits of the paper and of bitsandbytes, a fast path equal to the plain one, gradients through."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modelwright.base.env import data_folder
from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.llama2c import read_llama2c
from modelwright.models.weights import load_model, save_model
from modelwright.nn.adapters import attach_adapter, merge_adapters, remove_adapters
from modelwright.nn.linear import dense_weight
from modelwright.nn.lora import LoraConfig, lora_layers
from modelwright.nn.nf4 import NF4Linear, nf4_levels, scale_levels, to_nf4

IDS = torch.arange(24).view(2, 12) % 64
# Dettmers et al. 2023, appendix E.
PAPER = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
PAPER += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]


def layer_of(out_features, in_features, *, bias=False, seed=0, **options):
    torch.manual_seed(seed)
    return NF4Linear.from_linear(nn.Linear(in_features, out_features, bias=bias), **options)


def small_llama(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4}
    return Llama(LlamaConfig(**sizes, num_kv_heads=2, max_seq_len=64, **options)).eval()


def test_the_levels_are_those_of_the_paper():
    assert torch.allclose(nf4_levels(), torch.tensor(PAPER), atol=1e-6)
    assert len(scale_levels()) == len(scale_levels().unique()) == 256


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_path_equals_the_plain_one(double_quant, dtype):
    for shape in ((48, 64), (7, 33), (300, 130)):
        layer = layer_of(*shape, double_quant=double_quant)
        close = {"rtol": 0, "atol": 0} if dtype == torch.float32 else {"rtol": 0.02, "atol": 1e-3}
        torch.testing.assert_close(layer.dequantize(dtype).float(), layer.dequantize_plain(), **close)


def test_every_weight_goes_to_its_nearest_level():
    torch.manual_seed(0)
    dense = nn.Linear(64, 16, bias=False)
    layer = NF4Linear.from_linear(dense, double_quant=False)
    scale = dense.weight.view(-1, 64).abs().amax(1, keepdim=True)
    nearest = (dense.weight.view(-1, 64, 1) / scale[..., None] - nf4_levels()).abs().argmin(-1)
    torch.testing.assert_close(layer.dequantize(torch.float32).view(-1, 64), nf4_levels()[nearest] * scale)
    error = (layer.dequantize_plain() - dense.weight).norm() / dense.weight.norm()
    assert 0.07 < error < 0.1


def test_the_bytes_are_those_of_the_formula():
    num = 512 * 1024
    layer = layer_of(512, 1024)
    assert layer.num_bytes() == num // 2 + num // 64 + 4 * num // (64 * 256) + 4
    assert 8 * layer.num_bytes() / num == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)
    assert 8 * layer_of(512, 1024, double_quant=False).num_bytes() / num == 4.5


def test_gradients_pass_through_as_through_the_dense_layer():
    layer = layer_of(24, 64, bias=True)
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    dense = F.linear(x, layer.dequantize_plain(), layer.bias)
    torch.testing.assert_close(y, dense)
    (found,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad(dense.square().sum(), x)
    torch.testing.assert_close(found, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_model_in_four_bits_is_saved_and_loaded_as_it_is(tmp_path):
    model = small_llama(attention_bias=True)
    names = to_nf4(model)
    assert len(names) == 14 and "lm_head" not in names
    save_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_type"] == "nf4" and config["bnb_4bit_use_double_quant"]
    for dtype in (None, torch.float32):
        other = load_model(tmp_path, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_lora_over_four_bits_trains_and_merges_into_dense_layers_without_loss():
    model = small_llama()
    to_nf4(model)
    attach_adapter(model, LoraConfig(rank=4))
    F.cross_entropy(model(IDS).logits.flatten(0, 1), IDS.flatten()).backward()
    assert all(layer.lora_b.grad.abs().sum() > 0 for layer in lora_layers(model).values())
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_b.normal_(std=0.1)
        expected = model(IDS).logits
        merge_adapters(model)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, NF4Linear) for module in model.modules())


def test_loftq_begins_nearer_to_the_dense_model_than_plain_lora_over_four_bits():
    plain, rounded, fitted = small_llama(), small_llama(), small_llama()
    to_nf4(rounded)
    attach_adapter(fitted, LoraConfig(rank=16, init="loftq"))
    name = "layers.0.mlp.up"
    weight = plain.get_submodule(name).weight
    layer = lora_layers(fitted)[name]
    lost = (dense_weight(rounded.get_submodule(name)) - weight).norm()
    assert (layer.total() - weight).norm() < 0.8 * lost
    assert torch.equal(layer.base.packed, rounded.get_submodule(name).packed)  # the adapter fits any such base
    with pytest.raises(ConfigError, match="what rounding lost is not known"):
        attach_adapter(rounded, LoraConfig(rank=4, init="loftq"))


def test_pissa_over_four_bits_rounds_the_rest_and_so_loses_less_than_rounding_the_weight():
    plain, rounded, fitted = small_llama(), small_llama(), small_llama()
    to_nf4(rounded)
    attach_adapter(fitted, LoraConfig(rank=8, init="qpissa"))
    for name, layer in lora_layers(fitted).items():
        weight = plain.get_submodule(name).weight
        rest = weight - layer.delta()
        assert torch.equal(layer.base.packed, NF4Linear.from_linear(linear_of(rest)).packed)  # the rest, not the weight
        lost = (dense_weight(rounded.get_submodule(name)) - weight).norm()
        assert (layer.total() - weight).norm() < 0.95 * lost, name
    with torch.no_grad():
        expected = plain(IDS).logits
        by_rounding = (rounded(IDS).logits - expected).norm()
        assert 0 < (fitted(IDS).logits - expected).norm() < by_rounding
    with pytest.raises(ConfigError, match="the rest would be rounded a second time"):
        attach_adapter(rounded, LoraConfig(rank=4, init="qpissa"))
    # Without the adapter, the base alone would be a model that lacks its largest directions.
    remove_adapters(fitted)
    with torch.no_grad():
        assert (fitted(IDS).logits - expected).norm() < 2 * by_rounding


@pytest.mark.parametrize(("rank", "by_pissa", "by_loftq"), [(4, 0.80, 0.85), (8, 0.71, 0.76), (16, 0.57, 0.62)])
def test_what_rounding_loses_of_trained_weights_is_what_the_page_says(rank, by_pissa, by_loftq):
    folder = data_folder()
    if folder is None:
        pytest.skip("MODELWRIGHT_DATA is not set")
    source = folder / "weights" / "stories260K" / "stories260K.bin"
    plain, rounded = (read_llama2c(source, dtype=torch.float32) for _ in range(2))
    to_nf4(rounded)
    lost = {}
    for init in ("qpissa", "loftq"):
        model = read_llama2c(source, dtype=torch.float32)
        attach_adapter(model, LoraConfig(("all-linear",), rank=rank, init=init))
        errors = [x.total() - plain.get_submodule(n).weight for n, x in lora_layers(model).items()]
        without = [dense_weight(rounded.get_submodule(n)) - plain.get_submodule(n).weight for n in lora_layers(model)]
        lost[init] = math.sqrt(sum(float(e.detach().square().sum()) for e in errors))
        lost[init] /= math.sqrt(sum(float(e.detach().square().sum()) for e in without))
    assert lost["qpissa"] == pytest.approx(by_pissa, abs=0.006)
    assert lost["loftq"] == pytest.approx(by_loftq, abs=0.006)


def linear_of(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


def test_what_is_not_nf4_is_refused(tmp_path):
    model = small_llama()
    to_nf4(model)
    save_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="bnb_4bit_quant_type is 'fp4'"):
        load_model(tmp_path)
    broken = nn.Linear(8, 8)
    nn.init.constant_(broken.weight, float("nan"))
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        NF4Linear.from_linear(broken)


@pytest.mark.peer
@pytest.mark.parametrize("double_quant", [True, False])
def test_bits_and_bytes_gives_the_same_bits_and_numbers(double_quant):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    dense = nn.Linear(512, 256, bias=False).bfloat16()
    layer = NF4Linear.from_linear(dense, double_quant=double_quant)
    packed, state = functional.quantize_4bit(
        dense.weight.data, quant_type="nf4", compress_statistics=double_quant, blocksize=64
    )
    assert torch.equal(packed, layer.packed)
    assert torch.equal(state.absmax, layer.absmax)
    torch.testing.assert_close(functional.dequantize_4bit(packed, state), layer.dequantize(), rtol=0.01, atol=1e-4)
    ours = {k.removeprefix("weight."): v for k, v in layer.state_dict().items() if k != "weight"}
    theirs = state.as_dict(packed=True)
    assert set(ours) == set(theirs)
