"""Artifacts know what they are, what they were made from, and whether that still stands."""

import shutil
from pathlib import Path

import pytest

from modelwright import __version__
from modelwright.base.artifact import MANIFEST, lineage, new_artifact, read_manifest, verify
from modelwright.base.errors import CheckpointError, DataError


def make(path: Path, content: str, parents: tuple[Path, ...] = (), kind: str = "dataset") -> Path:
    with new_artifact(path, kind, settings={"content": content}, parents=parents, seed=7) as (work, measured):
        (work / "data.txt").write_text(content)
        measured["length"] = len(content)
    return path


def test_a_manifest_says_what_was_made_how_and_from_what(tmp_path: Path):
    documents = make(tmp_path / "documents", "abc", kind="documents")
    manifest = read_manifest(make(tmp_path / "data", "de", (documents,)))
    assert (manifest.kind, manifest.seed, manifest.version) == ("dataset", 7, __version__)
    assert manifest.settings == {"content": "de"}
    assert manifest.measured == {"length": 2}
    assert manifest.created and manifest.machine
    (parent,) = manifest.parents
    assert (parent.path, parent.kind, parent.hash) == ("../documents", "documents", read_manifest(documents).hash)


def test_equal_content_gives_an_equal_hash_wherever_it_stands(tmp_path: Path):
    first, second = make(tmp_path / "a", "x"), make(tmp_path / "deep" / "b", "x")
    assert read_manifest(first).hash == read_manifest(second).hash


def test_verify_accepts_what_was_sealed_and_refuses_any_change(tmp_path: Path):
    path = make(tmp_path / "a", "x")
    assert verify(path).kind == "dataset"
    (path / "data.txt").write_text("y")
    with pytest.raises(CheckpointError, match=r"a has changed since it was made"):
        verify(path)
    (path / "data.txt").write_text("x")
    (path / "more.txt").write_text("")
    with pytest.raises(CheckpointError, match="has changed"):
        verify(path)


def test_a_failed_making_keeps_the_old_artifact(tmp_path: Path):
    path = make(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), new_artifact(path, "dataset") as (work, _):
        (work / "data.txt").write_text("new")
        raise RuntimeError
    assert (path / "data.txt").read_text() == "old"
    assert verify(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_parent_that_is_no_artifact_is_refused_and_nothing_is_made(tmp_path: Path):
    (tmp_path / "plain").mkdir()
    with pytest.raises(DataError, match=r"plain is not an artifact"):
        make(tmp_path / "child", "x", (tmp_path / "plain",))
    assert not (tmp_path / "child").exists()


def test_a_foreign_or_damaged_manifest_is_named(tmp_path: Path):
    path = make(tmp_path / "a", "x")
    (path / MANIFEST).write_text('{"name": "an npm package"}')
    with pytest.raises(DataError, match=r"manifest\.json is not a manifest"):
        read_manifest(path)
    (path / MANIFEST).write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_manifest(path)


def test_lineage_walks_back_to_the_documents_and_names_each_state(tmp_path: Path):
    documents = make(tmp_path / "documents", "d", kind="documents")
    data = make(tmp_path / "data", "x", (documents,))
    tokenizer = make(tmp_path / "tokenizer", "t", (data,), "tokenizer")
    model = make(tmp_path / "model", "m", (data, tokenizer), "model")
    found = [(a.kind, a.depth, a.state) for a in lineage(model)]
    assert found == [
        ("model", 0, "same"),
        ("dataset", 1, "same"),
        ("documents", 2, "same"),
        ("tokenizer", 1, "same"),
        ("dataset", 2, "same"),
        ("documents", 3, "same"),
    ]
    make(data, "other", (documents,))
    assert [(a.kind, a.state) for a in lineage(model)][1] == ("dataset", "changed")
    shutil.rmtree(tokenizer)
    states = {a.kind: a.state for a in lineage(model)}
    assert (states["tokenizer"], states["documents"]) == ("missing", "same")


def test_a_tree_that_is_moved_as_a_whole_keeps_its_lineage(tmp_path: Path):
    data = make(tmp_path / "old" / "data", "x")
    make(tmp_path / "old" / "model", "m", (data,), "model")
    (tmp_path / "old").rename(tmp_path / "new")
    assert [a.state for a in lineage(tmp_path / "new" / "model")] == ["same", "same"]
