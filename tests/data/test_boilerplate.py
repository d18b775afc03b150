"""Furniture of pages goes line by line; text stays as it was."""

import time

import pytest

from modelwright.base.errors import ConfigError
from modelwright.base.types import Document
from modelwright.data.boilerplate import C4Lines, PageFurniture


def changed(step, text):
    return step.change(Document("x", text)).text


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("This line has five words.", ""),
        ("This has four words.", "fewer than 5 words"),
        ("This line has five words", "terminal mark"),
        ("This line trails off at last...", "terminal mark"),
        ('He said that it was "done"', ""),
        ("Please turn on JavaScript to see this.", "javascript"),
        ("By staying here you accept our Privacy Policy.", "'privacy policy'"),
        ("This site uses cookies to follow you around.", "'uses cookies'"),
    ],
)
def test_c4_lines(line, why):
    found = C4Lines().drop_reason(line)
    assert (why in found) if why else found == ""


def test_c4_takes_marks_of_citations_and_keeps_paragraphs():
    text = "The first line is a sentence.[12]\n\nMenu\n\nThe second one is it too.[citation needed]\n"
    assert changed(C4Lines(), text) == "The first line is a sentence.\n\nThe second one is it too.\n"
    assert changed(C4Lines(), "Menu\n\nHome\n") == ""
    assert "[12]" in changed(C4Lines(drop_citations=False, needs_terminal_mark=False), text)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("An ordinary line of a text, as it should be.", ""),
        ("Home", "a single word"),
        ("12 345 | 77", "no letters"),
        ("BREAKING NEWS of today", "mostly upper case"),
        ("ABcd efGH", ""),  # half of the letters is not more than half
        ("3 likes", "a counter"),
        ("1.2k comments", "a counter"),
        ("3 likes were all that the picture got", ""),
        ("Sign in to your account", "a phrase of menus"),
        ("one two three four five six seven eight read more", "a phrase of menus"),
        ("one two three four five six seven eight nine read more", ""),
        ("2 items in cart", "a phrase of menus"),
    ],
)
def test_refinedweb_lines(line, why):
    assert PageFurniture().drop_reason(line) == why


def test_a_page_that_loses_more_than_a_twentieth_goes_as_a_whole():
    line = "There are exactly ten words in this line of text.\n"
    assert changed(PageFurniture(), line * 19 + "Sign in here and now, all ten words of it.\n").count("\n") == 19
    text = line * 18 + "Log in or leave now.\nSign in or\n"  # 8 of 188 words
    assert changed(PageFurniture(), text) == line * 18
    assert changed(PageFurniture(), line * 18 + "Sign in here and now, all ten words of it.\n") == ""
    assert changed(PageFurniture(max_dropped_fraction=1), "Home\nSign in\n") == ""
    with pytest.raises(ConfigError, match="from 0 to 1"):
        PageFurniture(max_dropped_fraction=2)


@pytest.mark.parametrize("piece", ["a", " ", "1,", "a. ", "A\n", "[1"])
def test_a_huge_text_takes_linear_time(piece):
    text = piece * (2_000_000 // len(piece))
    begun = time.perf_counter()
    changed(C4Lines(), text)
    changed(PageFurniture(), text)
    assert time.perf_counter() - begun < 8
