"""Made English: right where it speaks, silent where a sentence does not fit."""

import random

import pytest

from modelwright.data.phrasing import define_question, heading_question, imperative_phrase, paraphrase, verb_phrase


@pytest.mark.parametrize(
    ("sentence", "phrase"),
    [
        (
            "Remove any common leading whitespace from every line in `text`.",
            "removes any common leading whitespace from every line in text",
        ),
        ("Returns a list of supported\n  formats for unpacking.", "returns a list of supported formats for unpacking"),
        (
            "Copy and return the mode bits from src to dst (see chmod).",
            "copies and returns the mode bits from src to dst",
        ),
        ("Recursively copy a directory tree to another place.", ""),  # the verb is not first
        ("The default value of the thing that is meant here.", ""),
        ("Return it.", ""),
        ("Return the x=3 for self._name of this object.", ""),
        ("Set of all the names that were given before.", ""),
        ("Dedent the lines by calling textwrap.f on each of them.", ""),  # would tell the name
    ],
)
def test_verb_phrases(sentence, phrase):
    assert verb_phrase(sentence, "textwrap.f") == phrase


def test_the_name_never_stands_in_the_phrase():
    assert verb_phrase("Open the file and then dedent all of its lines.", "textwrap.dedent") == ""
    assert (
        verb_phrase("Copy the file with all of its metadata.", "shutil.copy")
        == "copies the file with all of its metadata"
    )


def test_of_classes_only_the_third_person_is_sure():
    assert verb_phrase("Import can be done by only one thread.", "m.E", "class") == ""
    assert verb_phrase("Implements the client side of the protocol.", "m.E", "class").startswith(
        "implements the client"
    )


def test_imperatives():
    assert (
        imperative_phrase("Return the number of seconds since midnight.", "m.f")
        == "get the number of seconds since midnight"
    )
    assert imperative_phrase("Splits and joins the several parts.", "m.f") == ""


@pytest.mark.parametrize(
    ("heading", "question"),
    [
        ("How to book a train", "How do I book a train?"),
        ("Request sick leave", "How do I request sick leave?"),
        ("Who may travel?", "Who may travel?"),
        ("how should I book a train outside of hours", "How should I book a train outside of hours?"),
        ("3.1 Overview", ""),
        ("Notes and examples", ""),
        ("**See also**", ""),
        ("", ""),
        ("word " * 20, ""),
    ],
)
def test_headings(heading, question):
    assert heading_question(heading, random.Random(0)) == question


def test_a_plain_heading_becomes_one_of_a_few_questions():
    forms = {heading_question("Sick leave", random.Random(seed)) for seed in range(20)}
    assert len(forms) == 3 and all("Sick leave" in form for form in forms)


@pytest.mark.parametrize(
    ("sentence", "question"),
    [
        ("A widget is a small part that can be replaced.", "What is a widget?"),
        ("Modules are a basic organizational unit of Python code.", "What are Modules?"),
        ("The travel office is the place to ask.", "What is the travel office?"),
        ("The office is the place to ask.", ""),
        ("It is a small part.", ""),
        ("This kind of thing is a problem.", ""),
        ("Bytes\n   A bytes object is an immutable array.", ""),
        ("nothing is a given", ""),
        ("Since GitHub is a tool we have chosen.", ""),
        ("Using short paragraphs is an ideal way.", ""),
        ("A widget is replaced by hand.", ""),
    ],
)
def test_definitions(sentence, question):
    assert define_question(sentence) == question


def test_a_paraphrase_keeps_all_but_two_words():
    phrase = "returns the entire sequence and removes the corresponding entry"
    for seed in range(30):
        words = paraphrase(phrase, random.Random(seed))
        assert "the" in words and words.endswith("entry")
    assert len({paraphrase(phrase, random.Random(seed)) for seed in range(30)}) > 5
    assert paraphrase("frobs the xyzzy", random.Random(0)) == "frobs the xyzzy"
