"""Every answer is a quote; nothing ambiguous is asked; wording does not depend on the other documents."""

import os
from collections import Counter
from pathlib import Path

import pytest

from modelwright.base.types import Document
from modelwright.data.pipeline import split
from modelwright.data.read import read_documents
from modelwright.data.synthetic import make_pairs, make_questions

A = Document(
    "a.md",
    """# alpha

Tools for boiling kettles.

## alpha.boil(kettle, *, degrees=100)

Heat the water in a kettle until steam rises. It whistles.

## alpha.close()

Close the object and free all of its memory.

## alpha.convert(celsius, kelvin)

Convert a temperature from Celsius degrees to Kelvin units.
""",
)
B = Document(
    "b.md", "# beta\n\n## beta.close()\n\nClose the object and free all of its memory.\n\n## beta.x(y)\n\nNo.\n"
)
PROSE = Document(
    "rules.md",
    """# Travel rules

## Booking a train

The travel desk books every train for you within one working day.

## Per diem

A per diem is a fixed amount of money for the meals of one day abroad. It is paid with the salary.

## How to return a laptop

Bring the laptop with its charger to the service window on the ground floor.
""",
)
PLAIN = Document("note.txt", "A widget is a small part that can be replaced by hand. Widgets break.\n", title="note")


def by_kind(items):
    found = {}
    for item in items:
        found.setdefault(item.kind, []).append(item)
    return found


def test_pairs_from_a_reference_page():
    pairs = make_pairs([A, B])
    found = by_kind(pairs)
    answers = {p.messages[1].content for p in found["what"]}
    assert "Heat the water in a kettle until steam rises. It whistles." in answers
    assert "Tools for boiling kettles." in answers
    assert {p.messages[1].content for p in found["arguments"]} == {
        "alpha.boil(kettle, *, degrees=100)",
        "alpha.convert(celsius, kelvin)",
        "beta.x(y)",
    }
    (which,) = found["which"]  # "Heat" is no known verb, and two places close an object
    assert "converts a temperature from Celsius degrees to Kelvin units" in which.messages[0].content
    assert which.messages[1].content == "alpha.convert(celsius, kelvin)"


def test_pairs_from_prose_and_plain_text():
    found = by_kind(make_pairs([PROSE, PLAIN]))
    asked = {p.messages[0].content: p.messages[1].content for p in found["define"]}
    assert asked["What is a per diem?"] == "A per diem is a fixed amount of money for the meals of one day abroad."
    assert asked["What is a widget?"] == "A widget is a small part that can be replaced by hand."
    asked = {p.messages[0].content: p.messages[1].content for p in found["section"]}
    assert asked["How do I return a laptop?"].startswith("Bring the laptop")


def test_an_ambiguous_question_is_not_asked():
    questions = make_questions([A, B], 100)
    assert not [q for q in questions if "close" in q.text or "Close" in (A.text + B.text)[q.start : q.start + 5]]
    alone = make_questions([A], 100)
    assert [q for q in alone if q.kind == "what" and "alpha.close" in q.text]
    assert not [q for q in make_questions([A], 100, corpus=[A, B]) if "alpha.close" in q.text]
    twice = make_questions(
        [PROSE], 100, corpus=[PROSE, Document("c.md", "# Per diem rates\n\nSee the table below, please.\n")]
    )
    assert not [q for q in twice if q.kind == "section" and "er diem" in q.text]


def test_wording_and_order_depend_on_the_seed_only(reference_documents):
    some = reference_documents[:60]
    assert make_pairs(some, 3) == make_pairs(some, 3) != make_pairs(some, 4)
    assert make_questions(some, 50, 3) == make_questions(some, 50, 3) != make_questions(some, 50, 4)
    fewer, more = make_pairs([A], 3), make_pairs([A, PROSE], 3)
    assert [p for p in more if p.document == "a.md"] == fewer


def test_on_the_default_corpus(reference_documents):
    train, validation = split(reference_documents)
    texts = {document.id: document.text for document in reference_documents}
    pairs = make_pairs(train)
    kinds = Counter(pair.kind for pair in pairs)
    assert kinds["what"] > 5000 and kinds["arguments"] > 3000 and kinds["which"] > 1000
    for pair in pairs:
        assert [m.role for m in pair.messages] == ["user", "assistant"]
        assert pair.messages[1].content == texts[pair.document][pair.start : pair.end]
    assert len({p.messages[0].content for p in pairs}) == len(pairs)

    questions = make_questions(validation, 300, corpus=reference_documents)
    assert len(questions) == 300 and len({q.text for q in questions}) == 300
    held_out = {document.id for document in validation}
    for question in questions:
        quote = texts[question.document][question.start : question.end]
        assert question.document in held_out and quote.strip() == quote != ""
        assert sum(text.count(quote) for text in texts.values()) == 1
    kinds = Counter(question.kind for question in questions)
    assert min(kinds["what"], kinds["which"], kinds["arguments"]) >= 40
    # The description questions must not give the answer away by its name.
    for question in questions:
        if question.kind == "which":
            before = texts[question.document][: question.start].splitlines()
            heading = next(line for line in reversed(before) if line.startswith("#"))
            assert heading.split("(")[0].split(" ")[-1] not in question.text


def test_nothing_to_ask_gives_nothing():
    assert make_pairs([]) == [] and make_questions([], 5) == []
    assert make_questions([Document("a.txt", "...")], 5) == []
    assert make_questions([A], 0) == []


@pytest.mark.skipif("MODELWRIGHT_DATA" not in os.environ, reason="needs MODELWRIGHT_DATA")
def test_on_a_real_handbook(tmp_path):
    import zipfile

    with zipfile.ZipFile(Path(os.environ["MODELWRIGHT_DATA"], "retrieval/docs/employee_handbook_18f.zip")) as archive:
        archive.extractall(tmp_path)
    documents = read_documents(tmp_path).documents
    questions = make_questions(documents, 200)
    texts = {document.id: document.text for document in documents}
    assert len(questions) == 200 and {"define", "section", "keywords"} <= {q.kind for q in questions}
    assert all(sum(t.count(texts[q.document][q.start : q.end]) for t in texts.values()) == 1 for q in questions)
    assert len(make_pairs(documents)) > 500
