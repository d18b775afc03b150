"""Memory that really runs out: `mw train` under a limit of the system says what to change and what its plan was."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain" / "small.yaml"
SETTINGS = [
    "--minutes=none",
    "--max_seq_len=128",
    "--loop.num_steps=2",
    "--loop.compile=false",
    "--loop.precision=fp32",
]
SETTINGS += ["--shape.hidden_size=512", "--shape.num_layers=4", "--shape.num_heads=4", "--shape.intermediate_size=2048"]
SETTINGS += ["--tracking.to=files"]
# The process may grow by so many bytes of addresses: enough for the run's imports, its weights and its plan.
LIMITED = """
import resource, sys
from modelwright.cli.main import main
import modelwright.cli.train
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


def run_limited(toy, out: Path, rows: int) -> subprocess.CompletedProcess[str]:
    where = [f"--data={toy.data}", f"--tokenizer={toy.tokenizer}", f"--out={out}"]
    command = [sys.executable, "-c", LIMITED, str(700 << 20), "train", str(RECIPE), *where, *SETTINGS]
    return subprocess.run([*command, f"--loop.micro_batch_size={rows}"], capture_output=True, text=True, timeout=170)


@pytest.mark.skipif(sys.platform != "linux", reason="limits and sizes of a process are read as Linux gives them")
def test_a_step_that_does_not_fit_says_what_to_change_from_the_plan(toy, tmp_path: Path):
    done = run_limited(toy, tmp_path / "large", 512)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 1, said
    assert (
        "Out of memory in a training step" in said and "loop.micro_batch_size=256 with loop.grad_accum_steps=2" in said
    )
    planned = re.search(
        r"The plan of this run is ([\d.]+ \w+) of [\d.]+ \w+: weights .+, gradients .+, optimizer .+, activations "
        r"(.+), logits .+?\. With this machine to itself (\d+) rows at a time fit, (\d+) with loop.recompute",
        said,
    )
    assert planned is not None, said
    assert planned[1].endswith("GB") and int(planned[4]) >= int(planned[3]) > 0
    assert not (tmp_path / "large").exists()


@pytest.mark.slow
def test_the_same_limit_lets_the_advice_train(toy, tmp_path: Path):
    """The control: fewer rows fit, so it is the rows that the first run could not hold."""
    done = run_limited(toy, tmp_path / "small", 2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "small").is_dir()
