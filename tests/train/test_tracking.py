"""Tracking: every place gets every figure, a resumed run counts no step twice, and what is missing is said."""

import csv
import json
from pathlib import Path

import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.base.files import read_jsonl
from modelwright.data.load import Batch
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.train.loop import LoopConfig, train
from modelwright.train.objective import CausalLanguageModeling
from modelwright.train.speed import step_flops_per_token
from modelwright.train.tracking import Tracker, TrackingConfig

SHAPE = LlamaConfig(
    vocab_size=31, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, max_seq_len=8, tie_embeddings=True
)


class Counting:
    """Endless rows of one pattern."""

    def next_batch(self):
        ids = (torch.arange(9)[None] + torch.arange(2)[:, None]) % 31
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def state(self):
        return {}

    def load_state(self, state):
        pass


def follow(folder: Path, num_steps=4, sampler=None, given=None, **settings) -> Tracker:
    tracker = Tracker(folder, TrackingConfig(**settings), "toy", given or {"a": 1}, sampler)
    model = init_weights(Llama(SHAPE), 0)
    config = LoopConfig(num_steps=num_steps, compile=False, precision="fp32")
    train(model, CausalLanguageModeling(), Counting(), config, hooks=[tracker])
    tracker.close()
    return tracker


def test_our_own_files_hold_every_step(tmp_path: Path):
    follow(tmp_path, to=("files",), samples_every=2, sampler=lambda model: [f"training: {model.training}"])
    rows = list(read_jsonl(tmp_path / "steps.jsonl"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    wanted = {"loss", "gradient_norm", "learning_rate", "tokens_per_second", "mfu_fraction", "memory_bytes"}
    assert wanted <= set(rows[0]) and rows[-1]["seconds_left"] == 0
    with (tmp_path / "steps.csv").open() as handle:
        assert [float(row["loss"]) for row in csv.DictReader(handle)] == [row["loss"] for row in rows]
    samples = list(read_jsonl(tmp_path / "samples.jsonl"))
    assert samples == [{"step": step, "text": "training: False"} for step in (2, 4)]


def test_steps_that_are_done_again_count_once(tmp_path: Path):
    follow(tmp_path, num_steps=4, to=("files",), plots=False)
    follow(tmp_path, num_steps=2, to=("files",), plots=False)
    assert [row["step"] for row in read_jsonl(tmp_path / "steps.jsonl")] == [1, 2]


def test_the_plot_is_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib")
    follow(tmp_path, num_steps=24, to=("files",))
    assert (tmp_path / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "samples.png").exists()  # none were taken
    long = "costs $3 to $4, " * 90
    follow(tmp_path / "more", num_steps=24, to=("files",), samples_every=1, sampler=lambda model: ["", long])
    assert (tmp_path / "more" / "samples.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.peer
def test_tensorboard_reads_what_it_is_given(tmp_path: Path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = follow(tmp_path, to=("tensorboard",), plots=False)
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [e.step for e in read.Scalars("loss")] == [1, 2, 3, 4]
    assert [e.value for e in read.Scalars("loss")] == pytest.approx([row["loss"] for row in tracker.rows])


@pytest.mark.peer
@pytest.mark.slow
def test_weights_and_biases_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    follow(tmp_path, to=("wandb",), plots=False)
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.peer
@pytest.mark.slow
def test_mlflow_keeps_a_local_store(tmp_path: Path):
    mlflow = pytest.importorskip("mlflow")
    many = {f"section.{i}": i for i in range(150)}  # more than MLflow takes at once
    tracker = follow(tmp_path, to=None, plots=False, given=many, sampler=lambda model: ["a sample"], samples_every=4)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("modelwright")
    run = client.search_runs([experiment.experiment_id])[0]
    found = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in found] == [(row["step"], row["loss"]) for row in tracker.rows]
    assert len(found) == 4 and set(run.data.metrics) == set(tracker.rows[-1]) - {"step"}
    assert run.data.params == {name: str(value) for name, value in many.items()} and run.info.status == "FINISHED"
    assert [f.path for f in client.list_artifacts(run.info.run_id, "samples")] == ["samples/0000004.txt"]


def test_without_mlflow_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)  # an import of None fails
    Tracker(tmp_path, TrackingConfig(), "toy")
    assert "MLflow is not installed (pip install 'modelwright[mlflow]')" in capsys.readouterr().out


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match=r"tracking\.to is 'wandbb'.*Did you mean 'wandb'"):
        TrackingConfig(to=("wandbb",))
    with pytest.raises(ConfigError, match=r"every is 0"):
        TrackingConfig(every=0)


def test_frozen_matrices_cost_two_thirds():
    model = Llama(SHAPE)
    all_trained = step_flops_per_token(model, 0)
    matrices = all_trained / 6
    assert matrices == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    model.requires_grad_(False)
    assert step_flops_per_token(model, 0) == 4 * matrices
    assert json.loads(json.dumps(all_trained)) == all_trained
