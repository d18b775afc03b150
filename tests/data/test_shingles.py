"""Array operations over bytes find the same words as the plain pattern, in every script, in linear time."""

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.data import shingles
from modelwright.data.shingles import hash_grams, hash_words, plain_words

# Letters that fold to several, to ASCII, or only outside of ASCII; marks, digits, joiners, an emoji, a lone surrogate.
POOL = "aB c,.\u00e9\u00c9\u0130\u00df\u1e9e\u0416\u4e2d\u3002\U0001f600\U00010400"
POOL += "\u212a\ud800\n\t_9\u0301\u0345\u24b6\x1c\x00\u2003"


def one_by_one(words):
    return [int(hash_words([word]).hashes[0]) for word in words]


def check_same(texts):
    found = hash_words(texts)
    assert len(found) == len(texts)
    for index, text in enumerate(texts):
        words = plain_words(text)
        assert found.of(index).tolist() == one_by_one(words), repr(text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.sampled_from(POOL) | st.characters(), max_size=30), max_size=4))
def test_the_words_are_those_of_the_pattern(texts):
    check_same(texts)


def test_every_character_is_classed_as_the_pattern_does():
    characters = [chr(code) for code in range(0x110000)]
    text = "".join(characters)
    assert max(i for i, c in enumerate(characters) if c.casefold() != c) < shingles._LAST_FOLDING
    counts = len(plain_words(text))
    assert len(hash_words([text]).hashes) == counts


@pytest.mark.parametrize("size", [7, 8, 9, 15, 16, 17, 63, 64, 65, 200])
def test_words_of_any_length_have_a_number_of_their_own(size):
    words = ["x" * size, "x" * (size - 1) + "y", "y" + "x" * (size - 1), "x" * (size + 1)]
    assert len(set(one_by_one(words))) == 4
    check_same([" ".join(words), words[0]])


def test_n_grams_are_those_of_each_text_alone():
    rng = random.Random(1)
    texts = [" ".join(rng.choice("abc") for _ in range(rng.randrange(12))) for _ in range(200)]
    for size in (1, 2, 5):
        together = hash_grams(hash_words(texts), size)
        number_of = {}
        for index, text in enumerate(texts):
            alone = hash_grams(hash_words([text]), size)
            assert alone.hashes.tolist() == together.of(index).tolist()
            words = text.split()
            grams = [tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))] if words else []
            assert len(grams) == len(alone.hashes)
            for gram, number in zip(grams, alone.hashes.tolist(), strict=True):
                assert number_of.setdefault(gram, number) == number
        assert len(set(number_of.values())) == len(number_of)


def test_batches_do_not_change_the_result(monkeypatch):
    texts = ["one two three", "", "four", "f\u00fcnf \u00c9t\u00e9 sechs", "x" * 50] * 5
    whole = hash_words(texts)
    monkeypatch.setattr(shingles, "BATCH_CHARS", 20)
    parted = hash_words(texts)
    assert np.array_equal(whole.hashes, parted.hashes) and np.array_equal(whole.offsets, parted.offsets)
    assert len(hash_words([])) == 0 and len(hash_grams(hash_words([""]), 5).hashes) == 0


@pytest.mark.parametrize("piece", ["a", " ", ".", "\u00e9", "\u4e2d ", "ab "])
def test_one_endless_line_takes_linear_time(piece):
    text = piece * (2_000_000 // len(piece))
    begun = time.perf_counter()
    hash_grams(hash_words([text]), 5)
    assert time.perf_counter() - begun < 6
