"""Low-rank adapters: silent at first, trained alone, and the same merged as beside the weights."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modelwright.base.errors import ConfigError
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.linear import replace_module
from modelwright.nn.lora import (
    LoraConfig,
    LoraLinear,
    add_lora,
    lora_layers,
    lora_parameters,
    lora_state,
    merge_lora,
)
from modelwright.nn.lowbit import Int4Linear


def small_llama(*, tie_embeddings=True, seed=0, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        tie_embeddings=tie_embeddings,
        **options,
    )
    return Llama(config)


def shake(model, seed=1):
    """Give the adapters values as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(std=0.1)


IDS = torch.arange(24).view(2, 12) % 64


def loss_of(model):
    logits = model(IDS).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def test_formula():
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    layer = LoraLinear(base, rank=2, alpha=3.0)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(4, 6)
    expected = x @ base.weight.T + base.bias + 3.0 / 2 * (x @ layer.lora_a.T) @ layer.lora_b.T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.delta(), 1.5 * layer.lora_b @ layer.lora_a)


def test_rank_stabilised_scaling_divides_by_the_square_root():
    assert LoraLinear(nn.Linear(4, 4), rank=16, alpha=8.0).scaling == 0.5
    assert LoraLinear(nn.Linear(4, 4), rank=16, alpha=8.0, use_rslora=True).scaling == 2.0


def test_a_is_kaiming_uniform_and_b_zero():
    layer = LoraLinear(nn.Linear(100, 50), rank=64, alpha=1)
    bound = 1 / math.sqrt(100)
    assert layer.lora_a.abs().max() <= bound
    assert layer.lora_a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not layer.lora_b.any()


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_new_adapters_change_nothing(tie_embeddings):
    model = small_llama(tie_embeddings=tie_embeddings)
    before = model(IDS).logits
    add_lora(model, ("all-linear",))
    assert torch.equal(model(IDS).logits, before)


def test_names_come_in_the_models_order():
    names = add_lora(small_llama(), ("v", "attention.q"))
    assert names == [f"layers.{i}.attention.{p}" for i in (0, 1) for p in ("q", "v")]
    assert add_lora(small_llama(), ("layers.1.mlp.up",)) == ["layers.1.mlp.up"]


def test_all_linear_leaves_a_tied_head_out_and_takes_an_untied_one():
    assert "lm_head" not in add_lora(small_llama(tie_embeddings=True), ("all-linear",))
    names = add_lora(small_llama(tie_embeddings=False), ("all-linear",))
    assert names[-1] == "lm_head" and len(names) == 2 * 7 + 1


def test_only_adapters_are_trainable():
    model = small_llama()
    names = add_lora(model, **vars(LoraConfig(rank=4)))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{part}" for name in names for part in ("lora_a", "lora_b")}
    assert len(lora_parameters(model)) == 2 * len(names) == len(lora_state(model))


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_every_adapter_parameter_gets_a_gradient(tie_embeddings):
    model = small_llama(tie_embeddings=tie_embeddings)
    add_lora(model, ("all-linear",), rank=4)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(lora_parameters(model), lr=1.0)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        for name, layer in lora_layers(model).items():
            assert layer.lora_b.grad.abs().sum() > 0, name
            if step == 1:  # at first B is zero, and with it the gradient of A
                assert layer.lora_a.grad.abs().sum() > 0, name
        optimizer.step()
    for name, p in model.named_parameters():
        assert name not in frozen or torch.equal(p, frozen[name]), name


def test_training_lowers_the_loss_and_a_frozen_control_stays():
    model = small_llama()
    add_lora(model, rank=8)
    before = loss_of(model).item()
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model).item() < before - 0.5
    for layer in lora_layers(model).values():
        nn.init.zeros_(layer.lora_b)
    assert loss_of(model).item() == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_merged_equals_unmerged(tie_embeddings, use_rslora):
    model = small_llama(tie_embeddings=tie_embeddings, attention_bias=True)
    plain_names = list(model.state_dict())
    names = add_lora(model, ("all-linear",), rank=4, use_rslora=use_rslora, dropout=0.1)
    shake(model)
    model.eval()
    before = model(IDS).logits
    assert merge_lora(model) == names
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == plain_names
    assert all(p.requires_grad for p in model.parameters())
    assert merge_lora(model) == []


def test_a_merged_model_can_be_adapted_again():
    model = small_llama()
    add_lora(model)
    with pytest.raises(ConfigError, match="already has adapters"):
        add_lora(model)
    merge_lora(model)
    assert add_lora(model)


def test_merging_into_bfloat16_adds_in_float32():
    # Many changes, each below half a bfloat16 step of the weight: added in bfloat16 they would all be lost one by one.
    base = nn.Linear(256, 256, bias=False).bfloat16()
    layer = LoraLinear(base, rank=4, alpha=4)
    nn.init.normal_(layer.lora_b, std=0.05)
    exact = base.weight.float() + layer.delta()
    merged = layer.merged()
    assert merged.weight.dtype == torch.bfloat16
    assert torch.equal(merged.weight, exact.bfloat16())


def test_bfloat16_and_autocast_forward():
    model = small_llama()
    add_lora(model)
    shake(model)
    exact = model(IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(IDS).logits
    torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.1)
    low = LoraLinear(nn.Linear(8, 8).bfloat16(), rank=2, alpha=2)
    assert low(torch.ones(1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert low.lora_a.dtype == torch.float32


def test_dropout_acts_on_the_adapter_alone_and_only_in_training():
    layer = LoraLinear(nn.Linear(64, 8), rank=4, alpha=4, dropout=0.5)
    x = torch.ones(2, 64)
    assert torch.equal(layer.train()(x), layer.base(x))  # B is zero: nothing for dropout to change
    nn.init.normal_(layer.lora_b)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_low_bit_base_trains_through_and_merges_into_a_dense_layer_without_loss():
    model = small_llama()
    for name in [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        replace_module(model, name, Int4Linear.from_linear(model.get_submodule(name)))
    add_lora(model, rank=4)
    loss_of(model).backward()
    assert all(layer.lora_b.grad.abs().sum() > 0 for layer in lora_layers(model).values())
    shake(model)
    with torch.no_grad():
        before = model(IDS).logits
        merge_lora(model)
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-4)
    assert type(model.layers[0].attention.q) is nn.Linear


def test_refusals_list_what_exists():
    with pytest.raises(ConfigError, match=r"'q_proj' matches no linear layer.*down, gate, k, lm_head, o, q, up, v"):
        add_lora(small_llama(), ("q_proj",))
    with pytest.raises(ConfigError, match="lm_head, whose weight is tied"):
        add_lora(small_llama(tie_embeddings=True), ("lm_head",))
    with pytest.raises(ConfigError, match="rank is 0"):
        add_lora(small_llama(), ("q",), rank=0)
    with pytest.raises(ConfigError, match="dropout is 1.5"):
        add_lora(small_llama(), ("q",), dropout=1.5)
    model = small_llama()
    with pytest.raises(ConfigError):
        add_lora(model, ("q", "nothing"))
    assert all(p.requires_grad for p in model.parameters())  # a refused call leaves the model as it was
