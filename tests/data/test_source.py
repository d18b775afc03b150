"""One stream for all sources: order, strictness, little memory, and the hostile files that a folder may hold."""

import gzip
import io
import itertools
import os
import time
import tracemalloc
import zipfile
from collections import Counter

import pytest
from tests.data.test_read import make_pdf

from modelwright.base.errors import ConfigError, DataError
from modelwright.base.registry import lookup
from modelwright.data import ARCHIVES, TABLES
from modelwright.data.entry import Failure, Limits
from modelwright.data.read import read_documents
from modelwright.data.source import ReadConfig, iterate_documents

pytest.importorskip("pypdfium2")
pytest.importorskip("trafilatura")


def test_every_source_in_one_folder_comes_in_the_order_of_names(tmp_path):
    (tmp_path / "a-b").mkdir()
    (tmp_path / "a-b" / "x.txt").write_text("one")
    (tmp_path / "a.csv").write_text("text\ntwo\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.md").write_text("three")
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("rows.jsonl", '{"text": "four"}\nbad\n')
        archive.writestr("rows.csv", "no\ntext\n")
        archive.writestr("code.py", "x = 1")
    (tmp_path / "b.zip").write_bytes(held.getvalue())
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "five"}'))
    others = Counter()
    found = list(iterate_documents(tmp_path, others))
    assert [(item.path, item.position) if isinstance(item, Failure) else item.text for item in found] == [
        "one",
        "two",
        "three",
        "four",
        ("b.zip/rows.jsonl", "line 2"),
        ("b.zip/rows.csv", ""),
        "five",
    ]
    assert others == {".py": 1}
    ids = [item.id for item in found if not isinstance(item, Failure)]
    assert ids == ["a-b/x.txt", "a.csv#2", "a/x.md", "b.zip/rows.jsonl#1", "c.jsonl.gz#1"]
    assert found == list(iterate_documents(tmp_path))
    with pytest.raises(DataError, match=r"b.zip/rows.jsonl, line 2: not valid JSON(.|\n)*without strict"):
        list(iterate_documents(ReadConfig(str(tmp_path), strict=True)))


def test_a_kind_goes_before_the_suffix(tmp_path):
    (tmp_path / "rows.data").write_text('{"body": "row"}\n')
    with pytest.raises(DataError, match="is a .data; expected one of"):
        list(iterate_documents(tmp_path / "rows.data"))
    (row,) = iterate_documents(ReadConfig(str(tmp_path / "rows.data"), kind="jsonl", text_column="body"))
    assert row.text == "row"


def test_a_long_file_is_read_in_little_memory(tmp_path):
    with gzip.open(tmp_path / "x.jsonl.gz", "wb", compresslevel=1) as handle:
        for number in range(2000):
            handle.write(b'{"id": "%d", "text": "%s"}\n' % (number, os.urandom(5000).hex().encode()))
    tracemalloc.start()
    count = sum(len(document.text) for document in iterate_documents(tmp_path / "x.jsonl.gz"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000 * 10_000 and peak < 8 * 10**6
    first = list(itertools.islice(iterate_documents(tmp_path / "x.jsonl.gz"), 3))
    assert [document.id for document in first] == ["0", "1", "2"]


def test_two_documents_of_one_id_are_said(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"id": "a", "text": "one"}\n{"id": "a", "text": "two"}\n')
    result = read_documents(tmp_path)
    assert [d.text for d in result.documents] == ["one"]
    assert "second document of that id" in result.failures[0].reason and result.failures[0].position.endswith(":2")


def looping_pdf(kind):
    """Structures that lead back to themselves: the tree of pages, a form within itself, the outline, the parent."""
    objects = {
        1: "<< /Type /Catalog /Pages 2 0 R /Outlines 7 0 R >>",
        2: "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        3: "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 99 99] /Contents 4 0 R"
        " /Resources << /XObject << /F 5 0 R >> >> >>",
        4: "<< /Length 5 >>\nstream\n/F Do\nendstream",
        5: "<< /Type /XObject /Subtype /Form /BBox [0 0 9 9] /Resources << /XObject << /F 5 0 R >> >> /Length 5 >>\n"
        "stream\n/F Do\nendstream",
        7: "<< /Type /Outlines /First 7 0 R /Next 7 0 R /Count 9 >>",
    }
    if kind == "kids":
        objects[2] = "<< /Type /Pages /Kids [2 0 R 2 0 R 2 0 R] /Count 100000 /Parent 2 0 R >>"
    if kind == "length":
        objects[4] = "<< /Length 4 0 R >>\nstream\n/F Do\nendstream"
    if kind == "contents":
        objects[3] = "<< /Type /Page /Parent 3 0 R /MediaBox [0 0 1e9 1e9] /Contents [3 0 R 4 0 R] >>"
    body, offsets = "%PDF-1.7\n", {}
    for number, content in objects.items():
        offsets[number] = len(body)
        body += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{offsets.get(n, 0):010d} 00000 {'n' if n in offsets else 'f'} \n" for n in range(8))
    previous = f" /Prev {len(body)}" if kind == "table" else ""
    trailer = f"trailer << /Root 1 0 R /Size 8{previous} >>\nstartxref\n{len(body)}\n%%EOF\n"
    return (body + f"xref\n0 8\n{table}{trailer}").encode()


def test_hostile_files_cost_a_failure_each_and_little_time(tmp_path):
    for kind in ("form", "kids", "length", "contents", "table"):
        (tmp_path / f"{kind}.pdf").write_bytes(looping_pdf(kind))
    (tmp_path / "locked.pdf").write_bytes(make_pdf(["Hello"], encrypted=True))
    (tmp_path / "deep.html").write_bytes(b"<div>" * 100_000 + b"deep" + b"</div>" * 100_000)
    (tmp_path / "quoted.html").write_bytes(b"<html><body>" + b"<blockquote><p>x" * 30_000)
    (tmp_path / "mixed.txt").write_bytes("caf\u00e9 ".encode() + "caf\u00e9".encode("latin-1"))
    (tmp_path / "nul.txt").write_bytes(b"a\0b\0c\0" * 100)
    (tmp_path / "zz.txt").write_text("the last file is read")
    start = time.monotonic()
    found = list(iterate_documents(ReadConfig(str(tmp_path), limits=Limits(parse_seconds=10.0))))
    assert time.monotonic() - start < 30
    failures = {item.path: item.reason for item in found if isinstance(item, Failure)}
    assert found[-1].text == "the last file is read"
    assert set(failures) >= {f"{kind}.pdf" for kind in ("form", "kids", "length", "contents", "table")}
    assert "encrypted PDF" in failures["locked.pdf"] and "offset 9" in failures["mixed.txt"]
    assert "deep.html" in failures and "NUL" in failures["nul.txt"]


def test_every_reader_in_the_tables_is_there():
    for table in (TABLES, ARCHIVES):
        for suffix in table:
            assert callable(lookup(table, suffix, "format"))
    with pytest.raises(ConfigError):
        lookup(TABLES, ".xls", "format")
