"""A result says how to repeat it."""

import json
import platform
from pathlib import Path

from modelwright.base.measured import circumstances, write_result


def test_machine_versions_commit_and_command_stand_beside_the_figures(tmp_path):
    write_result(tmp_path / "result.json", {"rows": [1, 2]}, ("torch", "no-such-package"))
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["rows"] == [1, 2]
    assert found["versions"]["python"] == platform.python_version() and "torch" in found["versions"]
    assert "no-such-package" not in found["versions"]
    assert found["machine"]["num_cores"] >= 1 and found["command"].startswith("python")
    assert set(circumstances()) == {"machine", "versions", "commit", "command"}


def test_the_command_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELWRIGHT_DATA", str(tmp_path))
    here = str(Path.cwd() / "benchmarks" / "x.py")
    monkeypatch.setattr("sys.argv", [here, "--data", f"{tmp_path}/text", "--json=/somewhere/else/out.json", "--n=3"])
    expected = "python benchmarks/x.py --data $MODELWRIGHT_DATA/text --json=out.json --n=3"
    assert circumstances()["command"] == expected
