"""Folders in and out: identity, both directions with transformers, ties, and every refusal."""

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelwright.base.errors import CheckpointError, DeviceError
from modelwright.models import tensor_file
from modelwright.models.bert import Bert, BertConfig
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.weights import from_published, load_model, save_model, to_published
from modelwright.nn.init import init_weights
from modelwright.nn.linear import linears, replace_module
from modelwright.nn.lowbit import LAYERS, quantization_config

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=11,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=96,
    bos_token_id=1,
    eos_token_id=(0, 2),
)
IDS = torch.arange(90).remainder(61)[None]


def llama(**changes) -> Llama:
    model = init_weights(Llama(replace(CONFIG, **changes)), seed=1)
    with torch.no_grad():  # norms and biases away from 1 and 0, so that a forgotten one shows
        for p in model.parameters():
            if p.ndim == 1:
                p += torch.linspace(-0.3, 0.3, p.numel())
    return model.eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(llama(), tmp_path / "m")
    return tmp_path / "m"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def edit_config(folder: Path, **changes) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_save_then_load_is_identity_and_keeps_the_dtype(tmp_path, dtype, tie_embeddings):
    model = llama(tie_embeddings=tie_embeddings).to(dtype)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert not again.training
    assert again.config == model.config
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert torch.equal(logits(again), logits(model))
    assert (again.lm_head.weight is again.embed.weight) == tie_embeddings
    assert again.num_parameters() == model.num_parameters()
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tie_embeddings


def test_another_task_is_asked_of_a_folder_alone(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="is a file; another task is asked of a folder"):
        load_model(tmp_path / "m.gguf", task="sequence_classification")


def test_dtype_can_be_asked_for(folder):
    model = load_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.rope.cos.dtype == torch.float32


def test_a_loaded_model_can_be_trained_and_leaves_its_file_alone(folder):
    before = (folder / "model.safetensors").read_bytes()
    model = load_model(folder)
    loss = model(IDS).logits.logsumexp(-1).mean()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            assert p.requires_grad and p.grad is not None
            p.add_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before


def test_saving_over_the_folder_a_model_was_loaded_from(folder):
    model = load_model(folder)
    expected = logits(model)
    save_model(model, folder)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(load_model(folder)), expected)


def test_sharded_folder_and_back_to_one_file(folder):
    model = load_model(folder)
    (folder / "tokenizer.json").write_text("{}")
    save_model(model, folder, max_shard_bytes=20_000)
    assert not (folder / "model.safetensors").exists()
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert torch.equal(logits(load_model(folder)), logits(model))
    save_model(model, folder)
    names = {p.name for p in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_tensors_start_on_aligned_addresses(folder):
    head = (folder / "model.safetensors").read_bytes()[:8]
    assert (8 + int.from_bytes(head, "little")) % 64 == 0


def test_generation_config_survives(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2, 5], "temperature": 0.6}))
    model = load_model(folder)
    save_model(model, folder.parent / "copy")
    values = json.loads((folder.parent / "copy" / "generation_config.json").read_text())
    assert values == {"bos_token_id": 1, "eos_token_id": [0, 2, 5], "temperature": 0.6}


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    model = llama()
    save_model(torch.compile(model), tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


def test_names_map_both_ways_for_every_parameter():
    for model in (llama(), Bert(BertConfig(num_layers=12, hidden_size=16, num_heads=2, intermediate_size=8))):
        for name in model.state_dict():
            assert from_published(model, to_published(model, name)) == name
    assert to_published(llama(), "layers.10.attention.q.weight") == "model.layers.10.self_attn.q_proj.weight"


def test_old_rotary_tables_in_a_file_are_passed_over(folder):
    tensors = load_file(folder / "model.safetensors")
    expected = logits(load_model(folder))
    tensors["model.layers.3.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(logits(load_model(folder)), expected)


@pytest.mark.peer
@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_transformers_loads_our_folder_and_we_load_theirs(tmp_path, tie_embeddings, max_shard_bytes):
    transformers = pytest.importorskip("transformers")
    model = llama(tie_embeddings=tie_embeddings)
    save_model(model, tmp_path / "ours", max_shard_bytes=max_shard_bytes)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert theirs.generation_config.eos_token_id == [0, 2]
    with torch.no_grad():
        assert (theirs(IDS).logits - logits(model)).abs().max() < 1e-4
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_bytes)
    back = load_model(tmp_path / "theirs")
    assert torch.equal(logits(back), logits(model))
    assert replace(back.config, eos_token_id=(0, 2)) == model.config


@pytest.mark.peer
def test_bfloat16_folder_keeps_its_dtype_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_model(llama().to(torch.bfloat16), tmp_path)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


# Refusals: each names the thing and says what to do.


def test_refuses_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load_model(tmp_path)


def test_refuses_an_unknown_architecture_and_lists_the_known(folder):
    edit_config(folder, architectures=["LlamaForTokenClassification"])
    with pytest.raises(CheckpointError, match="of the family 'llama' these are known: LlamaForCausalLM"):
        load_model(folder)
    edit_config(folder, architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox")
    with pytest.raises(CheckpointError, match="'gpt_neox' and the architecture 'GPTNeoXForCausalLM'; known .*bert"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_key_value_heads": 3}, "num_heads is 4 and num_kv_heads is 3"),
        ({"num_attention_heads": 5, "head_dim": None, "num_key_value_heads": 5}, "num_heads is 5"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 4.0}}, "rope scaling is 'mrope'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "needs the field 'low_freq_factor'"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"model_type": "gpt_neox"}, "model_type is 'gpt_neox'"),
    ],
)
def test_refuses_a_config_it_cannot_honour(folder, changes, match):
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=match):
        load_model(folder)


