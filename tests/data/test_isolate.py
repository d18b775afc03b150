"""Parsing apart: a file that hangs, crashes or eats memory costs its parser process, and the next file is read."""

import time

import pytest

from modelwright.data import PARSERS, isolate
from modelwright.data.entry import Limits, Unreadable
from modelwright.data.isolate import parse_apart
from modelwright.data.ocr import OcrConfig
from modelwright.data.parse import Parsed

pytest.importorskip("pypdfium2")

HANGS, CRASHES, EATS, GOES_ON, RAISES = b"hang", b"crash", b"eat", b"go on", b"raise"


@pytest.fixture
def bad_parser(tmp_path, monkeypatch):
    """A parser that does what the file says, as a crafted PDF would make PDFium do."""
    (tmp_path / "crafted_parser.py").write_text(
        '''
import ctypes, time
from modelwright.data.parse import Parsed

def parse(data, ocr, on_page):
    """Do what the file says."""
    if data == b"hang":
        time.sleep(60)
    if data == b"crash":
        ctypes.string_at(0)
    if data == b"eat":
        return Parsed("x" * 10**10)
    if data == b"raise":
        raise RecursionError("deep")
    if data == b"go on":
        for _ in range(8):
            time.sleep(0.2)
            on_page()
    print("noise on standard output")
    return Parsed(data.decode())
'''
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # The child reads the table as it is installed, so the crafted parser stands in a table of the test's own.
    code = (
        "from modelwright.data import PARSERS; PARSERS['.pdf'] = 'crafted_parser:parse'; "
        "from modelwright.data.isolate import serve; serve({})"
    )
    monkeypatch.setattr(isolate, "_COMMAND", code)
    isolate.stop_children()
    yield
    isolate.stop_children()


def test_each_way_to_die_is_a_reason_and_the_next_file_is_read(bad_parser):
    limits = Limits(parse_seconds=1.0, memory_bytes=2 * 10**9)
    reasons = {}
    for data in (HANGS, CRASHES, EATS, RAISES):
        with pytest.raises(Unreadable) as caught:
            parse_apart(".pdf", data, OcrConfig(), limits)
        reasons[data] = str(caught.value)
        warm = Limits(parse_seconds=30.0, memory_bytes=2 * 10**9)
        assert parse_apart(".pdf", b"good", OcrConfig(), warm) == Parsed("good")
    assert reasons[HANGS] == "took longer than 1 s to parse"
    assert "the parser died of it (exit -11" in reasons[CRASHES]
    assert "2.0 GB of memory" in reasons[EATS]
    assert reasons[RAISES] == "cannot be parsed (RecursionError: deep)"


def test_a_long_file_that_shows_signs_of_life_is_not_killed(bad_parser):
    assert parse_apart(".pdf", b"warm", OcrConfig(), Limits(parse_seconds=30.0)).text == "warm"
    start = time.monotonic()
    assert parse_apart(".pdf", GOES_ON, OcrConfig(), Limits(parse_seconds=1.0)).text == "go on"
    assert time.monotonic() - start > 1.5


def test_the_process_is_kept_and_text_needs_none():
    isolate.stop_children()
    assert parse_apart(".txt", b"text", OcrConfig(), Limits()).text == "text"
    assert not isolate._kept
    for _ in range(2):
        with pytest.raises(Unreadable, match="not a PDF"):
            parse_apart(".pdf", b"x", OcrConfig(), Limits())
    assert len(isolate._kept) == 1 and ".pdf" in PARSERS
