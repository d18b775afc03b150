"""Pickled checkpoints are read where that can run no code, and refused by name where it could."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from modelwright.base.errors import CheckpointError
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.weights import load_model, save_model, to_published
from modelwright.nn.init import init_weights

CONFIG = LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, max_seq_len=32)


@pytest.fixture
def model() -> Llama:
    return init_weights(Llama(CONFIG), seed=1).eval()


@pytest.fixture
def folder(tmp_path, model) -> Path:
    save_model(model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    return tmp_path / "m"


def published(model) -> dict[str, torch.Tensor]:
    return {to_published(model, name): tensor for name, tensor in model.state_dict().items()}


def is_equal(first, second) -> bool:
    return all(torch.equal(first.state_dict()[n], t) for n, t in second.state_dict().items())


@pytest.mark.parametrize("is_zip", [True, False])
def test_reads_a_whole_and_a_sharded_checkpoint(folder, model, is_zip):
    state = published(model)
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    assert is_equal(load_model(folder), model)
    assert {p.dtype for p in load_model(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    (folder / "pytorch_model.bin").unlink()
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[:7], names[7:]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({n: state[n] for n in part}, folder / file, _use_new_zipfile_serialization=is_zip)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert is_equal(load_model(folder), model)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="shard .*pytorch_model-00002-of-00002.bin is missing"):
        load_model(folder)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "../other.bin"}}))
    with pytest.raises(CheckpointError, match="name of a file in the same folder"):
        load_model(folder)


def test_safetensors_beside_it_are_preferred(folder, model):
    save_model(model, folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert is_equal(load_model(folder), model)


class Malice:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("way", ["zip", "old", "bare"])
def test_no_code_in_a_pickle_runs(folder, model, tmp_path, way):
    mark = tmp_path / "mark"
    state = {**published(model), "model.norm.weight": Malice(mark)}
    file = folder / "pytorch_model.bin"
    if way == "bare":
        file.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=way != "old")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*cannot be read without running the code"):
        load_model(folder)
    assert not mark.exists()
    if way == "bare":  # the control: the same file does run its code where it is trusted
        pickle.loads(file.read_bytes())
        assert mark.exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_refuses_a_damaged_file(folder, model, damage, is_zip):
    file = folder / "pytorch_model.bin"
    torch.save(published(model), file, _use_new_zipfile_serialization=is_zip)
    data = file.read_bytes()
    file.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "noise": data[:2] + bytes(200)}[damage])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_model(folder)


def test_refuses_what_is_not_tensors_by_name(folder, model):
    torch.save({"state_dict": published(model)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds a dict under 'state_dict'; expected tensors alone"):
        load_model(folder)
    torch.save([torch.ones(2)], folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds a list; expected tensors by name"):
        load_model(folder)


def test_a_pickle_or_another_file_on_its_own_is_told_apart_from_llama2c(folder, model):
    torch.save(published(model), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds pickled weights; expected .*Give the folder"):
        load_model(folder / "pytorch_model.bin")
    (folder / "model.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is no file that holds a whole model; expected .*\.gguf"):
        load_model(folder / "model.onnx")