def test_refuses_a_missing_an_extra_and_a_misshapen_tensor(folder):
    whole = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    save_file({k: v for k, v in whole.items() if k != name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors.*{name}"):
        load_model(folder)
    save_file({**whole, "model.layers.2.mlp.router.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no place for: model\.layers\.2\.mlp\.router\.weight"):
        load_model(folder)
    save_file({**whole, name: torch.ones(3, 32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(3, 32\); the config asks for \(48, 32\)"):
        load_model(folder)


@pytest.mark.parametrize("damage", ["empty", "cut", "header", "length"])
def test_refuses_a_damaged_file(folder, damage):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(
        {
            "empty": b"",
            "cut": data[:-100],
            "header": data[:20] + b"\xff\xff" + data[22:],
            "length": b"\xff" * 8 + data[8:],
        }[damage]
    )
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*not a whole safetensors file"):
        load_model(folder)


def test_refuses_a_broken_index(folder):
    save_model(load_model(folder), folder, max_shard_bytes=20_000)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first = good["weight_map"]["model.embed_tokens.weight"]

    shutil.move(folder / first, folder.parent / first)
    with pytest.raises(CheckpointError, match=f"shard .*{first} is missing"):
        load_model(folder)

    for bad in (f"../{first}", str(folder.parent / first), "..", "", 7):
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], "model.embed_tokens.weight": bad}}))
        with pytest.raises(CheckpointError, match="name of a file in the same folder"):
            load_model(folder)

    shutil.move(folder.parent / first, folder / first)
    index.write_text(json.dumps({"weight_map": {**good["weight_map"], "model.ghost.weight": first}}))
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.ghost\.weight"):
        load_model(folder)

    index.write_text('{"weight_map": [1]}')
    with pytest.raises(CheckpointError, match="not an index of weights"):
        load_model(folder)


def test_refuses_an_empty_folder_and_names_what_is_in_it_instead(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds neither model.safetensors"):
        load_model(folder)
    (folder / "consolidated.00.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"It has consolidated\.00\.pth"):
        load_model(folder)


def test_refuses_tied_weights_that_differ(tmp_path):
    save_model(llama(), tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight.*differ"):
        load_model(tmp_path)
    model = llama(tie_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.embed.weight.detach().clone())
    with pytest.raises(CheckpointError, match="have parted"):
        save_model(model, tmp_path / "parted")


def test_tied_weights_may_stand_in_the_file_under_either_name(tmp_path):
    model = llama(tie_embeddings=True)
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embed = tensors.pop("model.embed_tokens.weight")
    for names in (["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
        save_file({**tensors, **{n: embed.clone() for n in names}}, tmp_path / "model.safetensors")
        again = load_model(tmp_path)
        assert again.lm_head.weight is again.embed.weight
        assert torch.equal(logits(again), logits(model))


def test_refuses_to_save_what_has_no_published_name(tmp_path):
    model = llama()
    model.layers[0].attention.q = torch.nn.Sequential(model.layers[0].attention.q)
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.q\.0\.weight has no published name"):
        save_model(model, tmp_path)
    with torch.device("meta"):
        empty = Llama(CONFIG)
    with pytest.raises(CheckpointError, match="has no storage"):
        save_model(empty, tmp_path)
    assert not list(tmp_path.rglob("*.*"))


def test_a_full_disk_keeps_the_old_file(folder, monkeypatch):
    expected = logits(load_model(folder))
    real = tensor_file.atomic_file

    def full(path, mode="w"):
        from contextlib import contextmanager

        @contextmanager
        def run():
            with real(path, mode) as handle:
                yield handle
                raise OSError(errno.ENOSPC, "No space left on device")

        return run()

    monkeypatch.setattr(tensor_file, "atomic_file", full)
    with pytest.raises(DeviceError, match="disk is full"):
        save_model(llama(tie_embeddings=True), folder)
    assert torch.equal(logits(load_model(folder)), expected)
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_a_low_bit_folder_comes_back_the_same(tmp_path, bits, tie_embeddings):
    group_size = {4: 16, 8: None}[bits]
    ignore = ["lm_head", "model.layers.1.mlp.up_proj"]  # published names, as in the file
    model = llama(tie_embeddings=tie_embeddings, num_layers=2).to(torch.bfloat16)
    for name, layer in list(linears(model)):
        if name not in ("lm_head", "layers.1.mlp.up"):
            replace_module(model, name, LAYERS[bits].from_linear(layer, group_size))
    model.quantization_config = quantization_config(bits, group_size, ignore)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert isinstance(again.layers[0].attention.q, LAYERS[bits])
    assert isinstance(again.layers[1].mlp.up, torch.nn.Linear) and isinstance(again.lm_head, torch.nn.Linear)
    assert torch.equal(logits(again), logits(model))
    save_model(again, tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()
    )

    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight_scale"):
        load_model(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "hqq"})
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config: quant_method is 'hqq'"):
        load_model(tmp_path)


def test_loading_imports_no_compiler(folder):
    code = f"import sys; from modelwright import load_model; load_model({str(folder)!r}); print('sympy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
