"""What is said of a model on disk follows from its headers and agrees with the model."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelwright.base.errors import CheckpointError
from modelwright.models.gguf import write_gguf
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.mamba import Mamba, MambaConfig
from modelwright.models.mixtral import Mixtral, MixtralConfig
from modelwright.models.summary import summarize
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights
from modelwright.nn.linear import linears, replace_module
from modelwright.nn.lowbit import LAYERS, quantization_config
from modelwright.nn.moe import MoeOptions

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=4096,
    family="qwen2",
    attention_bias=True,
    sliding_window=1000,
    num_full_layers=1,
    tie_embeddings=True,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(init_weights(Llama(CONFIG), seed=1).to(torch.bfloat16), tmp_path / "m")
    return tmp_path / "m"


def parts(summary) -> dict[str, int]:
    return {part.name: part.parameters for part in summary.parts}


def test_parts_and_bytes_add_up(folder):
    summary = summarize(folder)
    model = load_model(folder)
    assert summary.parameters == summary.active_parameters == model.num_parameters()
    assert summary.nbytes == 2 * model.num_parameters() and summary.dtypes == {"bfloat16": summary.nbytes}
    assert parts(summary) == {
        "embedding": 61 * 32,
        "attention": 3 * (2 * 32 * 32 + 2 * 16 * 32 + 32 + 2 * 16),
        "mlp": 3 * 3 * 32 * 48,
        "norm": 7 * 32,
    }
    assert summary.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert {t.name for t in summary.tensors} == set(load_file(folder / "model.safetensors"))
    assert summary.memory_bytes["float32"] == 4 * model.num_parameters()


def test_the_cache_grows_with_the_windows_in_mind(folder):
    cache = {cost.context_len: cost for cost in summarize(folder).cache}
    layer = 2 * (8 + 8) * 2  # bytes a token: two key/value heads of 8, keys and values, bfloat16
    assert list(cache) == [1024, 4096]
    assert cache[4096].nbytes == layer * (4096 + 2 * 1000)
    assert cache[4096].next_token_bytes == layer  # the two windowed layers are full
    assert cache[4096].bytes_per_token == cache[4096].nbytes / 4096


def test_a_recurrent_model_has_no_bytes_a_token(tmp_path):
    config = MambaConfig(vocab_size=31, hidden_size=16, num_layers=2)
    save_model(init_weights(Mamba(config), seed=1), tmp_path)
    cache = summarize(tmp_path).cache
    assert cache[0].nbytes == cache[-1].nbytes > 0 and cache[0].next_token_bytes == 0
    assert "recurrent" in parts(summarize(tmp_path))


def test_experts_are_counted_in_all_and_as_used(tmp_path):
    config = MixtralConfig(vocab_size=31, hidden_size=16, num_layers=2, num_heads=2, experts=MoeOptions(8, 2, 24))
    save_model(init_weights(Mixtral(config), seed=1), tmp_path)
    experts = next(part for part in summarize(tmp_path).parts if part.name == "experts")
    assert experts.parameters == 2 * 8 * 3 * 16 * 24
    assert experts.active_parameters == experts.parameters // 4
    assert parts(summarize(tmp_path))["router"] == 2 * 8 * 16


def test_low_bit_weights_count_as_the_matrix_they_stand_for(tmp_path):
    model = init_weights(Llama(replace(CONFIG, tie_embeddings=False)), seed=1).to(torch.bfloat16)
    for name, layer in list(linears(model)):
        replace_module(model, name, LAYERS[4].from_linear(layer, 16))
    model.quantization_config = quantization_config(4, 16, [])
    save_model(model, tmp_path)
    summary = summarize(tmp_path)
    assert summary.parameters == Llama(replace(CONFIG, tie_embeddings=False)).num_parameters()
    assert summary.dtypes["int32"] == sum(t.nbytes for t in summary.tensors if t.name.endswith("weight_packed"))


def test_a_gguf_file_is_told_without_unpacking_it(tmp_path):
    model = init_weights(Llama(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64)), seed=1)
    write_gguf(model, None, tmp_path / "m.gguf", dtype="q8_0")
    summary = summarize(tmp_path / "m.gguf", check_values=True)
    assert summary.parameters == model.num_parameters() and not summary.bad_tensors
    assert {"Q8_0", "F32"} == set(summary.dtypes) and "other" not in parts(summary)
    assert {t.part for t in summary.tensors} == {"embedding", "attention", "mlp", "norm", "head"}


def test_pickled_and_sharded_folders_are_told_too(folder, tmp_path):
    whole = summarize(folder)
    state = load_file(folder / "model.safetensors")
    save_model(load_model(folder), folder, max_shard_bytes=5000)
    assert parts(summarize(folder)) == parts(whole)
    save_model(load_model(folder), tmp_path / "p")
    (tmp_path / "p" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "p" / "pytorch_model.bin")
    assert parts(summarize(tmp_path / "p")) == parts(whole)


def test_nan_and_infinity_are_loaded_and_told(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, :2] = torch.tensor([float("nan"), float("inf")])
    save_file(tensors, folder / "model.safetensors")
    load_model(folder)
    assert not summarize(folder).bad_tensors  # the values were not read
    assert [(t.name, t.num_bad) for t in summarize(folder, check_values=True).bad_tensors] == [
        ("model.layers.1.mlp.up_proj.weight", 2)
    ]


def test_what_loading_refuses_is_refused(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        summarize(folder)


def test_no_weight_is_read(tmp_path):
    """A file of 4 GB that takes no room on the disk is told within a memory that could not hold it."""
    config = replace(CONFIG, vocab_size=32_000_000, tie_embeddings=True)
    with torch.device("meta"):
        model = Llama(config)
    from modelwright.models.layout import to_published

    offset, header = 0, {}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            end = offset + tensor.nbytes
            header[to_published(model, name)] = {
                "dtype": "F32",
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + offset)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    code = (
        "from modelwright.base.device import peak_memory_bytes; from modelwright.models.summary import summarize\n"
        f"s = summarize({str(tmp_path)!r}); print(s.nbytes, peak_memory_bytes())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    nbytes, peak = map(int, run.stdout.split())
    assert nbytes > 4e9 and peak < 1e9
