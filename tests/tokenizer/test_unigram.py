import heapq
import inspect
import json
import math
import textwrap

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, trainers

from modelwright.tokenizer.merges import count_words
from modelwright.tokenizer.unigram import PlainUnigram, digamma, reestimate, seed_pieces, train_plain_unigram

SOURCE = inspect.getsource(textwrap)


def library(counts: dict[str, int], vocab_size: int, specials: list[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator((word for word, count in counts.items() for _ in range(count)), trainer)
    return backend


def pieces_of(backend: tokenizers.Tokenizer) -> list[tuple[str, float]]:
    return [(piece, score) for piece, score in json.loads(backend.to_str())["model"]["vocab"]]


@pytest.mark.parametrize("specials", [["<unk>"], ["<s>", "<unk>"], []])
def test_without_pruning_the_twin_learns_the_same_pieces_and_scores(specials: list[str]):
    counts = count_words([SOURCE], str.split)
    theirs = dict(pieces_of(library(counts, 6000, specials)))
    ours = dict(train_plain_unigram(counts, 6000, specials).pieces)
    assert set(ours) == set(theirs)
    lost = [piece for piece in ours if len(piece) == 1 and not math.isclose(ours[piece], theirs[piece], abs_tol=1e-6)]
    # Characters without a score of their own share the last places, in any order.
    assert sorted(ours[piece] for piece in lost) == pytest.approx(sorted(theirs[piece] for piece in lost), abs=1e-6)
    assert all(math.isclose(ours[piece], theirs[piece], abs_tol=1e-6) for piece in ours if piece not in lost)


@pytest.mark.parametrize("vocab_size", [200, 300, 400])
@pytest.mark.parametrize("module", [textwrap, heapq])
def test_pruning_keeps_the_same_pieces_with_the_same_scores(module, vocab_size: int):
    counts = count_words([inspect.getsource(module)], str.split)
    theirs = dict(pieces_of(library(counts, vocab_size, [])))
    ours = dict(train_plain_unigram(counts, vocab_size).pieces)
    assert set(ours) == set(theirs) and len(ours) == vocab_size
    assert all(math.isclose(ours[piece], theirs[piece], abs_tol=1e-8) for piece in ours if len(piece) > 1)
    frequent = {piece for piece, _ in [("<unk>", 0.0), *seed_pieces(list(counts.items()))][:vocab_size]}
    assert len(frequent & set(theirs)) < 0.9 * vocab_size  # the seeds alone, without pruning, are others


@pytest.fixture(scope="module")
def pair() -> tuple[tokenizers.Tokenizer, PlainUnigram]:
    backend = library(count_words([SOURCE], str.split), 300, ["<unk>"])
    return backend, PlainUnigram(pieces_of(backend))


@given(st.one_of(st.text(min_size=1), st.text("abdeforstu_(猫", min_size=1, max_size=60)))
@settings(max_examples=300, deadline=None)
def test_the_twin_gives_the_same_ids(pair, text: str):
    backend, plain = pair
    backend.encode_special_tokens = True
    assert plain.encode_word(text) == backend.encode(text, add_special_tokens=False).ids


@given(st.lists(st.sampled_from([-1.0, -2.0, -3.0]), min_size=6, max_size=6), st.text("ab", min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_equal_scores_are_cut_alike(scores: list[float], text: str):
    pieces = [("<unk>", 0.0), *zip(["a", "b", "ab", "ba", "aa", "aba"], scores, strict=True)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    assert PlainUnigram(pieces).encode_word(text) == backend.encode(text).ids


def test_expected_counts_cover_every_character_once():
    model = PlainUnigram([("<unk>", math.nan), ("a", -1.0), ("b", -1.5), ("ab", -2.0), ("bab", -1.0)])
    expected = [0.0] * 5
    model.add_expected("abab", 3, expected)
    lengths = [0, 1, 1, 2, 3]
    assert sum(n * length for n, length in zip(expected, lengths, strict=True)) == pytest.approx(12)
    assert expected[0] == 0 and all(n > 0 for n in expected[1:])


def test_each_round_explains_the_words_better():
    words = list(count_words([SOURCE], str.split).items())
    model = reestimate(PlainUnigram([("<UNK>", math.nan), *seed_pieces(words)]), words)

    def log_likelihood(model: PlainUnigram) -> float:
        return sum(n * sum(model.pieces[i][1] for _, _, i in model.best_cut(word)) for word, n in words)

    again = reestimate(model, words)
    assert log_likelihood(again) > log_likelihood(model)


def test_a_substring_that_always_goes_on_alike_is_no_seed():
    seeds = dict(seed_pieces([("lower", 1), ("lowest", 1)]))
    assert "lowe" in seeds and "low" not in seeds


def test_digamma_is_the_slope_of_log_gamma():
    for x in (0.6, 1.0, 3.5, 40.0):
        assert digamma(x) == pytest.approx((math.lgamma(x + 1e-5) - math.lgamma(x - 1e-5)) / 2e-5, abs=1e-4)
