"""Safetensors in and out: headers held against the file, memory that stays small, pages brought in ahead of use."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelwright.base.errors import CheckpointError
from modelwright.models.layout import to_published
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.prefetch import Prefetch
from modelwright.models.tensor_file import DTYPE_NAMES, find_shards, read_folder, read_header, write_tensors
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights

MEGABYTE = 1 << 20


def write_raw(file: Path, header: object, data: bytes, pad: bool = True) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 8) if pad else b""
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_every_dtype_goes_out_and_in_and_the_reference_reader_agrees(tmp_path):
    tensors = {
        str(dtype): (torch.arange(6).reshape(2, 3) - (0 if dtype in (torch.uint8, torch.bool) else 2)).to(dtype)
        for dtype in DTYPE_NAMES
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    write_tensors(tmp_path / "model.safetensors", tensors)
    theirs = load_file(tmp_path / "model.safetensors")
    ours = {name: tensor for _, name, tensor in read_folder(tmp_path)}
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for other in (ours[name], theirs[name]):
            assert other.dtype == tensor.dtype and other.shape == tensor.shape
            assert torch.equal(other.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
    header = read_header(tmp_path / "model.safetensors")
    assert {n: (e.dtype, e.shape, e.nbytes) for n, e in header.items()} == {
        n: (t.dtype, tuple(t.shape), t.nbytes) for n, t in tensors.items()
    }


@pytest.mark.parametrize("length", range(1, 9))
def test_a_header_without_padding_is_read(tmp_path, length):
    name, data = "x" * length, torch.tensor([1.5, -2.0])
    write_raw(tmp_path / "model.safetensors", {name: entry()}, data.numpy().tobytes(), pad=False)
    [(_, found, tensor)] = read_folder(tmp_path)
    assert found == name and torch.equal(tensor, data)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"[1]", "its header is no JSON object"),
        (b"{", "its header is no JSON"),
        (b"[" * 100_000, "its header is no JSON"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 1}', "holds the tensor a twice"),
        ({"a": 3}, "tensor a is described as 3"),
        ({"a": entry(shape=[-2])}, "tensor a is described as"),
        ({"a": entry(offsets=[0])}, "tensor a is described as"),
        ({"a": entry(shape=["2"])}, "tensor a is described as"),
        ({"a": entry(dtype="F3")}, "tensor a has the dtype F3; known: F64"),
        ({"a": entry(dtype=None)}, "tensor a has the dtype None"),
        ({"a": entry(shape=[3])}, r"tensor a, F32 of shape \(3,\), has 8 bytes"),
        ({"a": entry(shape=[4], offsets=[0, 16])}, "tensor a should end at byte"),
        ({"a": entry(shape=[1], offsets=[4, 8])}, "tensor a starts at byte"),
        ({"a": entry(shape=[1], offsets=[0, 4])}, "its tensors end at byte"),
        ({"a": entry(), "b": entry()}, "tensor b starts at byte"),
        ({"a": entry(shape=[2**62], offsets=[0, 2**64])}, "tensor a should end at byte"),
    ],
)
def test_a_header_that_contradicts_itself_or_the_file_is_refused(tmp_path, header, match):
    write_raw(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=match):
        list(read_folder(tmp_path))


def test_a_file_cut_anywhere_is_refused(tmp_path):
    write_tensors(tmp_path / "model.safetensors", {"a": torch.ones(5), "b": torch.zeros(3, dtype=torch.int8)})
    data = (tmp_path / "model.safetensors").read_bytes()
    for length in range(len(data)):
        (tmp_path / "model.safetensors").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            list(read_folder(tmp_path))


def test_a_link_out_of_the_folder_is_followed_and_a_name_out_of_it_is_not(tmp_path):
    """The hub's cache is made of links; whoever can place one in the folder can place the file itself."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "m").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "blobs" / "abc")
    (tmp_path / "m" / "model.safetensors").symlink_to(tmp_path / "blobs" / "abc")
    assert [name for _, name, _ in read_folder(tmp_path / "m")] == ["a"]
    (tmp_path / "m" / "model.safetensors").unlink()
    for bad in ("../blobs/abc", str(tmp_path / "blobs" / "abc"), "..\\blobs\\abc"):
        (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": bad}}))
        with pytest.raises(CheckpointError, match="name of a file in the same folder"):
            find_shards(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "config.json"}}))
    with pytest.raises(CheckpointError, match=r"expected a file that ends with \.safetensors"):
        find_shards(tmp_path / "m")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    config = LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2)
    save_model(init_weights(Llama(config), seed=1), tmp_path, max_shard_bytes=3000)
    first, *_, last = sorted(tmp_path.glob("model-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(last), name: tensor}, last)
    with pytest.raises(CheckpointError, match=f"{name} gives .* a second time"):
        load_model(tmp_path)


# Memory, measured in a process of its own: 8 layers of 16 MB in float32, a shard each.

MEMORY = """
import sys
from pathlib import Path
import torch
from modelwright.models.weights import load_model, save_model

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

folder, dtype, out = sys.argv[1], getattr(torch, sys.argv[2], None), sys.argv[3]
load_model(sys.argv[4], dtype=dtype)  # imports and first-time allocations are not what is measured
save_model(load_model(sys.argv[4]), out + "-first")
before, anonymous = status("VmRSS"), status("RssAnon")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
model = load_model(folder, dtype=dtype)
print(status("VmHWM") - before, status("RssAnon") - anonymous)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
save_model(model, out, max_shard_bytes=16_000_000)
print(status("VmHWM") - before, 0)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("large")
    shape = {"vocab_size": 64, "hidden_size": 512, "num_heads": 4}
    model = Llama(LlamaConfig(**shape, intermediate_size=2048, num_layers=8))
    for p in model.parameters():
        p.data.fill_(0.01)
    save_model(model, root / "large", max_shard_bytes=17_000_000)
    save_model(Llama(LlamaConfig(**shape, intermediate_size=16, num_layers=1)), root / "small")
    return root


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["stored", "bfloat16"])
def test_loading_and_saving_hold_one_shard_and_one_tensor_beside_the_model(large, tmp_path, dtype):
    files = list((large / "large").glob("*.safetensors"))
    total, shard, tensor = sum(f.stat().st_size for f in files), max(f.stat().st_size for f in files), 4 * MEGABYTE
    assert len(files) == 8 and total > 130e6
    command = [sys.executable, "-c", MEMORY, large / "large", dtype, tmp_path / "out", large / "small"]
    # Without it a freed tensor stays with the allocator, which is not what is asked.
    run = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"MALLOC_TRIM_THRESHOLD_": "0"}
    )
    assert run.returncode == 0, run.stderr
    (loading, kept), (saving, _) = (map(int, line.split()) for line in run.stdout.splitlines())
    slack = 12 * MEGABYTE
    if dtype == "stored":
        assert kept < slack  # mapped: the pages are the file's own, and can be dropped
        assert loading < total + slack
        assert saving < total + tensor + slack  # what the prefetch had not brought in yet
    else:
        assert loading < total / 2 + shard + tensor + slack < total
        assert saving < tensor + slack


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_pages_are_brought_in_ahead_of_their_use(tmp_path):
    (tmp_path / "file").write_bytes(bytes(40 * MEGABYTE))

    def resident() -> int:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        next((line for line in lines if str(tmp_path / "file") in line), None)
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:")), 0)

    storage = torch.UntypedStorage.from_file(str(tmp_path / "file"), False, 40 * MEGABYTE)
    assert resident() < MEGABYTE
    with Prefetch() as prefetch:
        prefetch.add(storage)
    for _ in range(200):
        if resident() == 40 * MEGABYTE:
            break
        time.sleep(0.05)
    assert resident() == 40 * MEGABYTE


def test_a_model_larger_than_half_of_the_free_memory_is_not_brought_in(monkeypatch):
    monkeypatch.setattr("modelwright.models.prefetch._free_bytes", lambda: 100)
    with Prefetch() as prefetch:
        prefetch.add(torch.empty(60, dtype=torch.uint8).untyped_storage())
        assert prefetch._thread is None


def test_an_interrupted_save_leaves_no_half_of_a_file(tmp_path, monkeypatch):
    config = LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
    model = init_weights(Llama(config), seed=1)
    model.layers[1].mlp.up.weight = torch.nn.Parameter(torch.empty(24, 16, device="meta"))
    with pytest.raises(CheckpointError, match=to_published(model, "layers.1.mlp.up.weight")):
        save_model(model, tmp_path / "m")
    assert not list((tmp_path / "m").iterdir())
