"""Data sets by name: a local copy is found without a network, splits and subsets as the hub finds them."""

import json
from pathlib import Path

import pytest

from modelwright.base.errors import DataError
from modelwright.data.entry import Failure
from modelwright.data.hub_dataset import find_copy, find_dataset
from modelwright.data.source import ReadConfig, iterate_documents


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def row(text):
    return json.dumps({"text": text}) + "\n"


PLAIN = {
    "data/train-00000-of-00002.jsonl": row("one"),
    "data/train-00001-of-00002.jsonl": row("two"),
    "data/test-00000-of-00001.jsonl": row("three"),
    "data/valid.csv": "text\nfour\n",
    "script.py": "raise SystemExit",
    ".cache/train.jsonl": row("hidden"),
}


@pytest.mark.parametrize(
    "place", ["me/tales", "me--tales", "tales", "datasets--me--tales/snapshots/abc"], ids=lambda place: place
)
def test_a_name_finds_its_local_copy_in_each_layout(tmp_path, monkeypatch, place):
    write(tmp_path / place, PLAIN)
    monkeypatch.setenv("MODELWRIGHT_DATASETS", str(tmp_path))
    read = list(iterate_documents(ReadConfig("me/tales", kind="dataset")))
    assert [d.text for d in read] == ["one", "two"]
    assert read[0].id == "data/train-00000-of-00002.jsonl#1"
    for split, text in {"test": "three", "validation": "four"}.items():
        config = ReadConfig("me/tales", kind="dataset", split=split, datasets=tmp_path)
        assert [d.text for d in iterate_documents(config)] == [text]
    with pytest.raises(DataError, match=r"no split 'dev'; it has: test, train, validation"):
        find_dataset("me/tales", "dev")


def test_the_newest_snapshot_of_the_hub_s_cache_is_the_one_it_names(tmp_path):
    root = tmp_path / "datasets--me--tales"
    write(root, {"snapshots/aaa/x.jsonl": row("old"), "snapshots/bbb/x.jsonl": row("new"), "refs/main": "aaa"})
    assert find_copy("me/tales", tmp_path) == root / "snapshots" / "aaa"


def test_the_configs_of_the_readme_decide(tmp_path):
    readme = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: "a/*.jsonl"
  - {split: test, path: [b.jsonl, "c/**/*.jsonl"]}
- config_name: large
  default: true
  data_files: "d*.jsonl"
---
# Tales
"""
    files = {
        "a/1.jsonl": row("a1"),
        "a/2.jsonl": row("a2"),
        "b.jsonl": row("b"),
        "c/x/y.jsonl": row("c"),
        "d.jsonl": row("d"),
    }
    write(tmp_path / "tales", {**files, "README.md": readme})
    folder = str(tmp_path / "tales")
    names = lambda *args: [name for _, name in find_dataset(folder, *args)]  # noqa: E731
    assert names("train") == ["d.jsonl"] and names("train", "small") == ["a/1.jsonl", "a/2.jsonl"]
    assert names("test", "small") == ["b.jsonl", "c/x/y.jsonl"]
    with pytest.raises(DataError, match="no subset 'huge'; it has: small, large"):
        names("train", "huge")


def test_a_folder_of_subsets_and_files_without_a_split(tmp_path):
    write(tmp_path, {"en/rows.jsonl": row("hello"), "de/rows.jsonl": row("hallo")})
    assert [name for _, name in find_dataset(str(tmp_path), "train", "de")] == ["de/rows.jsonl"]
    assert len(find_dataset(str(tmp_path))) == 2
    with pytest.raises(DataError, match="no subset 'fr'; its folders: de, en"):
        find_dataset(str(tmp_path), "train", "fr")


def test_a_file_set_aside_does_not_stop_the_others(tmp_path):
    pytest.importorskip("pyarrow")
    write(tmp_path, {"train-0.parquet": "cut", "train-1.jsonl": row("good")})
    first, second = iterate_documents(ReadConfig(str(tmp_path), kind="dataset"))
    assert isinstance(first, Failure) and first.path == "train-0.parquet" and second.text == "good"


def test_what_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELWRIGHT_DATASETS", str(tmp_path))
    monkeypatch.setattr(pytest.importorskip("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'me/none' has no local copy in (.|\n)*Put a copy there as me/none"):
        find_dataset("me/none")
    for name in ("../up", "a/b/c", "/etc"):
        if not Path(name).is_dir():
            with pytest.raises(DataError, match="not the name of a data set"):
                find_dataset(name)
    (tmp_path / "me" / "empty").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no data"):
        find_dataset("me/empty")
    with pytest.raises(DataError, match="does not exist"):
        find_copy("me/x", tmp_path / "nowhere")
