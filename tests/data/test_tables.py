"""Tables: a row is a document; a bad one is set aside by its line, and no row can fill the memory."""

import gzip
import json
import os

import pytest

from modelwright.base.errors import DataError
from modelwright.data.entry import Failure, Limits
from modelwright.data.source import ReadConfig, iterate_documents


def read(path, **settings):
    found = list(iterate_documents(ReadConfig(str(path), **settings)))
    failures = [(item.path, item.position, item.reason) for item in found if isinstance(item, Failure)]
    return [item for item in found if not isinstance(item, Failure)], failures


def test_jsonl_rows_keep_their_fields(tmp_path):
    row = {"id": 7, "text": "hello", "title": "T", "source": "s", "metadata": {"a": 1}, "label": [1, None]}
    (tmp_path / "x.jsonl").write_text("\ufeff" + json.dumps(row) + '\r\n\n{"text": "no id"}')
    (first, second), failures = read(tmp_path / "x.jsonl")
    assert (first.id, first.text, first.title, first.source) == ("7", "hello", "T", "s") and not failures
    assert first.metadata == {"a": 1, "label": [1, None]}
    assert second.id == "x.jsonl#3" and second.source.endswith("x.jsonl:3")
    (first, _), _ = read(tmp_path / "x.jsonl", metadata_columns=())
    assert first.metadata == {"a": 1}


BAD_LINES = {
    2: (b'{"text": "cut', "not valid JSON"),
    3: (b"[1, 2]", "expected a JSON object, found list"),
    4: (b'{"text": 5}', "'text' is int; expected text"),
    5: (b'{"txt": "x"}', "has no 'text'; it has txt"),
    6: (b'{"text": "caf\xe9"}', "not valid UTF-8: byte 0xe9 at place 14"),
    7: (b'{"text": "raw \x00 byte"}', "not valid JSON"),
    8: (b"[" * 100_000, "nested too deep"),
    9: (b'{"text": "' + b"x" * 20_000 + b'"}', "a line may have 10.0 kB"),
    10: (b'{"text": null}', "'text' is null"),
    11: (b'{"text": " "}', "only white space"),
    12: (b'{"text": ' + b"9" * 5000 + b"}", "not valid JSON"),
}


def test_each_malformed_line_is_named_by_number_and_the_rest_is_read(tmp_path):
    lines = [b'{"text": "first"}', *(line for line, _ in BAD_LINES.values()), b'{"text": "last"}']
    lines[7] = b"[" * 9000  # within the length of a line here
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    documents, failures = read(tmp_path / "x.jsonl", limits=Limits(line_bytes=10_000))
    assert [d.text for d in documents] == ["first", "last"]
    assert [position for _, position, _ in failures] == [f"line {n}" for n in BAD_LINES]
    for (_, _, reason), (_, expected) in zip(failures, BAD_LINES.values(), strict=True):
        assert expected in reason
    with pytest.raises(DataError, match=r"x.jsonl, line 2: not valid JSON"):
        read(tmp_path / "x.jsonl", strict=True)


def test_what_no_json_reader_must_take_becomes_what_it_can(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "half \\ud800 pair", "a": NaN, "b": 1e999, "c": ["\\udfff"]}\n')
    (document,), _ = read(tmp_path / "x.jsonl")
    assert document.text == "half ? pair".replace("?", "\N{QUESTION MARK}") and document.metadata["a"] is None
    json.dumps({"m": document.metadata}, allow_nan=False).encode()


def test_a_single_line_of_any_length_is_passed_over_in_little_memory(tmp_path):
    resource = pytest.importorskip("resource")
    with open(tmp_path / "x.jsonl", "wb") as handle:
        handle.write(b'{"text": "first"}\n{"text": "')
        handle.seek(4 * 10**8)  # sparse: it takes no disk; 2 GB take 0.3 s once they are in the page cache, 5 s before
        handle.write(b'"}\n{"text": "last"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    documents, failures = read(tmp_path / "x.jsonl", limits=Limits(line_bytes=8 * 10**6))
    assert [d.text for d in documents] == ["first", "last"]
    assert failures == [("x.jsonl", "line 2", "has 400.0 MB; a line may have 8.0 MB")]
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 64 * 10**6


def test_a_missing_column_names_those_that_are_there(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"body": "hello", "n": 1}\n')
    (tmp_path / "y.csv").write_text("body,n\nhello,1\n")
    for name in ("x.jsonl", "y.csv"):
        with pytest.raises(
            DataError, match=r"no column 'text'; its columns: body, n. Name the right one with text_column"
        ):
            read(tmp_path / name)
    documents, failures = read(tmp_path, text_column="body")
    assert [d.text for d in documents] == ["hello", "hello"] and not failures
    _, failures = read(tmp_path)  # in a folder each file is set aside, the rest goes on
    assert [path for path, _, _ in failures] == ["x.jsonl", "y.csv"]
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(b'{"body": 1}\n'))
    with pytest.raises(DataError, match="no column 'text'"):
        read(tmp_path / "z.jsonl.gz")
    with pytest.raises(DataError, match="no column 'name'"):
        read(tmp_path / "y.csv", text_column="body", id_column="name")


