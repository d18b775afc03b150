"""Web archives: pages become documents, a damaged record is set aside by number and place, the next one is read."""

import gzip
import io

import pytest

from modelwright.data.entry import Failure, Limits
from modelwright.data.source import ReadConfig, iterate_documents

pytest.importorskip("trafilatura")

WORDS = "The harbour lies west of the old town, and the ferry leaves it twice a day in all seasons of the year."


def record(kind, body, name="r", media="application/http; msgtype=response", url="http://example.org/", length=None):
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:{name}>\r\nWARC-Target-URI: {url}\r\n"
        f"WARC-Date: 2026-01-02T03:04:05Z\r\nContent-Type: {media}\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body + b"\r\n\r\n"


def answer(body, media="text/html; charset=utf-8", status="200 OK", extra=""):
    return f"HTTP/1.1 {status}\r\nContent-Type: {media}\r\n{extra}\r\n".encode() + body


def page(words=WORDS):
    return f"<html><head><title>Page</title></head><body><article><p>{words}</p></article></body></html>".encode()


def read(path, **settings):
    found = list(iterate_documents(ReadConfig(str(path), **settings)))
    return [d for d in found if not isinstance(d, Failure)], [d for d in found if isinstance(d, Failure)]


RECORDS = [
    record("warcinfo", b"software: x\r\n", media="application/warc-fields"),
    record("request", b"GET / HTTP/1.1\r\n\r\n", media="application/http; msgtype=request"),
    record("response", answer(page()), "html"),
    record("response", answer(gzip.compress(page()), extra="Content-Encoding: gzip\r\n"), "packed"),
    record(
        "response",
        answer(b"5\r\n<p>a \r\n6;x=y\r\nchunk \r\n0\r\n\r\n", extra="Transfer-Encoding: chunked\r\n"),
        "chunks",
    ),
    record("response", answer("<p>caf\xe9 au lait</p>".encode("latin-1"), "text/html; charset=ISO-8859-1"), "latin"),
    record("response", answer(page(), status="404 Not Found"), "gone"),
    record("response", answer(b"var x", "text/javascript"), "script"),
    record("conversion", b"plain text of a page", "wet", media="text/plain"),
    record("resource", b"# A resource\n", "resource", media="text/markdown"),
]
NAMES = ["html", "packed", "chunks", "latin", "wet", "resource"]


@pytest.mark.parametrize("is_packed", [True, False], ids=["warc.gz", "warc"])
def test_pages_become_documents_with_their_address(tmp_path, is_packed):
    path = tmp_path / ("x.warc.gz" if is_packed else "x.warc")
    path.write_bytes(b"".join(map(gzip.compress, RECORDS)) if is_packed else b"".join(RECORDS))
    documents, failures = read(path)
    assert not failures
    assert [d.id for d in documents] == [f"{path.name}/urn:{name}" for name in NAMES]
    first = documents[0]
    assert WORDS in first.text and first.title == "Page" and first.source == "http://example.org/"
    assert first.metadata == {"url": "http://example.org/", "date": "2026-01-02T03:04:05Z"}
    assert documents[1].text == first.text and "a chunk" in documents[2].text
    assert "caf\xe9" in documents[3].text and documents[4].text == "plain text of a page"


@pytest.mark.parametrize("is_packed", [True, False], ids=["warc.gz", "warc"])
def test_a_damaged_record_is_set_aside_and_the_next_is_read(tmp_path, is_packed):
    pack = gzip.compress if is_packed else bytes
    good = [pack(record("resource", f"page {i}".encode(), f"r{i}", media="text/plain")) for i in range(4)]
    too_long = pack(record("resource", b"short", "long", media="text/plain", length=9))
    no_length = pack(
        record("resource", b"x", "none", media="text/plain").replace(b"Content-Length: 1", b"Content-Length: -1")
    )
    broken = bytearray(pack(record("resource", bytes(range(32, 127)) * 20, "broken", media="text/plain")))
    if is_packed:
        broken[40:60] = b"\xff" * 20
    else:
        broken[:4] = b"CRAW"
    path = tmp_path / ("x.warc.gz" if is_packed else "x.warc")
    path.write_bytes(good[0] + bytes(broken) + good[1] + too_long + good[2] + no_length + good[3])
    documents, failures = read(path)
    assert [d.text for d in documents] == [f"page {i}" for i in range(4)]
    places = [len(good[0]), len(good[0]) + len(broken) + len(good[1])]
    assert failures[0].position == f"record 2 at byte {places[0]}"
    assert f"at byte {places[1]}" in failures[1].position and "Content-Length" in failures[1].reason
    assert "has the Content-Length '-1'" in failures[2].reason and len(failures) == 3


