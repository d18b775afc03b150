"""Reaching beyond the trained length: the study of benchmarks/extrapolation.py, smaller."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "extrapolation.py"
spec = importlib.util.spec_from_file_location("extrapolation", SCRIPT)
assert spec is not None and spec.loader is not None
extrapolation = importlib.util.module_from_spec(spec)
sys.modules["extrapolation"] = extrapolation
spec.loader.exec_module(extrapolation)

RESULT = SCRIPT.parent / "results" / "extrapolation.json"
SMALL = extrapolation.Study(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    train_len=16,
    long_len=64,
    batch_tokens=512,
    num_steps=300,
    tuning_steps=60,
    learning_rate=5e-3,
    tuning_rate=3e-3,
)


def counting_text(words: int = 6000) -> str:
    """Words of one to four letters, each the next in a fixed round, so that what came a few letters ago decides."""
    generator = torch.Generator().manual_seed(0)
    names = ["abba", "cad", "deb", "e", "faced", "bead"]
    chosen = torch.randint(len(names), (words,), generator=generator)
    return " ".join(f"{names[i]} {names[i][::-1]}" for i in chosen.tolist())


def test_scores_are_of_the_same_characters_and_scalings_change_no_weights():
    ids, vocab_size = extrapolation.encode(counting_text(500))
    model = extrapolation.init_weights(extrapolation.CharModel(SMALL, vocab_size, "alibi"), 0)
    names = {name for name, _ in model.named_parameters()}
    assert not any("rope" in name or "learned" in name for name in names)
    flat = extrapolation.score(model, ids)
    assert flat["short"] == pytest.approx(flat["long"], rel=0.02)  # an untrained model does not care for the length
    rotary = extrapolation.CharModel(SMALL, vocab_size, "rope")
    before = {k: v.clone() for k, v in rotary.state_dict().items()}
    rotary.stretch(extrapolation.scalings(SMALL)["rope + YaRN"])
    assert before.keys() == rotary.state_dict().keys()
    assert all(torch.equal(v, rotary.state_dict()[k]) for k, v in before.items())


def test_figures_are_added_in_parts(tmp_path):
    path, base = tmp_path / "x.json", {"study": {"a": 1}}
    figures = {"short": 1.0, "long": 2.0, "beyond": 3.0, "ratio": 2.0, "beyond_ratio": 3.0}
    extrapolation.add({**base, "runs": {}}, path, 0, "rope", figures)
    extrapolation.add({**base, "runs": {}}, path, 1, "rope", {**figures, "ratio": 4.0})
    made = json.loads(path.read_text())
    assert made["summary"]["rope"]["ratio"] == 3.0 and made["summary"]["rope"]["seeds"] == 2
    extrapolation.add({"study": {"a": 2}, "runs": {}}, path, 0, "rope", figures)
    assert json.loads(path.read_text())["runs"].keys() == {"0"}  # another study does not mix with it


def test_alibi_reaches_beyond_and_learned_positions_do_not():
    found = {}
    for positions in ("alibi", "learned"):
        extrapolation.run_seed(SMALL, counting_text(), 0, positions, lambda name, x: found.__setitem__(name, x))
    assert found["alibi"]["short"] < 0.5 and found["learned"]["short"] < 0.5  # both learned the task: chance is 2.08
    assert found["alibi"]["ratio"] <= 1.1
    assert found["learned"]["ratio"] > 1.5


@pytest.mark.slow
def test_rotary_positions_fail_beyond_and_the_scaled_do_not_after_tuning():
    found = {}
    extrapolation.run_seed(SMALL, counting_text(), 0, "rope", lambda name, x: found.__setitem__(name, x))
    assert found["rope"]["ratio"] > 1.5
    assert found["rope + YaRN, tuned"]["ratio"] <= 1.1
    assert found["rope + PI, tuned"]["ratio"] < 1.5  # 60 steps are few for so small a model


def test_the_study_in_the_results_shows_what_the_page_says():
    if not RESULT.exists():
        pytest.skip("benchmarks/results/extrapolation.json is not there; run benchmarks/extrapolation.py")
    summary = json.loads(RESULT.read_text(encoding="utf-8"))["summary"]
    for name in ("alibi", "rope + PI, tuned", "rope + YaRN, tuned"):
        assert summary[name]["ratio"] <= 1.1, name
    for name in ("rope", "learned"):
        assert summary[name]["ratio"] > 1.5, name