def test_csv_with_quotes_other_marks_and_bad_rows(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbfid,text\r\n1,"two\nlines, ""quoted"""\r\n2,b,c\r\n\r\n3,caf\xe9\r\n4,d'
    )
    documents, failures = read(tmp_path / "a.csv")
    assert [(d.id, d.text) for d in documents] == [("1", 'two\nlines, "quoted"'), ("4", "d")]
    assert [(position, reason[:20]) for _, position, reason in failures] == [
        ("line 4", "has 3 fields; the fi"),
        ("line 6", "not valid UTF-8; sav"),
    ]
    (tmp_path / "a.csv").write_text("text;price\na, b;3\n")
    assert read(tmp_path / "a.csv")[0][0].metadata == {"price": "3"}
    (tmp_path / "a.tsv").write_text("text\tprice\na;b\t3\n")
    assert read(tmp_path / "a.tsv")[0][0].text == "a;b"
    (tmp_path / "a.csv").write_text("text|x\na,b,c,d|1\n")
    assert read(tmp_path / "a.csv", delimiter="|")[0][0].text == "a,b,c,d"


def test_a_quote_that_never_ends_and_a_line_too_long_are_bounded(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("text,n\nok,1\n" + "x" * 5000 + ",2\nlast,3\n")
    documents, failures = read(tmp_path / "a.csv", limits=Limits(line_bytes=1000))
    assert [d.text for d in documents] == ["ok", "last"] and failures[0][1:] == (
        "line 3",
        "has 5.0 kB; a line may have 1.0 kB",
    )
    (tmp_path / "a.csv").write_text('text,n\nok,1\n"open,2\n' + "more " * 5_000_000 + "\n" + "more " * 5_000_000)
    documents, failures = read(tmp_path / "a.csv")
    assert [d.text for d in documents] == ["ok"] and "field larger than field limit" in failures[0][2]


def test_parquet_and_arrow_rows_with_bad_ones_set_aside(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"id": ["a", None, "c"], "text": ["one", None, "three"], "blob": [b"xx", b"", None]})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    with pa.OSFile(str(tmp_path / "y.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("x.parquet", "y.arrow"):
        documents, failures = read(tmp_path / name)
        assert [(d.id, d.text) for d in documents] == [("a", "one"), ("c", "three")]
        assert documents[0].metadata == {"blob": "(2 bytes)"}
        assert failures == [(name, "row 2", "'text' is null; expected text")]
        with pytest.raises(DataError, match="columns: id, text, blob"):
            read(tmp_path / name, text_column="body")


def test_truncated_and_damaged_parquet_is_set_aside(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [os.urandom(200).hex() for _ in range(400)]
    parquet.write_table(pa.table({"text": texts}), tmp_path / "x.parquet", row_group_size=100, use_dictionary=False)
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[:-100])
    documents, failures = read(tmp_path)
    assert not documents and "damaged or truncated Parquet" in failures[0][2]
    place = len(whole) // 8  # within the first of four row groups
    (tmp_path / "x.parquet").write_bytes(whole[:20] + b"\xff" * (place - 20) + whole[place:])
    documents, failures = read(tmp_path)
    assert [d.text for d in documents][-300:] == texts[100:] and failures[0][1].startswith("row group 1")
    (tmp_path / "x.parquet").write_bytes(whole)
    assert [d.text for d in read(tmp_path)[0]] == texts


def test_a_truncated_compressed_table_gives_the_rows_before_the_break(tmp_path):
    rows = [json.dumps({"text": os.urandom(50).hex()}) for _ in range(5000)]
    data = gzip.compress("\n".join(rows).encode())
    (tmp_path / "x.jsonl.gz").write_bytes(data[: len(data) // 2])
    documents, failures = read(tmp_path / "x.jsonl.gz")
    assert 2000 < len(documents) < 3000 and len(failures) == 1 and "truncated" in failures[0][2]


def test_the_documents_of_an_artifact_are_read_without_its_list_of_failures(tmp_path):
    from modelwright.data.read import read_documents, write_documents

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("a")
    (tmp_path / "docs" / "b.txt").write_bytes(b"\xff")
    write_documents(read_documents(tmp_path / "docs"), tmp_path / "out")
    documents, failures = read(tmp_path / "out")
    assert [d.id for d in documents] == ["a.txt"] and not failures
