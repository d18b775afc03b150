"""GPTQ and AWQ folders load to the numbers that their tools' own packing means, and are served."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelwright.base.errors import CheckpointError
from modelwright.base.types import SamplingParams
from modelwright.engine.llm import LLM
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.weights import from_published, load_model, save_model
from modelwright.nn.lowbit import Int4Linear, LowBitLinear

IDS = torch.arange(24).view(2, 12) % 64


def small_llama() -> Llama:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4}
    return Llama(LlamaConfig(**sizes, num_kv_heads=2)).eval()


def pack_gptq(q: np.ndarray, z: np.ndarray, bits: int, stored_less: int) -> tuple[Tensor, Tensor]:
    """AutoGPTQ's QuantLinear.pack, loop by loop: q (in, out), z (groups, out)."""
    per = 32 // bits
    qweight = np.zeros((q.shape[0] // per, q.shape[1]), dtype=np.uint32)
    for i in range(q.shape[0]):
        qweight[i // per] |= (q[i].astype(np.uint32)) << np.uint32(bits * (i % per))
    z = (z - stored_less) & ((1 << bits) - 1)
    qzeros = np.zeros((z.shape[0], z.shape[1] // per), dtype=np.uint32)
    for o in range(z.shape[1]):
        qzeros[:, o // per] |= z[:, o].astype(np.uint32) << np.uint32(bits * (o % per))
    return torch.from_numpy(qweight.view(np.int32)), torch.from_numpy(qzeros.view(np.int32))


def pack_awq(q: np.ndarray) -> Tensor:
    """AutoAWQ's WQLinear_GEMM.from_linear, loop by loop, for q (in, out) or z (groups, out)."""
    packed = np.zeros((q.shape[0], q.shape[1] // 8), dtype=np.uint32)
    for column in range(packed.shape[1]):
        for i, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            packed[:, column] |= q[:, column * 8 + place].astype(np.uint32) << np.uint32(4 * i)
    return torch.from_numpy(packed.view(np.int32))


def make_folder(
    folder: Path, method: str, *, bits: int = 4, sym: bool = True, desc_act: bool = False, form: str | None = None
) -> dict[str, Tensor]:
    """Write a quantized folder and return the plain weights that its numbers mean, worked out one by one."""
    save_model(small_llama(), folder)
    tensors, meant = {}, {}
    rng = np.random.default_rng(0)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = tensor.half()
            continue
        layer, (outs, ins) = name.removesuffix(".weight"), tensor.shape
        groups, top = ins // 32, (1 << bits) - 1
        q = rng.integers(0, top + 1, (ins, outs))
        z = np.full((groups, outs), 1 << (bits - 1)) if sym else rng.integers(0, top + 1, (groups, outs))
        scale = torch.from_numpy(rng.uniform(0.01, 0.03, (groups, outs)) * 8 / (1 << (bits - 1))).half()
        g = np.arange(ins) // 32
        if desc_act:
            g = rng.permutation(g)
        if method == "awq":
            tensors |= {f"{layer}.qweight": pack_awq(q), f"{layer}.qzeros": pack_awq(z)}
        else:
            words, zeros = pack_gptq(q, z, bits, 0 if form == "gptq_v2" else 1)
            tensors |= {f"{layer}.qweight": words, f"{layer}.qzeros": zeros}
            tensors[f"{layer}.g_idx"] = torch.from_numpy(g.astype(np.int32))
        tensors[f"{layer}.scales"] = scale
        weight = np.empty((outs, ins), dtype=np.float32)
        for i in range(ins):
            weight[:, i] = (q[i] - z[g[i]]) * scale[g[i]].float().numpy()
        meant[name] = torch.from_numpy(weight)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    scheme = {"quant_method": method, "bits": bits, "group_size": 32, "sym": sym, "desc_act": desc_act}
    if method == "awq":
        scheme = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    if form is not None:
        scheme["checkpoint_format"] = form
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": scheme}))
    return meant


CASES = {
    "gptq": {"method": "gptq"},
    "gptq 8 bits": {"method": "gptq", "bits": 8},
    "gptq 2 bits": {"method": "gptq", "bits": 2},
    "gptq in activation order": {"method": "gptq", "desc_act": True},
    "gptq with zeros": {"method": "gptq", "sym": False},
    "gptq with zeros, second form": {"method": "gptq", "sym": False, "form": "gptq_v2"},
    "gptq, second form": {"method": "gptq", "form": "gptq_v2"},
    "awq": {"method": "awq", "sym": False},
}


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_the_tools(tmp_path, case):
    meant = make_folder(tmp_path, **CASES[case])
    model = load_model(tmp_path, dtype=torch.float32)
    plain = small_llama()
    state = plain.state_dict()
    for name, weight in meant.items():
        ours = str(from_published(plain, name))
        layer = model.get_submodule(ours.removesuffix(".weight"))
        read = layer.dequantize() if isinstance(layer, LowBitLinear) else layer.weight
        # A product multiplied out is rounded once, to the scales' float16; one kept in bits is exact in float32.
        exact = weight if isinstance(layer, LowBitLinear) else weight.half().float()
        assert torch.equal(read, exact), name
        state[ours] = weight
    plain.load_state_dict({**state, "embed.weight": model.embed.weight, "lm_head.weight": model.lm_head.weight})
    with torch.no_grad():
        assert (model(IDS).logits - plain(IDS).logits).abs().max() < 0.02
    kept = {"gptq", "gptq 8 bits", "gptq, second form"}
    assert any(isinstance(m, LowBitLinear) for m in model.modules()) == (case in kept)


def test_a_symmetric_gptq_folder_is_served_in_4_bits(tmp_path):
    make_folder(tmp_path, "gptq")
    model = load_model(tmp_path, dtype=torch.bfloat16)
    assert isinstance(model.layers[0].attention.q, Int4Linear)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    assert len(LLM(model).generate([1, 2, 3], params)[0].token_ids) == 4


def test_the_zeros_of_the_first_form_are_one_more_than_stored(tmp_path):
    meant = make_folder(tmp_path / "a", "gptq", sym=False)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"  # negative control: a lie about the form
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    model = load_model(tmp_path / "a", dtype=torch.float32)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(model.layers[0].attention.q.weight, meant[name], atol=1e-3)


BAD = {
    "3 bits": ({"bits": 3}, "bits is 3 of gptq"),
    "another form": ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    "another method": ({"quant_method": "aqlm"}, "quant_method is 'aqlm'"),
    "other bits than stored": ({"bits": 8}, "do not fit together"),
    "symmetric by name alone": ({"sym": True}, "its zeros or g_idx say otherwise"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_read_is_refused_by_name(tmp_path, case):
    changes, message = BAD[case]
    make_folder(tmp_path, "gptq", sym=False)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_a_layer_without_its_zeros_is_refused_by_name(tmp_path):
    make_folder(tmp_path, "awq", sym=False)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.qzeros"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="layers.1.mlp.up_proj has no qzeros"):
        load_model(tmp_path)


def test_a_tied_output_matrix_stays_the_embedding(tmp_path):
    make_folder(tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = load_model(tmp_path, dtype=torch.float32)
    assert model.lm_head.weight is model.embed.weight
    assert isinstance(model.layers[0].attention.q, Int4Linear)
