"""The page of the classical models: its examples run, and its tables are those of the committed results."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_examples_run_as_they_stand(tmp_path: Path):
    page = (ROOT / "docs" / "classical.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    (tmp_path / "page.py").write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hello world, hello wo" in done.stdout
    assert "[[5, 4, 3]]" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} >= {"model.arpa", "recurrent", "vectors.txt", "network"}


def test_the_tables_are_current():
    command = [sys.executable, ROOT / "benchmarks" / "classical_table.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
