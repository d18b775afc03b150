"""Ten lines fine-tune a model in four bits; what does not fit is refused with what does."""

import json
import re
from pathlib import Path

import pytest
import torch
from tests.conftest import Toy

import modelwright as mw
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import write_json
from modelwright.models.weights import load_model
from modelwright.nn.adapters import trained_parameters
from modelwright.nn.nf4 import NF4Linear

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = [{"instruction": f"Say {word}.", "input": "", "output": f"{word} {word}"} for word in ("one", "two", "six")]


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_ten_lines_fine_tune_a_model(toy: Toy, tmp_path, load_in_4bit):
    model = mw.FastModel.from_pretrained(toy.model, max_seq_len=128, load_in_4bit=load_in_4bit)
    model = model.with_lora(r=8, target_modules=TARGETS)
    assert any(isinstance(m, NF4Linear) for m in model.model.modules()) == load_in_4bit
    sizes = [m for m in model.model.modules() if hasattr(m, "lora_a")]
    assert sum(p.numel() for p in trained_parameters(model.model)) == sum(
        8 * (m.in_features + m.out_features) for m in sizes
    )
    trainer = mw.Trainer(model, ROWS, template="alpaca", num_steps=8, learning_rate=0.01, warmup_steps=1)
    run = trainer.train()
    assert run.losses[-1][1] < run.losses[0][1]
    model.save_adapter(tmp_path / "adapter")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model.model(ids).logits
        again = mw.FastModel.from_pretrained(toy.model, max_seq_len=128, load_in_4bit=load_in_4bit)
        torch.testing.assert_close(again.load_adapter(tmp_path / "adapter").model(ids).logits, expected)
        model.save_merged(tmp_path / "merged")
        merged = load_model(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(merged.float(), expected.float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_what_begins_from_dense_weights_reads_them_again(toy: Toy, init):
    plain = mw.FastModel.from_pretrained(toy.model, dtype=torch.float32)
    rounded = mw.FastModel.from_pretrained(toy.model, dtype=torch.float32, load_in_4bit=True)
    name = "layers.0.mlp.up"
    weight = plain.model.get_submodule(name).weight
    lost = (rounded.model.get_submodule(name).dequantize() - weight).norm()
    layer = rounded.with_lora(r=8, init=init).model.get_submodule(name)
    assert isinstance(layer.base, NF4Linear) and (layer.total() - weight).norm() < 0.95 * lost
    assert not any(type(m) is torch.nn.Linear for n, m in rounded.model.named_modules() if "layers" in n)
    with pytest.raises(ConfigError, match="already has adapters"):
        rounded.with_lora(r=8, init=init)


def test_the_ten_lines_of_the_page_run_as_they_stand(toy: Toy, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "finetune.md").read_text(encoding="utf-8")
    code = re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL).group(1)
    assert len(code.strip().splitlines()) <= 10 and "load_in_4bit=True" in code
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "base").symlink_to(toy.model)
    write_json(tmp_path / "alpaca.json", ROWS)
    exec(compile(code.replace("num_steps=60", "num_steps=3"), "docs/finetune.md", "exec"), {})
    assert json.loads((tmp_path / "runs/adapter/adapter_config.json").read_text())["r"] == 16
    assert "### Response" in (tmp_path / "runs/merged/chat_template.jinja").read_text()
    assert load_model(tmp_path / "runs/merged").config.num_layers == 2


def test_what_does_not_fit_is_refused(toy: Toy):
    with pytest.raises(ConfigError, match="max_seq_len is 4096; this model reads 2 to 512"):
        mw.FastModel.from_pretrained(toy.model, max_seq_len=4096)
    model = mw.FastModel.from_pretrained(toy.model, max_seq_len=64)
    with pytest.raises(ConfigError, match="Did you mean gate"):
        model.with_lora(target_modules=["gaet"])
    with pytest.raises(ConfigError, match="rank is 0"):
        model.with_lora(r=0)
    with pytest.raises(ConfigError, match="knows no lora_dropot"):
        model.with_lora(lora_dropot=0.1)
    with pytest.raises(ConfigError, match="num_stepz is not a setting"):
        mw.Trainer(model, ROWS, num_stepz=3)
    with pytest.raises(ConfigError, match="known: chat, alpaca"):
        mw.Trainer(model, ROWS, template="vicuna")
    with pytest.raises(DataError, match="longer than 65 tokens"):
        mw.Trainer(model, [{**ROWS[0], "output": "word " * 500}], template="alpaca")
    with pytest.raises(DataError, match="no row"):
        mw.Trainer(model, [])
