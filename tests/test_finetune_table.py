"""The tables of docs/finetune.md are those of the committed results."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tables_are_current():
    command = [sys.executable, ROOT / "benchmarks" / "finetune_table.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
