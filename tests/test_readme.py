"""The table of results in the README is the one that the committed results give."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_table_of_results_is_current():
    command = [sys.executable, ROOT / "benchmarks" / "readme_table.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tables_of_the_docs_are_current():
    command = [sys.executable, ROOT / "benchmarks" / "rows_table.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout}Run: python benchmarks/rows_table.py"
