import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.base.errors import ConfigError
from modelwright.base.types import Document
from modelwright.rag.chunk import ChunkConfig, chunk_document

SMALL = ChunkConfig(target_chars=60, max_chars=80)
LINES = st.lists(
    st.sampled_from(
        [
            "# A",
            "## B b",
            "### C",
            "#no",
            "```",
            "~~~",
            "text. More text.",
            "",
            "",
            "  ",
            "- item",
            "x" * 150,
            "é\u0301" * 70,
        ]
        + ["👩‍👧" * 40, "word " * 30, "\ufeff", "# " + "#" * 50, "####### seven", "    # code", "a\u2028b"]
    ),
    max_size=30,
)


def chunks(text: str, config: ChunkConfig | None = None):
    return chunk_document(Document("doc.md", text), config)


@given(LINES, st.sampled_from(["\n", "\r\n"]))
def test_a_chunk_is_its_span_and_nothing_is_lost(lines: list[str], newline: str):
    text = newline.join(lines)
    found = chunks(text, SMALL)
    covered = 0
    for chunk in found:
        assert chunk.text == text[chunk.start : chunk.end] == chunk.text.strip()
        assert 0 < len(chunk.text) <= SMALL.max_chars
        assert not text[covered : chunk.start].strip()
        covered = chunk.end
    assert not text[covered:].strip()


def test_the_heading_path_leads_to_the_chunk():
    found = chunks("intro\n\n# A\n\none\n\n## B ##\n\ntwo\n\n### C\n\nthree\n\n## D\n\nfour")
    assert [(c.headings, c.text.split("\n")[-1]) for c in found] == [
        ((), "intro"),
        (("A",), "one"),
        (("A", "B"), "two"),
        (("A", "B", "C"), "three"),
        (("A", "D"), "four"),
    ]


def test_a_heading_with_nothing_under_it_joins_the_deeper_one_but_not_its_neighbour():
    found = chunks("# Title\n\n## f(x)\n\n## g(x)\n\nText.")
    assert [(c.text, c.headings) for c in found] == [
        ("# Title\n\n## f(x)", ("Title", "f(x)")),
        ("## g(x)\n\nText.", ("Title", "g(x)")),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "```\n\n# in a fence\n\n```\n\ntext",
        "some text\n# comment in an example\nx = 1",
        "#tag\n\ntext",
        "    # code\n\ntext",
    ],
)
def test_what_is_no_heading(text: str):
    assert [c.headings for c in chunks(text)] == [()]


def test_long_sections_are_packed_from_whole_sentences():
    text = "# H\n\n" + " ".join(f"This is sentence number {i}." for i in range(200))
    found = chunks(text)
    assert len(found) > 3 and all(c.text.endswith(".") and c.headings == ("H",) for c in found)
    assert all(500 < len(c.text) <= 900 for c in found[:-1])


@pytest.mark.parametrize("piece", ["a", "word ", "Short. ", "# ", "```", "\n", "é"])
def test_two_million_characters_in_one_line_take_seconds(piece: str):
    start = time.perf_counter()
    found = chunks(piece * (2_000_000 // len(piece)))
    assert time.perf_counter() - start < 5
    assert all(len(c.text) <= 1200 for c in found)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="target_chars is 2000"):
        ChunkConfig(target_chars=2000)
