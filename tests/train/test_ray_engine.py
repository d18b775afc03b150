"""A run on two workers of Ray, of which one is killed, ends with the model."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from modelwright.models.weights import load_model
from modelwright.optim.build import OptimizerConfig
from modelwright.train.checkpoint import CheckpointConfig, checkpoints
from modelwright.train.loop import LoopConfig
from modelwright.train.parallel import ParallelConfig
from modelwright.train.pretrain import PretrainConfig, ShapeConfig
from modelwright.train.ray_engine import train_on_ray


@pytest.mark.slow
@pytest.mark.peer
def test_a_run_survives_the_death_of_a_worker(toy, tmp_path):
    pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    config = PretrainConfig(
        data=toy.data,
        tokenizer=toy.tokenizer,
        out=tmp_path / "model",
        max_seq_len=64,
        shape=ShapeConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48),
        loop=LoopConfig(
            num_steps=60,
            micro_batch_size=4,
            grad_accum_steps=2,
            device="cpu",
            precision="fp32",
            optimizer=OptimizerConfig(name="adamw"),
            checkpoint=CheckpointConfig(every=2),
            parallel=ParallelConfig(shard=2, dead_after_seconds=5.0),
        ),
    )
    killed: list[int] = []

    def kill_one():
        work: Path = tmp_path / "model.run"
        while not (work.is_dir() and checkpoints(work)):
            time.sleep(0.05)
        for process in psutil.process_iter(["cmdline"]):
            if "RayTrainWorker" in " ".join(process.info["cmdline"] or []):
                killed.append(process.pid)
                process.kill()
                return

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    train_on_ray("pretrain", replace(config), 2)
    thread.join(5)
    assert len(killed) == 1
    assert load_model(tmp_path / "model").num_parameters() > 0