@pytest.mark.parametrize("is_packed", [True, False], ids=["warc.gz", "warc"])
def test_a_truncated_archive_gives_what_stands_before_the_break(tmp_path, is_packed):
    pack = gzip.compress if is_packed else bytes
    path = tmp_path / ("x.warc.gz" if is_packed else "x.warc")
    path.write_bytes(b"".join(pack(item) for item in RECORDS)[:-45])
    documents, failures = read(path)
    assert [d.id.rpartition(":")[2] for d in documents] == NAMES[:-1]
    assert len(failures) == 1 and failures[0].position.startswith("record 10 at byte")


def test_bombs_in_a_member_and_in_a_body_are_set_aside(tmp_path):
    zeros = b"\0" * 3_000_000
    inner = answer(gzip.compress(zeros), extra="Content-Encoding: gzip\r\n")
    last = record("resource", b"last page", "last", media="text/plain")
    (tmp_path / "x.warc.gz").write_bytes(
        gzip.compress(record("resource", zeros, "outer", media="text/plain"))
        + gzip.compress(record("response", inner, "inner"))
        + gzip.compress(last)
    )
    documents, failures = read(tmp_path / "x.warc.gz", limits=Limits(free_bytes=100_000, ratio=50))
    assert [d.text for d in documents] == ["last page"]
    assert len(failures) == 2 and all("bomb" in failure.reason for failure in failures)
    documents, failures = read(tmp_path / "x.warc.gz", limits=Limits(file_bytes=10**6))
    assert [d.text for d in documents] == ["last page"] and "1.0 MB" in failures[0].reason


def test_pages_that_cannot_be_parsed_are_named_by_their_record(tmp_path):
    (tmp_path / "x.warc").write_bytes(
        record("response", answer(b"caf\xe9", "text/html; charset=utf-8"), "wrong")
        + record("response", answer(b"\x89PNG", "application/pdf"), "pdf")
        + record("resource", b"x" * 10, "good", media="text/plain")
    )
    documents, failures = read(tmp_path / "x.warc")
    assert [d.id for d in documents] == ["x.warc/urn:good"]
    assert "not valid UTF-8" in failures[0].reason and failures[1].path == "x.warc/urn:pdf"


@pytest.mark.peer
def test_another_writer_s_archives_are_read_alike(tmp_path):
    warcio = pytest.importorskip("warcio")
    from warcio.statusandheaders import StatusAndHeaders

    with open(tmp_path / "x.warc.gz", "wb") as handle:
        writer = warcio.warcwriter.WARCWriter(handle, gzip=True)
        for number in range(3):
            headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.0")
            payload = io.BytesIO(page(f"{WORDS} {number}"))
            writer.write_record(
                writer.create_warc_record(
                    f"http://example.org/{number}", "response", payload=payload, http_headers=headers
                )
            )
    documents, failures = read(tmp_path / "x.warc.gz")
    assert [d.source for d in documents] == [f"http://example.org/{n}" for n in range(3)] and not failures
    with open(tmp_path / "x.warc.gz", "rb") as handle:
        theirs = [r.rec_headers["WARC-Record-ID"].strip("<>") for r in warcio.ArchiveIterator(handle)]
    assert [d.id.partition("/")[2] for d in documents] == theirs
