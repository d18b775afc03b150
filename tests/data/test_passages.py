"""Sections, symbols, paragraphs and sentences: spans that hold exactly what they say, on any text."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.base.types import Document
from modelwright.data.passages import opening, paragraphs, sections, sentences, summary

PAGE = """# textwrap

Text wrapping and filling. It has more to say.

## class textwrap.TextWrapper(width=70)

Object for wrapping/filling text.

### textwrap.TextWrapper.fill(text)

fill(text : string) -> string

Reformat the single paragraph in 'text', e.g. to fit in lines. More.

### textwrap.TextWrapper.width

The maximum width of wrapped lines.

## textwrap.dedent(text)

    >>> dedent("x")

Remove any common leading whitespace.
"""
NOTES = """Before any heading there is a sentence.

# Travel rules #

```
# not a heading
Not prose in a fence.
```

- a list item that is no prose
| a | table |

Dr. Smith of No. 5 said "Book early!" Then he left at 3 p.m. sharp.
"""


def parts(text, title=""):
    document = Document("d.md", text, title=title)
    return [
        (s.heading, s.kind, (lambda span: span and text[slice(*span)])(summary(text, s))) for s in sections(document)
    ]


def test_a_reference_page_gives_symbols_with_their_kind_and_first_sentence():
    assert parts(PAGE) == [
        ("textwrap", "module", "Text wrapping and filling."),
        ("class textwrap.TextWrapper(width=70)", "class", "Object for wrapping/filling text."),
        ("textwrap.TextWrapper.fill(text)", "method", "Reformat the single paragraph in 'text', e.g. to fit in lines."),
        ("textwrap.TextWrapper.width", "attribute", "The maximum width of wrapped lines."),
        ("textwrap.dedent(text)", "function", "Remove any common leading whitespace."),
    ]
    found = sections(Document("d.md", PAGE))
    assert [(s.symbol, s.signature) for s in found][1:3] == [
        ("textwrap.TextWrapper", "(width=70)"),
        ("textwrap.TextWrapper.fill", "(text)"),
    ]
    assert all(PAGE[slice(*s.head)] == s.heading for s in found)


def test_prose_keeps_code_lists_and_tables_out():
    document = Document("d.md", NOTES, title="Rules")
    first, second = sections(document)
    assert (first.heading, first.kind) == ("Rules", "") and second.heading == "Travel rules"
    (paragraph,) = paragraphs(NOTES, second.body)
    assert [NOTES[a:b] for a, b in sentences(NOTES, paragraph)] == [
        'Dr. Smith of No. 5 said "Book early!"',
        "Then he left at 3 p.m. sharp.",
    ]


@pytest.mark.parametrize(
    "heading", ["README", "Version 1.2", "foo.txt and more", "What now?", "3.1 Scope", "Use (carefully)"]
)
def test_ordinary_headings_are_no_symbols(heading):
    (section,) = sections(Document("d.md", f"# {heading}\n\nSome text stands here, too.\n"))
    assert section.kind == "" and section.symbol == ""


def test_an_opening_takes_whole_sentences_of_its_paragraph_only():
    text = "One sentence here. Another one here. A third.\n\nNext paragraph."
    assert text[slice(*opening(text, (0, 18)))] == "One sentence here. Another one here. A third."
    assert text[slice(*opening(text, (0, 18), 40))] == "One sentence here. Another one here."
    assert text[slice(*opening(text, (0, 18), 5))] == "One sentence here."


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="#`- \n\t.aB(1)>'\u00e9", max_size=300))
def test_spans_are_in_order_and_within_the_text(text):
    at = 0
    for section in sections(Document("d.md", text)):
        assert at <= section.head[0] <= section.head[1] <= section.body[1] <= len(text) or section.head == (0, 0)
        at = section.body[0]
        last = section.body[0]
        for paragraph in paragraphs(text, section.body):
            assert last <= paragraph[0] < paragraph[1] <= section.body[1]
            last = paragraph[1]
            found = sentences(text, paragraph)
            assert found[0][0] == paragraph[0] and all(a < b for a, b in found)
            assert all(a[1] <= b[0] and not text[a[1] : b[0]].strip() for a, b in zip(found, found[1:], strict=False))


@pytest.mark.parametrize("piece", ["a", "a. ", "# ", "#", " ", "A. b\n", "`", "```\n", "f(", "\n\n", "a b, "])
def test_endless_text_takes_bounded_time(piece):
    text = piece * (500_000 // len(piece))
    begun = time.perf_counter()
    for section in sections(Document("d.md", text)):
        span = summary(text, section)
        if span:
            opening(text, span)
    assert time.perf_counter() - begun < 5
