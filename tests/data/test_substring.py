"""Repeated runs of words are exactly those that comparing all words finds; what is cut is only what stood before."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.base.errors import ConfigError
from modelwright.base.types import Document
from modelwright.data.step import Removal
from modelwright.data.substring import RepeatedPassages, repeated_runs


def run(step, texts):
    documents = [Document(f"d{i}", text) for i, text in enumerate(texts)]
    decisions = step.decide((d.id, step.sign(d)) for d in documents)
    return [step.apply(d, decisions[d.id]) if d.id in decisions else d for d in documents]


def plain_cover(texts, size):
    """Which words of each text lie in a window that stood before, without the words of the first occurrence."""
    seen, covered = {}, []
    for index, text in enumerate(texts):
        words, marks = text.split(), set()
        for start in range(len(words) - size + 1):
            gram = tuple(words[start : start + size])
            first = seen.setdefault(gram, (index, start))
            if first != (index, start):
                begin = max(start, first[1] + size) if first[0] == index else start
                marks |= set(range(begin, start + size))
        covered.append(marks)
    return covered


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("abc ", max_size=30), max_size=5), st.integers(2, 4))
def test_runs_cover_what_comparing_all_windows_covers(texts, size):
    found = [set() for _ in texts]
    for r in repeated_runs(texts, size):
        found[r.index] |= set(range(r.start, r.stop))
    assert found == plain_cover(texts, size)


def test_a_run_is_found_from_its_minimum_length_on():
    rng = random.Random(1)
    words = [f"w{rng.randrange(10**6)}" for _ in range(300)]
    for shared, count in ((49, 0), (50, 1), (51, 1)):
        other = [f"v{i}" for i in range(20)] + words[100 : 100 + shared] + [f"u{i}" for i in range(20)]
        runs = repeated_runs([" ".join(words), " ".join(other)])
        assert len(runs) == count
        assert not runs or (runs[0].start, runs[0].stop, runs[0].of, runs[0].of_start) == (20, 20 + shared, 0, 100)


def test_the_step_cuts_the_characters_of_the_run_and_nothing_else():
    passage = "One two Stra\u00dfe four \u0130stanbul six"
    texts = [f"Before. {passage}, after.", f"Other  words:\n{passage.upper()}; and the end\n", passage]
    first, second, third = run(RepeatedPassages(min_words=6), texts)
    assert first.text == texts[0]
    assert second.text == "Other  words:\n; and the end\n"
    assert isinstance(third, Removal) and "stand in d0" in third.reason
    left = run(RepeatedPassages(min_words=6, min_left_words=6), texts)[1]
    assert isinstance(left, Document)  # other words : ; and the end: 7
    assert isinstance(run(RepeatedPassages(min_words=6, min_left_words=8), texts)[1], Removal)


def test_a_text_that_repeats_itself_keeps_one_window():
    assert run(RepeatedPassages(min_words=4), ["ha " * 50])[0].text.split() == ["ha"] * 4
    block = " ".join(f"w{i}" for i in range(10))
    assert run(RepeatedPassages(min_words=5), [f"{block} {block} {block}"])[0].text.split() == block.split()


def test_refusals_and_empty_inputs():
    with pytest.raises(ConfigError, match="at least 2"):
        RepeatedPassages(min_words=1)
    assert RepeatedPassages().decide([]) == {} and repeated_runs([]) == [] and repeated_runs(["", "a"]) == []


@pytest.mark.parametrize("piece", ["a", "a ", "ab c ", "\u4e2d."])
def test_a_huge_line_takes_linear_time(piece):
    begun = time.perf_counter()
    run(RepeatedPassages(), [piece * (600_000 // len(piece))])
    assert time.perf_counter() - begun < 8
