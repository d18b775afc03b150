import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.rag.bm25 import Bm25, Bm25Config, indexed_terms, query_terms, stem, terms_of, words_of

PASSAGES = [
    ("json.dumps writes an object. It wraps nothing.", ("json", "json.dumps(obj, *, indent=None)")),
    ("Call json.dumps(obj) or json.dump(obj, file) to write. " * 3, ("json",)),
    ("splitLines splits a text at its lines", ("str", "str.split_lines()")),
    ("Wrapping a single paragraph, the paragraph was wrapped", ("textwrap", "class textwrap.TextWrapper(width=70)")),
    ("Bananas are berries", ()),
]


@pytest.fixture(scope="module")
def bm25() -> Bm25:
    return Bm25.build(PASSAGES)[0]


def ranking(bm25: Bm25, query: str) -> list[int]:
    scores = bm25.scores(query, len(PASSAGES))
    return [int(i) for i in np.argsort(-scores, kind="stable") if scores[i] > 0]


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("json.dumps", 0),
        ("What does json.dumps do?", 0),
        ("split_lines", 2),
        ("splitLines", 2),
        ("how to split a line", 2),
        ("wrap paragraphs", 3),
        ("TextWrapper", 3),
        ("textwrap.TextWrapper", 3),
        ("banana", 4),
        ("BERRY", 4),
    ],
)
def test_the_right_passage_comes_first(bm25: Bm25, query: str, first: int):
    assert ranking(bm25, query)[0] == first


def test_the_passage_that_a_name_heads_beats_those_that_repeat_it(bm25: Bm25):
    assert ranking(bm25, "json.dumps")[:2] == [0, 1]


def test_words_that_are_nowhere_find_nothing(bm25: Bm25):
    assert ranking(bm25, "zygote quux") == []
    assert ranking(bm25, "??? !!!") == []


@given(st.lists(st.lists(st.sampled_from("red green blue lime teal".split()), max_size=8), min_size=1, max_size=8))
def test_scores_equal_the_formula(passages: list[list[str]]):
    config = Bm25Config(k1=1.3, b=0.6)
    bm25, count = Bm25.build([(" ".join(words), ()) for words in passages], config)
    mean = max(sum(map(len, passages)) / count, 1.0)
    for query in ("red", "teal lime red"):
        expected = []
        for words in passages:
            score = 0.0
            for term in dict.fromkeys(t for word in query.split() for t in indexed_terms(word)):
                df = sum(any(term in indexed_terms(w) for w in other) for other in passages)
                tf = sum(term in indexed_terms(w) for w in words)
                idf = math.log(1 + (count - df + 0.5) / (df + 0.5))
                norm = config.k1 * (1 - config.b + config.b * len(words) / mean)
                score += idf * tf * (config.k1 + 1) / (tf + norm)
            expected.append(score)
        assert bm25.scores(query, count) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_arrays_bring_the_same_scores_back(bm25: Bm25):
    again = Bm25.from_arrays(bm25.arrays(), len(PASSAGES))
    for query in ("json.dumps", "wrap a paragraph"):
        assert (again.scores(query, len(PASSAGES)) == bm25.scores(query, len(PASSAGES))).all()
        assert again.coverage(query, 0) == bm25.coverage(query, 0)


@pytest.mark.parametrize("name", ["terms", "idf", "starts", "rows", "weights"])
def test_arrays_that_do_not_fit_are_refused(bm25: Bm25, name: str):
    arrays = bm25.arrays()
    with pytest.raises(CheckpointError, match="BM25 arrays"):
        Bm25.from_arrays({**arrays, name: arrays[name][:-30]}, len(PASSAGES))
    with pytest.raises(CheckpointError, match="incomplete"):
        Bm25.from_arrays({k: v for k, v in arrays.items() if k != name}, len(PASSAGES))


def test_postings_beyond_the_passages_are_refused(bm25: Bm25):
    with pytest.raises(CheckpointError, match="2 passages"):
        Bm25.from_arrays(bm25.arrays(), 2)


def test_coverage_counts_what_no_passage_knows(bm25: Bm25):
    assert bm25.coverage("json.dumps", 0) == 1.0
    assert bm25.coverage("json.frobnicate", 0) < 0.5
    assert bm25.coverage("zygote", 0) == 0.0


def test_an_empty_index_answers_with_nothing():
    bm25, count = Bm25.build([])
    assert count == 0 and len(bm25.scores("word", 0)) == 0
    assert Bm25.from_arrays(bm25.arrays(), 0).coverage("word", 0) == 0.0


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("os.path.join", {"os.path.join", "path.join", "join", "path"}),
        ("XMLHttpRequest2", {"xmlhttprequest2", "xml", "http", "request"}),
        ("__init__", {"init"}),
        ("Straße", {"strass"}),
        ("東京都", {"東京", "京都"}),
        ("_", {"_"}),
    ],
)
def test_terms_of_one_word(word: str, expected: set[str]):
    assert expected <= set(terms_of(word))


def test_very_long_words_are_no_words():
    assert words_of("a" * 10_000 + " b") == ["b"]


def test_stop_words_go_unless_there_is_nothing_else():
    assert query_terms("What does the list do?") == ["list"]
    assert query_terms("to be or not to be")


def test_stems_keep_what_is_no_ending():
    assert [stem(w) for w in ("string", "bed", "status", "this", "größen")] == [
        "string",
        "bed",
        "status",
        "this",
        "größen",
    ]


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="b=1.5"):
        Bm25Config(b=1.5)
