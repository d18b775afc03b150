"""The joined figures on data are those of the committed results; the front runs the scripts that it names."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

FRONT = Path(__file__).parents[1] / "benchmarks" / "data.py"
RESULTS = FRONT.parent / "results"


def front(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, FRONT, *arguments], capture_output=True, text=True, check=False)


def test_joined_rows_are_those_of_the_results_that_are_named():
    spec = importlib.util.spec_from_file_location("data_figures", FRONT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kept, now = json.loads((RESULTS / "data.json").read_text(encoding="utf-8")), module.join(RESULTS)

    def of(joined: dict, key: str, script: str) -> list:
        return [row for row in joined[key] if row["script"] == script]

    # A script that was run anew since then is joined by the next --join.
    same = [script for script in module.SCRIPTS if of(kept, "parts", script) == of(now, "parts", script)]
    assert same and all(of(kept, "rows", script) == of(now, "rows", script) for script in same)


def test_every_row_says_what_was_measured_beside_what_and_by_which_script():
    joined = json.loads((RESULTS / "data.json").read_text(encoding="utf-8"))
    scripts = {part["script"] for part in joined["parts"]}
    assert joined["rows"] and {row["script"] for row in joined["rows"]} == scripts
    assert not scripts & set(joined["not_measured"])
    for row in joined["rows"]:
        assert list(row) == ["name", "ours", "rival", "rival_name", "ratio", "unit", "runs", "script"]
    assert sum(row["rival_name"] == "theory" for row in joined["rows"]) == 0  # curves are one row each


def test_scripts_are_listed_and_wrong_names_refused():
    listed = front("--list").stdout.split("\n")
    assert all((FRONT.parent / f"{line.split()[0]}.py").is_file() for line in listed if line)
    assert len([line for line in listed if line]) == 8
    wrong = front("tokenizers")
    assert wrong.returncode == 2 and "known: tokenizer, tokenizer_labs" in wrong.stderr


def test_what_stands_behind_two_dashes_goes_to_the_script(tmp_path):
    done = front("curriculum", "--out", str(tmp_path / "out"), "--", "--help")
    assert done.returncode == 0 and "== curriculum" in done.stdout and "--kinds" in done.stdout
