import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.rag.sentence import split_blocks, split_sentences, whole_character

NASTY = st.text(alphabet="ab.!?…。 \n\r\t\"')]`#-*>1é\u0301\u200d👩🏽🇩🇪\ufeff\u2028", max_size=200)


def sentences(text: str) -> list[str]:
    return [text[start:end] for start, end in split_sentences(text)]


@given(NASTY)
def test_every_character_but_white_space_belongs_to_exactly_one_sentence(text: str):
    spans = split_sentences(text)
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    outside = text
    for start, end in reversed(spans):
        assert text[start:end] == text[start:end].strip() != ""
        outside = outside[:start] + outside[end:]
    assert not outside.strip()


@given(NASTY)
def test_a_part_of_a_text_is_split_within_its_bounds(text: str):
    low, high = len(text) // 4, 3 * len(text) // 4
    assert all(low <= start < end <= high for start, end in split_sentences(text, low, high))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Call os.path.join(a, b). It joins.", ["Call os.path.join(a, b).", "It joins."]),
        ("Use tools, e.g. Ruff. See Fig. 3 there.", ["Use tools, e.g. Ruff.", "See Fig. 3 there."]),
        ("Version 3.11.7 is out! Really? Yes.", ["Version 3.11.7 is out!", "Really?", "Yes."]),
        ('He said "Stop." Then he left.', ['He said "Stop."', "Then he left."]),
        ("J. R. Smith wrote it. It sold.", ["J. R. Smith wrote it.", "It sold."]),
        ("Wait ... what is it. it goes on", ["Wait ... what is it. it goes on"]),
        ("東京は首都です。大阪は西です。", ["東京は首都です。", "大阪は西です。"]),
        ("Items:\n- one. Two\n- three", ["Items:", "- one.", "Two", "- three"]),
        ("A line\nthat wraps. Next.", ["A line\nthat wraps.", "Next."]),
        ("Text.\n\n>>> f(x). y\n'a. B'", ["Text.", ">>> f(x). y", "'a.", "B'"]),
    ],
)
def test_sentences_of_technical_prose(text: str, expected: list[str]):
    assert sentences(text) == expected


def test_code_lines_and_fences_keep_their_lines():
    text = "Do this:\n\n```\nfirst = 1\nsecond = 2\n```\n\nDone."
    assert [text[s:e] for s, e in split_blocks(text, 0, len(text))] == [
        "Do this:",
        "```",
        "first = 1",
        "second = 2",
        "```",
        "Done.",
    ]


@pytest.mark.parametrize("text", ["." * 300_000, "a" * 300_000, '."' * 150_000, " " * 300_000, "e.g. " * 60_000])
def test_time_is_linear_in_hostile_text(text: str):
    start = time.perf_counter()
    split_sentences(text)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("joined", ["e\u0301", "👩‍👧", "👍🏽", "🇩🇪", "\r\n", "✌\ufe0f"])
def test_no_cut_within_a_character(joined: str):
    text = "x" * 10 + joined + "y" * 10
    for cut in range(11, 10 + len(joined)):
        assert whole_character(text, cut, 1) == 10
    assert whole_character(text, 10 + len(joined), 1) == 10 + len(joined)
