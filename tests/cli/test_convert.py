import os
import shutil
from pathlib import Path

import pytest
import torch
from tests.conftest import Toy

import modelwright as mw
from modelwright.base.artifact import read_manifest, verify
from modelwright.cli.main import main

WEIGHTS = Path(os.environ.get("MODELWRIGHT_DATA", "/nonexistent")) / "weights"
needs_data = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="MODELWRIGHT_DATA is not set")
Shown = pytest.CaptureFixture[str]


def done(capsys: Shown, *arguments: object) -> str:
    capsys.readouterr()
    code = main(["convert", *map(str, arguments)])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return shown.out


def refused(capsys: Shown, *arguments: object) -> str:
    capsys.readouterr()
    assert main(["convert", *map(str, arguments)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    return shown


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return mw.load_model(path)(torch.arange(40)[None]).logits


@needs_data
def test_a_llama2c_model_goes_to_a_folder_to_gguf_and_back(capsys: Shown, tmp_path: Path):
    source = WEIGHTS / "stories260K/stories260K.bin"
    out = done(capsys, source, tmp_path / "hf", "--to", "hf")
    assert "LlamaForCausalLM, 260.0k parameters in f32, a tokenizer of 512 tokens, 1.1 MB ->" in out
    done(capsys, tmp_path / "hf", tmp_path / "x.gguf", "--to", "gguf")
    done(capsys, tmp_path / "x.gguf", tmp_path / "back", "--to", "hf")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert torch.equal(logits(tmp_path / "x.gguf"), logits(source))
    text = (WEIGHTS / "stories260K/expected_greedy_200.txt").read_text(encoding="utf-8")
    tokenizer = mw.load_tokenizer(tmp_path / "back")
    assert tokenizer.encode(text) == mw.load_tokenizer(WEIGHTS / "stories260K/tok512.bin").encode(text)
    manifest = read_manifest(tmp_path / "hf")
    assert manifest.settings["source"][0]["path"] == "stories260K.bin"


@needs_data
def test_the_tokenizer_beside_a_file_is_found_whatever_its_kind(capsys: Shown, tmp_path: Path):
    out = done(capsys, WEIGHTS / "babyllama105/model5000.bin", tmp_path / "x.gguf", "--to", "gguf", "--dtype", "f16")
    assert "in f16, a tokenizer of 105 tokens" in out
    peer = mw.load_tokenizer(WEIGHTS / "babyllama105/tok105.model")
    text = "Once upon a time"
    assert mw.load_tokenizer(tmp_path / "x.gguf").encode(text, add_special_tokens=False) == peer.encode(text)


def test_a_models_folder_becomes_gguf_with_its_lineage(capsys: Shown, toy: Toy, tmp_path: Path):
    model = toy.model
    out = done(capsys, model, tmp_path / "gguf", "--to", "gguf", "--dtype", "q8_0")
    assert "in q8_0" in out
    assert verify(tmp_path / "gguf").parents[0].hash == read_manifest(model).hash
    original, again = mw.load_tokenizer(model), mw.load_tokenizer(tmp_path / "gguf/model.gguf")
    assert again.encode("def f(x): return 12") == original.encode("def f(x): return 12")
    done(capsys, tmp_path / "gguf", tmp_path / "hf", "--to", "hf", "--dtype", "bf16")
    assert mw.load_model(tmp_path / "hf").embed.weight.dtype == torch.bfloat16
    assert main(["lineage", str(tmp_path / "hf")]) == 0
    done(capsys, model, tmp_path / "exact.gguf", "--to", "gguf", "--dtype", "f32")
    assert (logits(tmp_path / "exact.gguf") - logits(model).float()).abs().max() < 1e-3


def test_a_given_tokenizer_wins_and_none_is_said(capsys: Shown, toy: Toy, tmp_path: Path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(toy.model / name, bare)
    assert "no tokenizer" in done(capsys, bare, tmp_path / "a.gguf", "--to", "gguf")
    out = done(capsys, bare, tmp_path / "b.gguf", "--to", "gguf", "--tokenizer", toy.tokenizer)
    assert "a tokenizer of" in out


def test_what_cannot_be_is_refused_and_nothing_is_written(capsys: Shown, toy: Toy, tmp_path: Path):
    model = toy.model
    assert "--to is 'onnx'" in refused(capsys, model, tmp_path / "x", "--to", "onnx")
    assert "--dtype is 'q4_0'; hf is written as f32" in refused(
        capsys, model, tmp_path / "x", "--to", "hf", "--dtype", "q4_0"
    )
    assert "the source itself" in refused(capsys, model, model, "--to", "hf")
    assert "does not exist" in refused(capsys, tmp_path / "nowhere", tmp_path / "x", "--to", "hf")
    assert "a file's name" in refused(capsys, model, tmp_path / "x.gguf", "--to", "hf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\0\0\0")
    assert "bad.gguf is cut short" in refused(capsys, tmp_path / "bad.gguf", tmp_path / "x", "--to", "hf")
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x04\x95abcdefgh")
    assert "pickled" in refused(capsys, tmp_path / "pickle.bin", tmp_path / "x", "--to", "hf")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    assert "no verb of mw made" in refused(capsys, model, tmp_path / "mine", "--to", "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.gguf", "mine", "pickle.bin"]
