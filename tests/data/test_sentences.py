"""One of any three-sentence span stays, and every sentence outside of a repeated span stays as it is."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.base.errors import ConfigError
from modelwright.base.types import Document
from modelwright.data.sentences import RepeatedSentences, cut_sentences
from modelwright.data.step import Removal, run_step


def texts_after(texts, **settings):
    results = run_step(RepeatedSentences(**settings), [Document(f"d{i}", text) for i, text in enumerate(texts)])
    return [r.reason if isinstance(r, Removal) else r.text for r in results]


def test_a_span_that_stood_before_goes_and_its_neighbours_stay():
    notice = "We use your data. You agree to that. Read our terms!"
    found = texts_after(
        [f"First page. {notice} The end.", "Second page.\nWe use  YOUR data. You agree to that. Read our terms! More."]
    )
    assert found == [f"First page. {notice} The end.", "Second page. More.\n"]


def test_two_shared_sentences_are_no_span_and_three_are():
    assert texts_after(["A a. B b. C c.", "A a. B b. D d."])[1] == "A a. B b. D d."
    assert texts_after(["A a. B b. C c.", "X x. A a. B b. C c."])[1] == "X x.\n"
    assert texts_after(["A a. B b.", "B b. C c."], num_sentences=1)[1] == "C c.\n"


def test_a_text_of_one_sentence_said_again_and_again_says_it_once_a_span():
    assert texts_after(["Again. Again. Again. Again. Again. Again."]) == ["Again.\n"]


def test_a_page_of_which_nothing_is_left_goes_with_its_reason():
    same = "One here. Two here. Three here."
    assert texts_after([same, same]) == [same, "every run of 3 sentences stood before, the first in d0"]
    assert texts_after(["", "Two. Sentences.", ""]) == ["", "Two. Sentences.", ""]


@given(st.text(alphabet="ab.!? \n\u3002)", max_size=60))
def test_cutting_loses_nothing(text):
    assert "".join(cut_sentences(text)) == text


def test_long_texts_take_linear_time_and_a_run_of_none_is_refused():
    begun = time.perf_counter()
    texts_after(["Word. " * 200_000, "x" * 2_000_000, ". " * 200_000])
    assert time.perf_counter() - begun < 20
    with pytest.raises(ConfigError, match="at least 1 sentence"):
        RepeatedSentences(num_sentences=0)
