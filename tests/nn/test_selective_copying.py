"""Choosing by content needs steps that depend on the content: the study of benchmarks/selective_copying.py, smaller."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "selective_copying.py"
spec = importlib.util.spec_from_file_location("selective_copying", SCRIPT)
assert spec is not None and spec.loader is not None
copying = importlib.util.module_from_spec(spec)
sys.modules["selective_copying"] = copying
spec.loader.exec_module(copying)

SMALL = copying.Task(num_places=24, num_symbols=4, num_kinds=4, hidden_size=32, state_size=8, learning_rate=5e-3)


def test_rows_ask_for_the_symbols_in_their_order():
    rows, symbols = copying.make_rows(SMALL, 50, torch.Generator().manual_seed(0))
    assert (rows[:, 24:] == copying.MARKER).all()
    for row, wanted in zip(rows[:, :24], symbols, strict=True):
        assert row[row != copying.BLANK].tolist() == wanted.tolist()
    assert len({tuple((row != copying.BLANK).nonzero()[:, 0].tolist()) for row in rows[:, :24]}) > 40  # places differ


def test_scoring_rows_are_not_training_rows():
    training = copying.make_rows(SMALL, 512, torch.Generator().manual_seed(1_000_000))[0]
    scoring = copying.make_rows(SMALL, 512, torch.Generator().manual_seed(77))[0]
    assert not (scoring[:, None] == training).all(-1).any()


@pytest.mark.slow
def test_the_selective_model_copies_and_the_time_invariant_one_does_not():
    task = copying.replace(SMALL, num_steps=700)
    selective, fixed = (copying.score(copying.train(task, kind, seed=0), task)[0] for kind in (True, False))
    assert selective >= 0.98
    assert fixed <= 0.8


def test_the_page_shows_the_committed_result():
    result = SCRIPT.parent / "results" / "selective_copying.json"
    page = SCRIPT.parents[1] / "docs" / "state_space.md"
    shown = page.read_text(encoding="utf-8").partition(copying.START)[2].partition(copying.END)[0].strip()
    assert shown == copying.table(json.loads(result.read_text(encoding="utf-8")))
