import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import modelwright as mw
from modelwright.base.errors import CheckpointError
from modelwright.models.gguf import read_gguf, write_gguf
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.llama2c import MAGIC, read_llama2c
from modelwright.nn.init import init_weights
from modelwright.nn.rope import half_split_order

WEIGHTS = Path(os.environ.get("MODELWRIGHT_DATA", "/nonexistent")) / "weights"
needs_data = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="MODELWRIGHT_DATA is not set")
SIZES = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 11, "seq_len": 32}
BLOCK_PARTS = ("attention.q", "attention.k", "attention.v", "attention.o")
MLP_PARTS = ("mlp.gate", "mlp.down", "mlp.up")


def tiny(is_shared: bool) -> Llama:
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_seq_len=32,
        tie_embeddings=is_shared,
        bos_token_id=1,
        eos_token_id=(2,),
    )
    model = Llama(config)
    init_weights(model, seed=0)
    return model.eval()


def write(path: Path, model: Llama, version: int) -> Path:
    """Write a model as the program's own export does, by the words of its export.py."""
    state, order = model.state_dict(), half_split_order(4).argsort()

    def stacked(name: str) -> list[torch.Tensor]:
        tensors = [state[f"layers.{i}.{name}.weight"] for i in range(2)]
        if name in ("attention.q", "attention.k"):
            tensors = [t.view(-1, 4, 16)[:, order].reshape(t.shape) for t in tensors]
        return tensors

    attention = [t for name in BLOCK_PARTS for t in stacked(name)]
    mlp = [t for name in MLP_PARTS for t in stacked(name)]
    norms = [stacked("attention_norm"), stacked("mlp_norm"), [state["norm.weight"]]]
    is_shared = model.config.tie_embeddings
    head = [] if is_shared else [state["lm_head.weight"]]
    embed = [state["embed.weight"]]
    if version == 0:
        tables = [torch.zeros(32, 4)]
        parts = [*embed, *norms[0], *attention, *norms[1], *mlp, *norms[2], *tables, *head]
        sizes = {**SIZES, "vocab_size": 11 if is_shared else -11}
        header = struct.pack("<7i", *sizes.values())
    else:
        parts = [*norms[0], *norms[1], *norms[2], *embed, *attention, *mlp, *head]
        header = struct.pack("<Ii7i?", MAGIC, 1, *SIZES.values(), is_shared).ljust(256, b"\0")
    path.write_bytes(header + b"".join(part.numpy().astype("<f4").tobytes() for part in parts))
    return path


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("is_shared", [True, False])
def test_both_versions_give_back_the_model(tmp_path: Path, version: int, is_shared: bool):
    model = tiny(is_shared)
    read = read_llama2c(write(tmp_path / "model.bin", model, version))
    assert read.config == model.config
    assert not read.training
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(read(ids).logits, model(ids).logits)
    assert read_llama2c(tmp_path / "model.bin", dtype=torch.bfloat16).embed.weight.dtype == torch.bfloat16


@torch.no_grad()
def greedy(model: nn.Module, num_steps: int) -> list[int]:
    ids = [1]
    state = model.new_state(1, num_steps + 1)
    for _ in range(num_steps):
        positions = state.positions(1)
        logits = model(torch.tensor([ids[-1:]]), positions=positions, state=state).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == 1:
            return ids[:-1]
    return ids


@needs_data
def test_the_published_story_comes_out_token_for_token_in_every_format(tmp_path: Path):
    folder = WEIGHTS / "stories260K"
    model, tokenizer = read_llama2c(folder / "stories260K.bin"), mw.load_tokenizer(folder / "tok512.bin")
    expected = (folder / "expected_greedy_200.txt").read_text(encoding="utf-8")
    ids = greedy(model, 200)
    assert len(ids) == 201
    assert tokenizer.decode(ids) == expected
    mw.save_model(model, tmp_path / "hf")
    tokenizer.save(tmp_path / "hf")
    again = mw.load_model(tmp_path / "hf")
    assert greedy(again, 200) == ids
    write_gguf(again, mw.load_tokenizer(tmp_path / "hf"), tmp_path / "x.gguf", "f32")
    back = read_gguf(tmp_path / "x.gguf")
    assert greedy(back, 200) == ids
    assert mw.load_tokenizer(tmp_path / "x.gguf").decode(ids) == expected
    mw.save_model(back, tmp_path / "hf2")
    assert (tmp_path / "hf2/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()


@needs_data
def test_another_published_model_tells_a_story_too():
    folder = WEIGHTS / "babyllama105"
    model, tokenizer = read_llama2c(folder / "model5000.bin"), mw.load_tokenizer(folder / "tok105.model")
    assert model.config.vocab_size == tokenizer.vocab_size == 105
    text = tokenizer.decode(greedy(model, 60))
    assert text.startswith("Once upon a time, there was a little girl named Lily.")


@pytest.mark.parametrize("cut", [0, 10, 27, 28, 400, -4, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, cut: int):
    path = write(tmp_path / "model.bin", tiny(True), 0)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.bin"):
        read_llama2c(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (struct.pack("<7i", 1 << 30, 1, 1, 1, 1, 1, 1), "gives dim as 1073741824"),
        (struct.pack("<7i", 16, 24, 0, 4, 2, 11, 32), "gives n_layers as 0"),
        (struct.pack("<7i", 16, 24, 2, 3, 2, 11, 32), "which do not divide"),
        (struct.pack("<7i", 1 << 20, 1 << 20, 1 << 20, 4, 2, 11, 32), "asks for .*cut short"),
        (struct.pack("<Ii7i", MAGIC, 2, *SIZES.values()), "version 2; versions 0 and 1"),
    ],
)
def test_headers_that_lie_are_refused_before_anything_is_made(tmp_path: Path, header: bytes, message: str):
    (tmp_path / "model.bin").write_bytes(header + bytes(np.zeros(100)))
    with pytest.raises(CheckpointError, match=message):
        read_llama2c(tmp_path / "model.bin")


@pytest.mark.parametrize("width", [128, 640, 0x4B50])
def test_widths_that_begin_like_a_pickle_are_no_pickle(tmp_path: Path, width: int):
    (tmp_path / "model.bin").write_bytes(struct.pack("<7i", width, 24, 2, 4, 2, 11, 32))
    with pytest.raises(CheckpointError, match="cut short"):  # by the reader of this format
        mw.load_model(tmp_path / "model.bin")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"nowhere\.bin cannot be read"):
        read_llama2c(tmp_path / "nowhere.bin")
