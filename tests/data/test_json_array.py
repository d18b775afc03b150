"""An array of objects is read value by value, wherever it lies; damage is named by its place and ends it."""

import gzip
import json
import tracemalloc
import zipfile

import pytest

from modelwright.base.errors import DataError
from modelwright.data.entry import Failure, Limits
from modelwright.data.source import ReadConfig, iterate_documents

ROWS = [{"id": i, "text": f"text {i}", "level": i} for i in range(5)]


def read(path, **settings):
    found = list(iterate_documents(ReadConfig(str(path), **settings)))
    failures = [(item.position, item.reason) for item in found if isinstance(item, Failure)]
    return [item for item in found if not isinstance(item, Failure)], failures


@pytest.mark.parametrize("indent", [None, 2])
def test_each_object_of_an_array_is_a_document(tmp_path, indent):
    (tmp_path / "x.json").write_text(" \n" + json.dumps(ROWS, indent=indent), encoding="utf-8")
    documents, failures = read(tmp_path / "x.json")
    assert [(d.id, d.text, d.metadata) for d in documents] == [(str(i), f"text {i}", {"level": i}) for i in range(5)]
    assert not failures
    assert [d.text for d in read(tmp_path)[0]] == [f"text {i}" for i in range(5)]


def test_arrays_lie_in_archives_too_and_lines_may_end_in_json(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.json", json.dumps(ROWS))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(ROWS[:2]).encode()))
    (tmp_path / "c.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    documents, failures = read(tmp_path)
    assert len(documents) == 10 and not failures


def test_what_cannot_be_read_is_named_by_item_and_line(tmp_path):
    (tmp_path / "x.json").write_text('[{"text": "a"},\n 7,\n {"txt": "b"},\n {"text": "c"}]')
    documents, failures = read(tmp_path / "x.json")
    assert [d.text for d in documents] == ["a", "c"]
    assert failures[0] == ("item 2 (line 2)", "expected a JSON object, found int")
    assert failures[1][0] == "item 3 (line 3)" and "has no 'text'" in failures[1][1]
    with pytest.raises(DataError, match=r"item 2 \(line 2\)"):
        read(tmp_path / "x.json", strict=True)


@pytest.mark.parametrize(
    ("content", "num", "why"),
    [
        (b'[{"text": "a"}, {"text": "b', 1, "not valid JSON"),
        (b'[{"text": "a"},', 1, "the array does not end"),
        (b'[{"text": "a"}, {"text" "b"}]', 1, "the rest of the array is not read"),
        (b'[{"text": "caf\xe9"}, {"text": "b"}]', 1, "not valid UTF-8"),
        (b"[" * 100_000, 0, "nested too deeply"),
        (b'{"data": [{"text": "a"}]}', 0, "no column 'text'"),
        (b"[]", 0, ""),
        (b'[{"text": "a\\u0000"}]', 1, ""),
    ],
)
def test_damage_is_said(tmp_path, content, num, why):
    (tmp_path / "x.json").write_bytes(content)
    if "column" in why:
        with pytest.raises(DataError, match=why):
            read(tmp_path / "x.json")
        return
    documents, failures = read(tmp_path / "x.json")
    assert len(documents) == num and (why in failures[-1][1] if why else not failures)


def test_an_endless_value_is_bounded_and_a_long_array_takes_the_memory_of_one_value(tmp_path):
    (tmp_path / "x.json").write_text('[{"text": "a"}, {"text": "' + "x" * 3_000_000 + '"}]')
    documents, failures = read(tmp_path / "x.json", limits=Limits(line_bytes=1_000_000))
    assert len(documents) == 1 and "longer than 1,000,000 characters" in failures[0][1]
    with open(tmp_path / "y.json", "w") as handle:
        handle.write("[" + ",".join(json.dumps({"text": "word " * 2000}) for _ in range(2000)) + "]")  # 20 MB
    tracemalloc.start()
    count = sum(1 for _ in iterate_documents(ReadConfig(str(tmp_path / "y.json"))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000 and peak < 12_000_000


def test_files_about_a_data_set_are_no_data(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text(json.dumps(ROWS))
    (tmp_path / "data" / "dataset_info.json").write_text('{"description": "text"}')
    documents, failures = read("data", kind="dataset", datasets=tmp_path)
    assert len(documents) == 5 and not failures
