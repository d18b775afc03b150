import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.rag.index import Hit
from modelwright.rag.marks import MarkFilter, supporting_sentence

PASSAGES = [
    "Bananas are berries. Strawberries are not.",
    "Remove any common leading whitespace from every line.",
    "Employees receive 26 weeks of paid leave.",
]
HITS = [Hit(f"{n}.txt", 100 * n, 100 * n + len(text), text, 1.0) for n, text in enumerate(PASSAGES)]


def shown(text: str, size: int = 1) -> tuple[str, MarkFilter]:
    marks = MarkFilter(HITS)
    pieces = [marks.push(text[i : i + size]) for i in range(0, len(text), size)]
    return "".join(pieces) + marks.finish(), marks


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("Bananas are berries [1].", "Bananas are berries [1]."),
        ("Bananas are berries. [1] Leave lasts 26 weeks [3].", "Bananas are berries. [1] Leave lasts 26 weeks [3]."),
        ("Bananas are berries [7].", "Bananas are berries."),
        ("Bananas are berries [0].", "Bananas are berries."),
        ("Bananas are berries [1, 9; 4].", "Bananas are berries [1]."),
        ("Bananas are berries [1][2].", "Bananas are berries [1]."),
        ("Paid leave lasts 26 weeks [1].", "Paid leave lasts 26 weeks."),
        ("Nothing here [1234].", "Nothing here."),
        ("x = a[10000] and b[i]", "x = a[10000] and b[i]"),
        ("unfinished [1", "unfinished [1"),
        ("[1]", ""),
        ("spaces   stay  ", "spaces   stay  "),
    ],
)
def test_marks_that_do_not_hold_are_taken_out(written: str, expected: str):
    for size in (1, 2, 3, 7, 100):
        assert shown(written, size)[0] == expected


@given(st.lists(st.sampled_from(["[", "]", "1", "2", "9", ",", " ", "\n", "banana berry.", "Line", "[1]", "[2, 7]"])))
def test_pieces_of_any_size_give_the_same_text_and_only_known_numbers(parts: list[str]):
    text = "".join(parts)
    whole, marks = shown(text, max(len(text), 1))
    assert shown(text, 1)[0] == whole
    shown_numbers = {int(n) for mark in re.findall(r"\[(\d{1,4}(?:, \d{1,4})*)\]", whole) for n in mark.split(", ")}
    assert set(marks.places) <= {1, 2, 3}
    # Taking a mark out may join what stood around it into brackets again; no such text is in what models write.
    assert (
        shown_numbers <= set(marks.places)
        or "[[" in text
        or "]]" in text
        or "[" in text.replace("[1]", "").replace("[2, 7]", "")
    )


def test_the_sentence_that_says_it_is_cited():
    _, marks = shown("Strawberries are different [1].")
    start, end = marks.places[1]
    assert PASSAGES[0][start:end] == "Strawberries are not."


def test_a_sentence_without_a_common_word_supports_nothing():
    assert supporting_sentence(HITS[0], {"unrelat"}) is None
    assert supporting_sentence(HITS[0], set()) is None
