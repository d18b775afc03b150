"""mw inspect, mw pull and mw reshape on toy artifacts, and on what they must refuse."""

import json
from pathlib import Path

import pytest
from tests.cli.test_verbs import Shown, done, refused
from tests.conftest import Toy

from modelwright.base.artifact import lineage, verify
from modelwright.models.weights import load_model
from modelwright.tokenizer.formats import load_tokenizer


def test_inspect_tells_parts_memory_and_cache(toy: Toy, capsys: Shown):
    shown = done(capsys, "inspect", toy.model, "--tensors", "--values")
    for words in ("LlamaForCausalLM (llama)", "embedding", "attention", "weights in memory", "longest context 512"):
        assert words in shown
    assert "model.layers.1.mlp.up_proj.weight" in shown and "NaN or infinity: in no tensor" in shown
    figures = json.loads(done(capsys, "inspect", toy.model, "--json"))
    assert figures["parameters"] == load_model(toy.model).num_parameters()
    assert figures["cache"][-1] == {"context_len": 512, "nbytes": 2 * 512 * 2 * 32 * 4} | {
        k: figures["cache"][-1][k] for k in ("bytes_per_token", "next_token_bytes")
    }


def test_inspect_refuses_what_is_no_model(toy: Toy, capsys: Shown, tmp_path: Path):
    assert "no file that holds a whole model" in refused(capsys, "inspect", toy.data / "train.jsonl")
    assert "config.json does not exist" in refused(capsys, "inspect", toy.data)
    assert "does not exist" in refused(capsys, "inspect", tmp_path / "nowhere")


def test_pull_refuses_what_is_no_hub_id(capsys: Shown, tmp_path: Path):
    assert "well-formed hub id" in refused(capsys, "pull", "no/such/id", "--to", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_reshape_then_up_train(toy: Toy, capsys: Shown, tmp_path: Path):
    (tmp_path / "new.txt").write_text("textwrap\nshlex\n")
    out = tmp_path / "reshaped"
    shown = done(
        capsys, "reshape", toy.model, out, "--kv-heads", 1, "--depth", 3, "--add-tokens", tmp_path / "new.txt",
        "--data", toy.data,
    )  # fmt: skip
    assert "128 -> 96 numbers a token" in shown and "held-out perplexity" in shown
    model, tokenizer = load_model(out), load_tokenizer(out)
    assert (model.config.num_kv_heads, model.config.num_layers) == (1, 3)
    assert model.config.vocab_size == tokenizer.vocab_size == load_tokenizer(toy.model).vocab_size + 2
    assert len(tokenizer.encode("textwrap")) == 1
    measured = verify(out).measured
    assert measured["perplexity_after"] > 1 and measured["cache_after"] == 96
    recipe = Path(__file__).parents[2] / "recipes" / "pretrain" / "uptrain.yaml"
    done(
        capsys, "train", recipe, f"--data={toy.data}", f"--tokenizer={out}", f"--base={out}",
        f"--out={tmp_path / 'up'}", "--loop.num_steps=2", "--loop.micro_batch_size=2", "--loop.compile=false",
    )  # fmt: skip
    assert load_model(tmp_path / "up").config.num_kv_heads == 1
    assert out in [ancestor.path.resolve() for ancestor in lineage(tmp_path / "up")]


def test_reshape_of_silent_layers_costs_nothing(toy: Toy, capsys: Shown, tmp_path: Path):
    shown = done(capsys, "reshape", toy.model, tmp_path / "deep", "--depth", 4, "--data", toy.data)
    assert "largest difference of a logit 0," in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing is to be changed"),
        (["--kv-heads", "3"], "it must divide the model's 2"),
        (["--depth", "1"], "the model has 2 already"),
        (["--depth", "3", "--way", "sideways"], "way is 'sideways'; known: silent, stack"),
        (["--add-tokens", "nowhere.txt"], "nowhere.txt cannot be read"),
    ],
)
def test_reshape_refuses_and_writes_nothing(
    toy: Toy, capsys: Shown, tmp_path: Path, arguments: list[str], message: str
):
    assert message in refused(capsys, "reshape", toy.model, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()
    assert "the model itself" in refused(capsys, "reshape", toy.model, toy.model, "--depth", 3)
