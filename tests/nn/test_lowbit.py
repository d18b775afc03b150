"""Low-bit linear layers: packing, searched scales, fused kernels against the plain formula, the published layout."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.nn.lowbit import (
    LAYERS,
    Int2Linear,
    Int4Linear,
    Int8Linear,
    pack,
    quantization_config,
    swap_linears,
    unpack,
)


def dense(in_features=64, out_features=48, *, bias=False, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias=bias).to(dtype)


def relative_error(layer, linear):
    weight = linear.weight.detach()
    return float((layer.dequantize() - weight).norm() / weight.norm())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("in_features", [1, 3, 8, 31, 64])
def test_unpack_undoes_pack(bits, in_features):
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    q = torch.randint(low, high, (5, in_features), dtype=torch.int8)
    q[0, 0], q[-1, -1] = low, high - 1
    packed = pack(q, bits)
    assert packed.dtype == torch.int32 and packed.shape == (5, -(-in_features * bits // 32))
    assert torch.equal(unpack(packed, bits, in_features), q)


def test_words_hold_offset_values_lowest_bits_first():
    q = torch.tensor([[-8, -7, 0, 7, 1, 2, 3, -1]], dtype=torch.int8)
    stored = [0, 1, 8, 15, 9, 10, 11, 7]
    assert pack(q, 4).item() & 0xFFFFFFFF == sum(v << (4 * i) for i, v in enumerate(stored))
    q = torch.tensor([[-128, 127, 0, -1]], dtype=torch.int8)
    assert pack(q, 8).item() & 0xFFFFFFFF == 0 | 255 << 8 | 128 << 16 | 127 << 24


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16, 32])
def test_dequantize_is_integers_times_scales(bits, group_size):
    linear = dense()
    layer = LAYERS[bits].from_linear(linear, group_size)
    q, scale = layer.integers(), layer.weight_scale
    assert scale.shape == (48, 64 // group_size if group_size else 1)
    spread = scale.repeat_interleave(64 // scale.shape[1], dim=1)
    assert torch.equal(layer.dequantize(), q.float() * spread)
    assert layer.weight_shape.tolist() == [48, 64]


def test_more_bits_and_smaller_groups_are_closer():
    linear = dense(256, 64)
    errors = [
        relative_error(layer, linear)
        for layer in (
            Int2Linear.from_linear(linear, 32),
            Int4Linear.from_linear(linear, None),
            Int4Linear.from_linear(linear, 32),
            Int8Linear.from_linear(linear),
        )
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.09 and errors[3] < 0.01


def test_searched_scales_beat_scales_from_the_largest_weight():
    torch.manual_seed(0)
    linear = nn.Linear(256, 64, bias=False)
    nn.init.normal_(linear.weight)
    groups = linear.weight.detach().view(64, 8, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = float(((groups / scale).round().clamp(-8, 7) * scale - groups).norm() / groups.norm())
    searched = relative_error(Int4Linear.from_linear(linear), linear)
    assert searched < 0.95 * plain


def test_importance_moves_the_error_to_inputs_that_matter_less():
    linear = dense(64, 64)
    importance = torch.ones(64)
    importance[::2] = 1e-3
    layers = (Int4Linear.from_linear(linear), Int4Linear.from_linear(linear, importance=importance))
    even, weighted = ((layer.dequantize() - linear.weight).square()[:, 1::2].sum() for layer in layers)
    assert weighted < even


def test_values_on_the_grid_are_kept_exactly():
    torch.manual_seed(0)
    q = torch.randint(-7, 8, (16, 64)).float()
    q[:, ::32] = 7  # each group reaches its largest value
    linear = nn.Linear(64, 16, bias=False)
    linear.weight.data = q * 0.25
    assert torch.equal(Int4Linear.from_linear(linear).dequantize(), linear.weight)


def test_zero_groups_and_outliers_give_finite_weights():
    linear = dense()
    with torch.no_grad():
        linear.weight[:, :32] = 0
        linear.weight[3, 40] = 1000.0
    for bits, layer_type in LAYERS.items():
        layer = layer_type.from_linear(linear, 32)
        weight = layer.dequantize()
        assert torch.isfinite(weight).all() and not weight[:, :32].any(), bits
        assert weight[3, 40] == pytest.approx(1000.0, rel=0.2 if bits > 2 else 0.6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_forward_is_the_dequantized_product(bits, dtype, bias):
    linear = dense(bias=bias, dtype=dtype)
    layer = LAYERS[bits].from_linear(linear)
    layer.use_fused = False
    x = torch.randn(2, 3, 64, dtype=dtype)
    expected = F.linear(x, layer.dequantize(), linear.bias)
    assert torch.equal(layer(x), expected)
    assert layer(x).dtype == dtype


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 32), (4, 64)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 7, 16])
def test_fused_kernel_equals_the_readable_path(bits, group_size, bias, num_rows):
    linear = dense(128, 64, bias=bias, dtype=torch.bfloat16)
    layer = LAYERS[bits].from_linear(linear, group_size)
    x = torch.randn(num_rows, 128, dtype=torch.bfloat16)
    assert layer._fits_fused(x)
    fused = layer(x)
    layer.use_fused = False
    exact = F.linear(x.float(), layer.dequantize(torch.float32), None if linear.bias is None else linear.bias.float())
    torch.testing.assert_close(fused.float(), exact, rtol=0.02, atol=0.02)
    torch.testing.assert_close(layer(x).float(), exact, rtol=0.02, atol=0.02)


def test_fused_kernel_is_chosen_only_where_it_is_faster_and_right():
    layer = Int8Linear.from_linear(dense(dtype=torch.bfloat16))
    assert not layer._fits_fused(torch.ones(17, 64, dtype=torch.bfloat16))
    assert not layer._fits_fused(torch.ones(1, 64))
    assert not layer._fits_fused(torch.ones(1, 64, dtype=torch.bfloat16, requires_grad=True))
    assert not Int8Linear.from_linear(dense(dtype=torch.bfloat16), 32)._fits_fused(torch.ones(1, 64).bfloat16())


def test_fused_layout_follows_new_weights_and_is_not_saved():
    first, second = (Int4Linear.from_linear(dense(seed=seed, dtype=torch.bfloat16)) for seed in (0, 1))
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    first(x)
    assert set(first.state_dict()) == {"weight_packed", "weight_scale", "weight_shape"}
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))


def test_gradient_flows_to_the_input():
    layer = Int8Linear.from_linear(dense(dtype=torch.bfloat16))
    x = torch.randn(1, 64, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0, keepdim=True), rtol=0.02, atol=0.02)
    assert not any(p.requires_grad for p in layer.parameters())


def test_moves_from_the_meta_device_by_loading():
    source = Int4Linear.from_linear(dense(bias=True))
    empty = Int4Linear(64, 48, bias=True, dtype=torch.float32, device="meta")
    empty.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(empty(x), source(x))


def test_refusals():
    with pytest.raises(ConfigError, match="group_size is 48, which does not divide the layer's 64 inputs"):
        Int4Linear.from_linear(dense(), 48)
    broken = dense()
    broken.weight.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        Int8Linear.from_linear(broken)


def net():
    return nn.ModuleDict({"one": nn.Linear(64, 32, bias=True), "head": nn.Linear(32, 8), "norm": nn.LayerNorm(8)})


@pytest.mark.parametrize("ignore", [["head"], ["re:.*hea"]])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, None), (8, 16), (2, 32)])
def test_swap_makes_empty_layers_that_take_the_saved_tensors(bits, group_size, ignore):
    with torch.device("meta"):
        model = net()
        assert swap_linears(model, quantization_config(bits, group_size, ignore)) == ["one"]
    assert type(model["head"]) is nn.Linear and type(model["one"]) is LAYERS[bits]
    source = LAYERS[bits].from_linear(dense(64, 32, bias=True), group_size)
    model["one"].load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model["one"].dequantize(), source.dequantize())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'; computed here: 'compressed-tensors'"),
        ({"format": "float-quantized"}, "format is 'float-quantized'"),
        ({"config_groups": {}}, "number of config_groups is 0"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"weights": {"num_bits": 3}}, "num_bits is 3; computed here: 2 or 4 or 8"),
        ({"weights": {"symmetric": False}}, "symmetric is False"),
        ({"weights": {"actorder": "group"}}, "actorder is 'group'"),
        ({"input_activations": {"num_bits": 8}}, "input_activations"),
    ],
)
def test_a_scheme_that_is_not_computed_here_is_refused_by_name(change, message):
    config = quantization_config(4, 32, [])
    group = config["config_groups"]["group_0"]
    for key, value in change.items():
        if key == "weights":
            group["weights"].update(value)
        else:
            (group if key == "input_activations" else config)[key] = value
    with pytest.raises(ConfigError, match=message):
        swap_linears(net(), config)


@pytest.mark.peer
@pytest.mark.parametrize(("bits", "in_features"), [(2, 64), (4, 64), (4, 40), (8, 64), (8, 30)])
def test_packing_equals_the_compressed_tensors_library(bits, in_features):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    q = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (6, in_features), dtype=torch.int8)
    theirs = helpers.pack_to_int32(q, bits)
    assert torch.equal(pack(q, bits), theirs)
    assert torch.equal(unpack(theirs, bits, in_features), q)
