"""Training data written by a model, from the command line. The toy model talks nonsense, and the rules say so."""

import json

from tests.conftest import Toy

from modelwright.cli.main import main


def test_a_model_is_asked_within_its_budget_and_the_run_goes_on(toy: Toy, tmp_path, capfd):
    seed = {"instruction": "Name three trees.", "input": "", "output": "Oak, ash, elm"}
    (tmp_path / "seeds.jsonl").write_text(json.dumps(seed))
    out = tmp_path / "tasks"
    command = ["synthesize", "self-instruct", "--model", str(toy.model), "--seeds", str(tmp_path / "seeds.jsonl")]
    command += ["--out", str(out), "--num=3", "--answer_tokens=8"]
    assert main([*command, "--max_requests=2"]) == 0
    assert "2 requests (0 from the journal)" in capfd.readouterr().out
    assert main([*command, "--max_requests=3"]) == 0
    assert "3 requests (2 from the journal)" in capfd.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["ended"] == "budget" and report["refused"] >= 1


def test_what_is_missing_is_said(toy: Toy, tmp_path, capfd):
    command = ["synthesize", "--model", str(toy.model), "--out", str(tmp_path / "o")]
    for method, message in (
        ("evolv", "known: self-instruct"),
        ("evolve", "at least 1 is needed"),
        ("questions", "no document"),
        ("talks", "no topic"),
    ):
        assert main([*command, method]) == 1
        assert message in capfd.readouterr().err
