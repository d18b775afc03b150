"""Cleaning mends and never harms: idempotent, linear, code and other scripts untouched."""

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.base.types import Document
from modelwright.data.clean import Clean, Readable, clean_text, reject_reason, repair_mojibake


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_cleaning_twice_is_cleaning_once(text):
    once = clean_text(text)
    assert clean_text(once) == once
    assert not {c for c in once if unicodedata.category(c) == "Cc"} - {"\n", "\t"}


def test_code_and_scripts_stay_as_they_are():
    code = "def f(x):\n\tif x:  # two  blanks\n\t\treturn '\u00bd \u2122 \uff21'\n\n"
    text = code + "\u0645\u06cc\u200c\u062e \U0001f468\u200d\U0001f469\n"
    assert clean_text(text) == text


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("\ufeffmark\r\nold mac\rform\x0cfeed", "mark\nold mac\nform\nfeed\n"),
        ("nul\x00 bell\x07 esc\x1b[0m c1\x9b", "nul bell esc[0m c1\n"),
        (
            "e\u0301t\u00e9 \ufb01le na\u00ad\u00efve a\u00a0b zero\u200bwidth",
            "\u00e9t\u00e9 file na\u00efve a b zerowidth\n",
        ),
        ("safe\u202egnp.exe", "safegnp.exe\n"),
        ("a   \t\n \n\n\n\n  b  ", "a\n\n  b\n"),
        ("\n\n  indented\n", "  indented\n"),
        ("\x00\u200b \n", ""),
    ],
)
def test_each_kind_of_damage(raw, clean):
    assert clean_text(raw) == clean


def test_mojibake_is_repaired_only_where_a_document_shows_it():
    right = "Caf\u00e9 na\u00efve \u201cquoted\u201d \u2014 fa\u00e7ade \u20ac5"
    wrong = "".join(
        bytes([b]).decode("cp1252") if b not in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else chr(b) for b in right.encode()
    )
    assert wrong != right and repair_mojibake(wrong) == right
    assert repair_mojibake(right) == right
    about = "The letter \u00e9 read wrongly becomes \u00c3\u00a9."
    assert repair_mojibake(about) == about
    portuguese = "S\u00c3O PAULO \u00c9 A MAIOR. N\u00c3O \u00c9 \u00c0 TOA. \u00c2NGULO, \u00caXITO."
    assert repair_mojibake(portuguese) == portuguese


@pytest.mark.parametrize("piece", [" ", "\t", "a", "\n", "\u00c3", "\u00a0", "a \n"])
def test_one_endless_line_takes_linear_time(piece):
    text = piece * (4_000_000 // len(piece)) + "x"
    begun = time.perf_counter()
    clean_text(text)
    reject_reason(text, 10, 1000, 0.3)
    assert time.perf_counter() - begun < 6


def test_what_is_no_document_is_told_why():
    assert reject_reason(" \n", 10, 1000, 0.3) == "empty"
    assert "too short: 5" in reject_reason("short", 10, 1000, 0.3)
    assert "data, not text" in reject_reason("word " * 9 + "A" * 2000, 10, 1000, 0.3)
    assert "letters and digits" in reject_reason("=-=-=-=- " * 20, 10, 1000, 0.3)
    assert reject_reason("A sentence of ordinary words.", 10, 1000, 0.3) == ""
    assert reject_reason("\u8fd9\u662f\u4e00\u4e2a\u666e\u901a\u7684\u53e5\u5b50\u3002" * 3, 10, 1000, 0.3) == ""


def test_both_as_steps():
    dirty, clean = Document("a", "x\u00a0y \r\n", title="t"), Document("a", "x y\n", title="t")
    assert Clean().change(dirty) == clean and Clean().change(clean) is clean
    assert Readable().reason(Document("b", "a " * 32)) == "too short: 63 characters, at least 64"
    assert Readable().reason(Document("b", "a " * 32 + "b")) == ""
    assert "10001 characters" in Readable().reason(Document("c", "a" * 10_001))
    assert Readable().reason(Document("c", "a" * 10_000)) == ""
    assert Readable().reason(Document("d", "a" * 25 + "-" * 75)) == ""
    assert "only 24%" in Readable().reason(Document("d", "a" * 24 + "-" * 76))
