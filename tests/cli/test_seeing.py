"""Studies, searches, trackers and pictures from the command line, at toy size."""

import json
import sqlite3
from pathlib import Path

import pytest
import yaml
from tests.cli.test_verbs import done, pretrain_recipe, refused
from tests.conftest import Toy

from modelwright.base.artifact import verify
from modelwright.base.files import read_jsonl

Shown = pytest.CaptureFixture[str]
LADDER = [
    "--ladder.widths=16,32,48",
    "--ladder.num_layers=1",
    "--ladder.tokens=256,512,1024",
    "--ladder.held_out_width=64",
    "--ladder.held_out_tokens=1024",
    "--ladder.max_validation_rows=8",
    "--ladder.num_resamples=2",
]
PNG = b"\x89PNG"


def test_a_scaling_study_from_a_recipe(toy: Toy, tmp_path: Path, capsys: Shown):
    out = tmp_path / "study"
    recipe = pretrain_recipe(toy, tmp_path)
    shown = done(capsys, "train", "scaling", recipe, f"--out={out}", *LADDER)
    assert "the larger run: predicted" in shown and "intervals of 90 %" in shown
    report = json.loads((out / "scaling.json").read_text())
    assert len(report["rungs"]) == 10 and report["held_out"]["width"] == 64
    assert verify(out).kind == "report"
    assert "needs three of each" in refused(capsys, "train", "scaling", recipe, f"--out={out}2", "--ladder.tokens=1,2")
    assert "takes one recipe" in refused(capsys, "train", "scaling")


def test_a_killed_study_with_other_settings_says_which(toy: Toy, tmp_path: Path, capsys: Shown):
    work = tmp_path / "study.run"
    recipe = pretrain_recipe(toy, tmp_path)
    done(capsys, "train", "scaling", recipe, f"--out={tmp_path / 'first'}", *LADDER)
    work.mkdir()
    settings = json.loads((tmp_path / "first" / "manifest.json").read_text())["settings"]
    (work / "settings.json").write_text(json.dumps({**settings, "max_seq_len": 32}))
    assert "other settings of max_seq_len" in refused(
        capsys, "train", "scaling", recipe, f"--out={tmp_path / 'study'}", *LADDER
    )
    settings["loop"]["checkpoint"]["every"] = 7  # does not change what is measured
    (work / "settings.json").write_text(json.dumps(settings))
    done(capsys, "train", "scaling", recipe, f"--out={tmp_path / 'study'}", *LADDER)


def test_a_search_prints_the_best_settings(toy: Toy, tmp_path: Path, capsys: Shown):
    pytest.importorskip("optuna")
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"loop.optimizer.muon.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}}))
    arguments = ["tune", pretrain_recipe(toy, tmp_path), "--space", space, "--out", tmp_path / "search"]
    shown = done(capsys, *arguments, "--trials", "2")
    assert "best" in shown and "--loop.optimizer.muon.learning_rate=" in shown
    found = json.loads((tmp_path / "search" / "search.json").read_text())
    assert len(found["trials"]) == 2 and found["best"]["loss"] == min(t["loss"] for t in found["trials"])
    assert not list((tmp_path / "search").glob("trial-*"))
    done(capsys, *arguments, "--trials", "3")  # a search goes on
    assert len(json.loads((tmp_path / "search" / "search.json").read_text())["trials"]) == 3


def test_pictures_of_optimizers_activations_and_attention(toy: Toy, tmp_path: Path, capsys: Shown):
    pytest.importorskip("matplotlib")
    for name, arguments in {
        "optimizers": ["--surface", "beale", "--steps", "20"],
        "activations": [toy.model],
        "attention": [toy.model, "--text", "The dog sleeps.", "--layer", "1"],
    }.items():
        out = tmp_path / f"{name}.png"
        assert str(out) in done(capsys, "look", name, *arguments, "--out", out).replace("\n", "")
        assert out.read_bytes()[:4] == PNG
    assert "layer is 9" in refused(capsys, "look", "attention", toy.model, "--layer", "9")


def test_a_tracked_run_shows_its_batches_and_keeps_samples(toy: Toy, tmp_path: Path, capsys: Shown):
    arguments = ["--tracking.to=files", "--tracking.samples_every=2", "--tracking.show_batches=2"]
    shown = done(capsys, "train", pretrain_recipe(toy, tmp_path), *arguments)
    assert "  batch 1: " in shown and "  batch 2: " in shown and "batch 3" not in shown
    folder = tmp_path / "model-tracking"
    assert [row["step"] for row in read_jsonl(folder / "steps.jsonl")] == [1, 2, 3, 4]
    assert {row["step"] for row in read_jsonl(folder / "samples.jsonl")} == {2, 4}


@pytest.mark.peer
@pytest.mark.slow
def test_mlflow_is_the_default_where_it_is_installed(toy: Toy, tmp_path: Path, capsys: Shown):
    pytest.importorskip("mlflow")
    done(capsys, "train", pretrain_recipe(toy, tmp_path))
    with sqlite3.connect(tmp_path / "model-tracking" / "mlflow.db") as store:
        steps = store.execute("select step from metrics where key = 'loss' order by step").fetchall()
    assert [step for (step,) in steps] == [1, 2, 3, 4]


@pytest.mark.peer
@pytest.mark.slow
def test_weights_and_biases_stays_on_the_machine(toy: Toy, tmp_path: Path, capsys: Shown, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    done(capsys, "train", pretrain_recipe(toy, tmp_path), "--tracking.to=wandb")
    assert list((tmp_path / "model-tracking" / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.peer
def test_tensorboard_gets_its_events(toy: Toy, tmp_path: Path, capsys: Shown):
    pytest.importorskip("tensorboard")
    done(capsys, "train", pretrain_recipe(toy, tmp_path), "--tracking.to=tensorboard")
    assert list((tmp_path / "model-tracking" / "tensorboard").glob("events.*"))
