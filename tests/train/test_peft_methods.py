"""Every method of fine-tuning a few parameters: silent at first, learns alone, and is the same in PEFT's files."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.data.load import Batch
from modelwright.data.pack import IGNORED
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.weights import save_model
from modelwright.nn.adalora import AdaLoraConfig
from modelwright.nn.adapters import (
    attach_adapter,
    has_adapters,
    merge_adapters,
    remove_adapters,
    trained_parameters,
)
from modelwright.nn.bottleneck import BottleneckConfig
from modelwright.nn.ia3 import IA3Config
from modelwright.nn.lora import LoraConfig, lora_layers
from modelwright.nn.virtual_tokens import PrefixConfig, PromptConfig
from modelwright.optim.build import AdamWConfig, OptimizerConfig, make_optimizer
from modelwright.train.adapt import adapt
from modelwright.train.adapter import load_adapter, save_adapter
from modelwright.train.objective import CausalLanguageModeling

IDS = torch.arange(24).view(2, 12) % 64
ALL = ("q", "k", "v", "o", "gate", "up", "down")
METHODS = {
    "lora": LoraConfig(ALL, rank=4),
    "rslora": LoraConfig(ALL, rank=4, use_rslora=True),
    "dora": LoraConfig(ALL, rank=4, use_dora=True),
    "pissa": LoraConfig(ALL, rank=4, alpha=4.0, init="pissa"),
    "embedding": LoraConfig(("embed", "q"), rank=4),
    "adalora": AdaLoraConfig(ALL, rank=4, target_rank=2),
    "ia3": IA3Config(),
    "bottleneck": BottleneckConfig(width=4),
    "prefix": PrefixConfig(num_tokens=5),
    "prompt": PromptConfig(num_tokens=5),
}
SILENT = [name for name in METHODS if name not in ("prefix", "prompt")]
MERGED = [name for name in SILENT if name != "bottleneck"]
THEIRS = [name for name in METHODS if name != "bottleneck"]


def small_llama(*, tie_embeddings=False, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}
    config = LlamaConfig(**sizes, num_kv_heads=2, max_seq_len=64, tie_embeddings=tie_embeddings, **options)
    return Llama(config).eval()


def adapted(name, seed=1, **options):
    model = small_llama(**options)
    torch.manual_seed(seed)
    names = attach_adapter(model, METHODS[name])
    return model, names


def shake(model, seed=2):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def loss_of(model):
    return F.cross_entropy(model(IDS).logits[:, :-1].float().flatten(0, 1), IDS[:, 1:].flatten())


@pytest.mark.parametrize("name", SILENT)
def test_a_new_adapter_changes_nothing(name):
    expected = small_llama()(IDS).logits
    model, names = adapted(name)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert names and has_adapters(model)


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_with_its_own_parameters_alone(name):
    model, _ = adapted(name)
    trained = trained_parameters(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    first = loss_of(model).item()
    for _ in range(25):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert loss_of(model).item() < first - (0.005 if name in ("prefix", "prompt") else 0.1)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_an_adapter_on_the_output_matrix_is_trained_by_the_loss_in_pieces():
    model = small_llama()
    attach_adapter(model, LoraConfig(("lm_head", "embed", "q"), rank=4))
    shake(model)
    labels = torch.cat((IDS[:, 1:], torch.full((2, 1), IGNORED)), dim=1)
    CausalLanguageModeling(max_logits=64 * 5).loss(model, Batch(IDS, labels)).backward()
    found = [p.grad.clone() for p in trained_parameters(model)]
    for parameter in trained_parameters(model):
        parameter.grad = None
    (loss_of(model) * (labels != IGNORED).sum()).backward()
    for mine, parameter in zip(found, trained_parameters(model), strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_removed_it_leaves_the_model_as_it_was(name):
    plain = small_llama()
    model, _ = adapted(name)
    shake(model)
    remove_adapters(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("name", MERGED)
def test_merged_it_computes_the_same_and_a_second_merge_is_refused(name):
    model, names = adapted(name, attention_bias=True)
    shake(model)
    with torch.no_grad():
        expected = model(IDS).logits
        assert merge_adapters(model) == names
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert not has_adapters(model)
    with pytest.raises(ConfigError, match="no adapters to merge: none were added, or they were merged before"):
        merge_adapters(model)


@pytest.mark.parametrize("name", ["bottleneck", "prefix", "prompt"])
def test_what_is_no_change_of_weights_is_not_merged(name):
    model, _ = adapted(name)
    shake(model)
    expected = model(IDS).logits
    with pytest.raises(ConfigError, match="cannot be merged"):
        merge_adapters(model)
    assert torch.equal(model(IDS).logits, expected)


def test_an_adapter_on_a_tied_embedding_stays_beside_it():
    model, _ = adapted("embedding", tie_embeddings=True)
    shake(model)
    with pytest.raises(ConfigError, match="tied to another layer: merging would change both"):
        merge_adapters(model)


@pytest.mark.parametrize("name", METHODS)
def test_saved_it_comes_back(name, tmp_path):
    model, _ = adapted(name)
    shake(model)
    save_adapter(model, tmp_path)
    other = small_llama()
    load_adapter(other, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(other(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="already has adapters"):
        load_adapter(other, tmp_path)
    smaller = Llama(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2))
    with pytest.raises(CheckpointError):
        load_adapter(smaller, tmp_path)
    assert not has_adapters(smaller) and all(p.requires_grad for p in smaller.parameters())


@pytest.mark.peer
@pytest.mark.parametrize("name", THEIRS)
def test_peft_computes_the_same_from_our_file(name, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model, _ = adapted(name)
    shake(model)
    save_model(small_llama(), tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        torch.testing.assert_close(model(IDS).logits, logits[:, -IDS.shape[1] :], rtol=1e-3, atol=1e-4)


THEIR_CONFIGS = {
    "dora": ("LoraConfig", {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "pissa": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa", "target_modules": ["q_proj", "up_proj"]}),
    "embedding": ("LoraConfig", {"r": 4, "target_modules": ["embed_tokens", "v_proj"]}),
    "adalora": (
        "AdaLoraConfig",
        {"init_r": 4, "target_r": 2, "total_step": 9, "target_modules": ["q_proj"]},
    ),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 5}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 5}),
}


@pytest.mark.peer
@pytest.mark.parametrize("name", THEIR_CONFIGS)
def test_we_compute_the_same_from_a_file_of_peft(name, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    save_model(small_llama(), tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    kind, options = THEIR_CONFIGS[name]
    theirs = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **options)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    model = small_llama()
    load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        logits = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        torch.testing.assert_close(model(IDS).logits, logits[:, -IDS.shape[1] :], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_virtual_tokens_are_seen_by_every_text_of_a_packed_row_and_by_a_decode_state(name):
    model, _ = adapted(name)
    shake(model)
    ids = torch.cat((IDS[:1, :5], IDS[1:, :7]), dim=1)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    positions = torch.tensor([[*range(5), *range(7)]])
    with torch.no_grad():
        packed = model(ids, positions=positions, mask=(documents[:, :, None] == documents[:, None])[:, None]).logits
        alone = torch.cat((model(IDS[:1, :5]).logits, model(IDS[1:, :7]).logits), dim=1)
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
        state = model.new_state(2)
        steps = [model(IDS[:, i : i + 1], positions=state.positions(1), state=state).logits for i in range(12)]
        torch.testing.assert_close(torch.cat(steps, 1), model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_pissa_takes_the_principal_part_and_lora_plus_gives_b_its_own_rate():
    model, _ = adapted("pissa")
    plain = small_llama()
    layer = lora_layers(model)["layers.0.mlp.up"]
    values = torch.linalg.svdvals(plain.layers[0].mlp.up.weight)
    torch.testing.assert_close(torch.linalg.svdvals(layer.base.weight)[:4], values[4:8], rtol=1e-3, atol=1e-5)
    attach_adapter(plus := small_llama(), LoraConfig(rank=4, rate_ratio=16.0))
    config = OptimizerConfig(name="adamw", adamw=AdamWConfig(learning_rate=0.001))
    made = make_optimizer(plus, config)
    assert sorted((g["lr"], len(g["params"])) for g in made.groups()) == [(0.001, 14), (0.016, 14)]


def test_a_file_of_pissa_over_four_bits_fits_the_dense_model_but_for_what_rounding_lost(tmp_path):
    plain, model, dense = small_llama(), small_llama(), small_llama()
    adapt(model, LoraConfig(ALL, rank=4, init="pissa"), load_in_4bit=True)
    lost = {n: x.total() - plain.get_submodule(n).weight for n, x in lora_layers(model).items()}
    shake(model)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    load_adapter(dense, tmp_path)
    for name, layer in lora_layers(dense).items():
        assert torch.equal(layer.base.weight, plain.get_submodule(name).weight)
        torch.testing.assert_close(layer.total() + lost[name], lora_layers(model)[name].total(), rtol=0, atol=1e-5)
    with torch.no_grad():
        expected = model(IDS).logits
        merge_adapters(model)  # the merged model is what was trained, its rounding included
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoraConfig(("gaet",)), r"'gaet' matches no linear layer\. Did you mean gate"),
        (LoraConfig(rank=40), r"rank is 40, but layers.0.attention.q is 32 x 32.*rank from 1 to 32"),
        (PromptConfig(num_tokens=64), "num_tokens is 64; expected 1 to 63"),
        (AdaLoraConfig(rank=100, target_rank=1), "rank is 100"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_stays(method, message):
    model = small_llama()
    with pytest.raises(ConfigError, match=message):
        attach_adapter(model, method)
    assert not has_adapters(model) and all(p.requires_grad for p in model.parameters())


def test_settings_that_mean_nothing_are_refused():
    for make, message in (
        (lambda: LoraConfig(rank=0), "rank is 0"),
        (lambda: LoraConfig(init="svd"), "known: kaiming, pissa, qpissa, loftq"),
        (lambda: AdaLoraConfig(rank=4, target_rank=8), "target_rank is 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


def test_the_numbers_of_trained_parameters_are_those_of_the_formulas():
    sizes = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32), "gate": (32, 48), "up": (32, 48)}
    sizes["down"] = (48, 32)
    count = lambda name: sum(p.numel() for p in trained_parameters(adapted(name)[0]))  # noqa: E731
    assert count("lora") == 2 * sum(4 * (i + o) for i, o in sizes.values())
    assert count("dora") == count("lora") + 2 * sum(o for _, o in sizes.values())
    assert count("adalora") == count("lora") + 2 * 7 * 4
    assert count("ia3") == 2 * (16 + 16 + 48)
    assert count("prefix") == 2 * 2 * 5 * 2 * 8
    assert count("prompt") == 5 * 32
    assert count("bottleneck") == 2 * 2 * (2 * 4 * 32 + 4 + 32)


def test_an_unknown_kind_of_adapter_file_is_named(tmp_path):
    model, _ = adapted("ia3")
    save_adapter(model, tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "peft_type": "VERA"}))
    with pytest.raises(CheckpointError, match="peft_type is 'VERA'; known: LORA, ADALORA"):
        load_adapter(small_llama(), tmp_path)
    assert isinstance(model.layers[0].attention.q, nn.Linear)
