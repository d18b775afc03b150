"""What pre-training is fed: a mixture that is stopped and taken up equals one that is not, whatever its sources are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from modelwright.base.artifact import lineage
from modelwright.base.config import build, read_recipe
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import hash_file, write_jsonl
from modelwright.cli.main import main
from modelwright.cli.recipe import read_training_recipe
from modelwright.data.load import Batch
from modelwright.data.token_shards import TokenShards, write_token_shards
from modelwright.models.scoring import token_log_probs
from modelwright.models.weights import load_model
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.tokenizer.train import train_bpe
from modelwright.train.loop import LoopConfig
from modelwright.train.pretrain import PretrainConfig, run_pretrain
from modelwright.train.supply import count_tokens, document_perplexities, open_supply


class StoppedError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def sources(toy, tmp_path_factory):
    """A data set, token shards and rules, all small."""
    root = tmp_path_factory.mktemp("sources")
    texts = [f"Rule {i}: whoever keeps {i * 7} boxes writes form {i % 5}. " * (1 + i % 6) for i in range(40)]
    write_token_shards(texts, load_tokenizer(toy.tokenizer), root / "rules-tokens")
    (root / "lists").mkdir()
    write_jsonl(
        root / "lists" / "train.jsonl", [{"text": f"{i}, {i + 1}, {i + 2} " * 30, "level": i} for i in range(20)]
    )
    return root


def recipe(toy, sources, out, more=""):
    path = out.with_suffix(".yaml")
    path.write_text(
        f"method: pretrain\ntokenizer: {toy.tokenizer}\nout: {out}\nmax_seq_len: 32\n"
        f"data:\n  sources:\n    - {{path: {toy.data}, weight: 2}}\n"
        f"    - {{path: {sources / 'rules-tokens'}, weight: 1}}\n"
        f"    - {{path: {sources / 'lists'}, weight: 1}}\n  temperature: 2.0\n{more}"
        "shape: {hidden_size: 16, num_layers: 1, num_heads: 2, intermediate_size: 32}\n"
        "loop: {num_steps: 14, micro_batch_size: 4, compile: false, device: cpu, checkpoint: {every: 3}}\n"
    )
    return path


CURRICULUM = "  rows: documents\n  curriculum: {kind: competence, first_competence: 0.3}\n  difficulty: {by: length}\n"


@pytest.mark.parametrize("more", ["", CURRICULUM, "  num_workers: 2\n"], ids=["stream", "curriculum", "workers"])
def test_a_mixture_that_is_stopped_and_taken_up_ends_like_one_that_is_not(toy, sources, tmp_path, more):
    _, whole = read_training_recipe(recipe(toy, sources, tmp_path / "whole", more))
    _, stopped = read_training_recipe(recipe(toy, sources, tmp_path / "stopped", more))

    def stop(run, report):
        if report.step == 8:  # two steps behind the newest checkpoint
            raise StoppedError

    with pytest.raises(StoppedError):
        run_pretrain(stopped, hooks=[stop])
    assert not stopped.out.exists()
    run_pretrain(stopped)
    result = run_pretrain(whole)
    assert hash_file(stopped.out / "model.safetensors") == hash_file(whole.out / "model.safetensors")
    told = json.loads((whole.out / "training.json").read_text())["data"]
    assert [row["share"] for row in told] == pytest.approx([2**0.5 / (2**0.5 + 2), 0.2929, 0.2929], abs=1e-4)
    assert sum(row["num_epochs"] > 0 for row in told) == 3 and result.figures["num_steps"] == 14


def test_a_run_that_goes_on_refuses_another_mixture(toy, sources, tmp_path):
    file = recipe(toy, sources, tmp_path / "model")
    _, config = read_training_recipe(file)

    def stop(run, report):
        raise StoppedError

    with pytest.raises(StoppedError):
        run_pretrain(config, hooks=[stop])
    _, other = read_training_recipe(file, ["--data.temperature=3"])
    with pytest.raises(ConfigError, match=r"data.temperature"):
        run_pretrain(other)


def test_token_shards_alone_are_a_run_s_data(toy, sources, tmp_path, capfd):
    file = recipe(toy, sources, tmp_path / "model")
    assert main(["train", str(file), f"--data={sources / 'rules-tokens'}", "--loop.num_steps=2"]) == 0
    assert load_model(tmp_path / "model").num_parameters() > 0
    other = train_bpe(["other words " * 9], 270)
    other.save(tmp_path / "other")
    assert (
        main(
            [
                "train",
                str(file),
                f"--data={sources / 'rules-tokens'}",
                f"--tokenizer={tmp_path / 'other'}",
                "--out=" + str(tmp_path / "no"),
            ]
        )
        == 1
    )
    assert "was written by another tokenizer" in capfd.readouterr().err


def test_a_data_set_alone_is_fed_as_before_whatever_its_files_are(toy, tmp_path):
    tokenizer = load_tokenizer(toy.tokenizer)
    lines = (toy.data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    for number, part in enumerate((lines[:3], lines[3:])):
        (tmp_path / "cut" / f"train-{number:05}.jsonl").write_text("".join(part), encoding="utf-8")
    loop = LoopConfig(num_steps=1, micro_batch_size=2)
    batches: list[Batch] = [
        open_supply(folder, tokenizer, 64, tmp_path / "work").loader(loop).next_batch()
        for folder in (toy.data, tmp_path / "cut")
    ]
    assert torch.equal(batches[0].input_ids, batches[1].input_ids)
    assert count_tokens(toy.data, tokenizer) == count_tokens(tmp_path / "cut", tokenizer)
    with pytest.raises(DataError, match="holds no train.jsonl and no shards of it"):
        open_supply(tmp_path, tokenizer, 64, tmp_path / "work")


def test_perplexity_of_documents_is_that_of_the_model(toy, sources, tmp_path):
    tokenizer, shards = load_tokenizer(toy.tokenizer), TokenShards(sources / "rules-tokens")
    found = document_perplexities(toy.model, shards, tokenizer)
    model = load_model(toy.model, dtype=torch.float32)
    starts, lengths = shards.starts(), shards.lengths()
    for i in (0, 17, 39):
        ids = torch.from_numpy(shards.read(int(starts[i]), int(lengths[i])))[None]
        with torch.inference_mode():
            expected = float((-token_log_probs(model, ids)).mean().exp())
        assert found[i] == pytest.approx(expected, rel=1e-4)
    assert found.shape == (40,) and np.isfinite(found).all()
    with pytest.raises(DataError, match="has another tokenizer than the run"):
        document_perplexities(toy.model, shards, train_bpe(["other words"], 270))


def test_a_curriculum_by_perplexity_of_a_trained_model_is_a_recipe_s_setting(toy, sources, tmp_path):
    more = f"  rows: documents\n  curriculum: {{kind: sorted}}\n  difficulty: {{by: perplexity, model: {toy.model}}}\n"
    _, config = read_training_recipe(recipe(toy, sources, tmp_path / "model", more), ["--loop.num_steps=2"])
    run_pretrain(config)
    assert load_model(tmp_path / "model").num_parameters() > 0


def test_the_recipe_of_a_mixture_runs_at_toy_size(toy, sources, tmp_path):
    values = read_recipe(Path(__file__).parents[2] / "recipes" / "pretrain" / "mixture.yaml")
    values["data"]["sources"] = [{"path": str(toy.data)}, {"path": str(sources / "rules-tokens")}]
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
    loop = {"num_steps": 2, "micro_batch_size": 2, "compile": False}
    assert values.pop("method") == "pretrain" and values.pop("minutes")
    changed = {"tokenizer": str(toy.tokenizer), "out": str(tmp_path / "out"), "max_seq_len": 64}
    run_pretrain(build(PretrainConfig, {**values, **changed, "shape": shape, "loop": loop}))
    kinds = {ancestor.kind for ancestor in lineage(tmp_path / "out")}
    assert {"model", "dataset", "documents", "tokens", "tokenizer"} <= kinds
