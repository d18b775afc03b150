"""The launchers themselves: torchrun and Ray train a recipe, and go on from its checkpoint when a worker is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.conftest import Toy

from modelwright.models.weights import load_model
from modelwright.train.checkpoint import checkpoints

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain" / "zero2.yaml"
NUM_STEPS = 120


def settings(toy: Toy, out: Path, num_steps: int) -> list[str]:
    return [
        f"--data={toy.data}",
        f"--tokenizer={toy.tokenizer}",
        f"--out={out}",
        "--max_seq_len=64",
        "--shape.hidden_size=32",
        "--shape.num_layers=2",
        "--shape.intermediate_size=48",
        f"--loop.num_steps={num_steps}",
        "--loop.micro_batch_size=4",
        "--loop.grad_accum_steps=2",
        "--loop.checkpoint.every=5",
        "--loop.precision=fp32",
        "--loop.device=cpu",
        "--tracking.to=files",
    ]


def torchrun(toy: Toy, out: Path, num_steps: int = NUM_STEPS) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    command += ["--standalone", "-m", "modelwright", "train", str(RECIPE)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [*command, *settings(toy, out, num_steps)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def workers_of(out: Path) -> list[int]:
    """Return the ids of the processes that train into a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if f"--out={out}" in words and "torch.distributed.run" not in words:
            found.append(int(entry.parent.name))
    return found


@pytest.mark.slow
def test_torchrun_trains_a_recipe_and_starts_again_when_a_worker_is_killed(toy: Toy, tmp_path: Path):
    whole = torchrun(toy, tmp_path / "whole")
    said = whole.communicate(timeout=120)[0]
    assert whole.returncode == 0, said[-2000:]
    harmed, killed = torchrun(toy, tmp_path / "harmed"), []
    try:
        deadline = time.monotonic() + 100
        while harmed.poll() is None and time.monotonic() < deadline:
            if not killed and checkpoints(tmp_path / "harmed.run"):
                killed = workers_of(tmp_path / "harmed")[:1]
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.02)
        said = harmed.communicate(timeout=30)[0]
    finally:
        for process in workers_of(tmp_path / "harmed"):
            os.kill(process, signal.SIGKILL)
        harmed.kill()
    assert killed and harmed.returncode == 0, said[-3000:]
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("harmed", "whole"))
    assert all(bool((found[name] == expected[name]).all()) for name in expected), "the same layout: bit for bit"
    assert len(json.loads((tmp_path / "harmed" / "training.json").read_text())["losses"]) == NUM_STEPS


@pytest.mark.slow
@pytest.mark.peer
def test_ray_trains_the_same_recipe_from_the_command_line(toy: Toy, tmp_path: Path):
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "modelwright", "train", str(RECIPE), "--engine", "ray", "--workers", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *settings(toy, tmp_path / "model", 20)], env=env, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 workers on Ray" in done.stdout
    assert load_model(tmp_path / "model").num_parameters() > 0
