"""A process that is killed in the middle of a run of several: the other names it and ends, and the run can go on."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.train.parallel_work import train_toy

from modelwright.train.checkpoint import checkpoints
from modelwright.train.parallel import ParallelConfig

ROOT = Path(__file__).parents[2]
CODE = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import modelwright.train.loop as loop
from modelwright.base import distributed
from modelwright.train.parallel import ParallelConfig
from tests.train.parallel_work import train_toy

how, plain = sys.argv[3], loop.Run.do_step

def do_step(run):
    if run.step == 3 and distributed.rank() == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        raise ValueError("a row that only this rank saw")
    return plain(run)

loop.Run.do_step = do_step
with distributed.join():
    train_toy(ParallelConfig(shard=2, dead_after_seconds=4.0), Path(sys.argv[2]))
"""


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def start(rank, folder, how, port):
    env = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    arguments = [sys.executable, "-c", CODE, str(ROOT), str(folder), how]
    return subprocess.Popen(arguments, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("killed", "Rank 1 of 2 has died: no sign of life"),
        ("frozen", "Rank 1 of 2 has died: no sign of life"),
        ("failed", "Rank 1 of 2 has failed: ValueError: a row that only this rank saw"),
    ],
)
def test_the_others_name_the_dead_rank_and_end_and_the_run_goes_on(how, message, tmp_path):
    folder = tmp_path / "run"
    port = free_port()
    ranks = [start(rank, folder, how, port) for rank in (0, 1)]
    try:
        # Importing and meeting take their time; from the death on the bound is 1.5 x 4 s and the grace of 10 s.
        deadline = time.monotonic() + 120
        while not checkpoints(folder) and time.monotonic() < deadline:
            time.sleep(0.2)
        said = ranks[0].communicate(timeout=40)[1]
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert ranks[0].returncode != 0
    assert message in said
    assert "--resume" in said
    # Nothing half-written under the name of a checkpoint; what there is, one process goes on from.
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names == {path.name for path in checkpoints(folder)} and names
    weights, _, _ = train_toy(ParallelConfig(), folder)
    expected, _, _ = train_toy(ParallelConfig())
    assert max(float((weights[n] - expected[n]).abs().max()) for n in expected) < 2e-3
