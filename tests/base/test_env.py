"""Environment variables are declared in one place, and read nowhere else."""

import re
from pathlib import Path

import pytest

import modelwright
from modelwright.base import env

SOURCES = Path(modelwright.__file__).parent


def test_an_undeclared_variable_cannot_be_read():
    with pytest.raises(AssertionError, match="not declared"):
        env.read("MODELWRIGHT_NO_SUCH")


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MODELWRIGHT_EMBEDDER", "")
    assert env.read("MODELWRIGHT_EMBEDDER") is None


def test_the_data_folder_must_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("MODELWRIGHT_DATA", str(tmp_path))
    assert env.data_folder() == tmp_path
    monkeypatch.setenv("MODELWRIGHT_DATA", str(tmp_path / "none"))
    assert env.data_folder() is None


def test_every_variable_is_explained_and_every_read_is_declared():
    assert all(len(text) > 20 for text in env.VARIABLES.values())
    for file in SOURCES.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert set(re.findall(r"MODELWRIGHT_[A-Z_]+", text)) <= set(env.VARIABLES), file
