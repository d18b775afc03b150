"""Merges equal those of the library's trainer, in every setting that decides ties."""

import json
import os
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from modelwright.tokenizer.byte_level import spell
from modelwright.tokenizer.merges import count_words, learn_merges
from modelwright.tokenizer.plain_bpe import train_plain

DATA = Path(os.environ.get("MODELWRIGHT_DATA", "/nonexistent"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="MODELWRIGHT_DATA is not set")
SOURCE = open(__file__, encoding="utf-8").read()


def library_bpe(counts: dict[str, int], vocab_size: int, min_frequency: int = 0) -> tuple[list[str], list[list[str]]]:
    """Vocabulary and merges that the library learns from words, each counted as often as said."""
    backend = tokenizers.Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=min_frequency, show_progress=False)
    backend.train_from_iterator((word for word, count in counts.items() for _ in range(count)), trainer)
    vocabulary = backend.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__), json.loads(backend.to_str())["model"]["merges"]


def ours(counts: dict[str, int], vocab_size: int, min_frequency: int = 0) -> tuple[list[str], list[list[str]]]:
    alphabet = sorted({char for word in counts for char in word})
    learned = learn_merges(counts, alphabet, vocab_size, min_frequency=min_frequency)
    return learned.pieces, [[learned.pieces[a], learned.pieces[b]] for a, b in learned.merges]


few_letters = st.dictionaries(st.text("ab", min_size=1, max_size=9), st.integers(1, 3), min_size=1, max_size=8)
more_letters = st.dictionaries(st.text("abcé猫", min_size=1, max_size=6), st.integers(1, 4), min_size=1, max_size=12)


@given(st.one_of(few_letters, more_letters), st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_words_of_few_letters_are_full_of_ties_and_give_the_same_merges(counts, min_frequency: int):
    assert ours(counts, 40, min_frequency) == library_bpe(counts, 40, min_frequency)


@pytest.mark.parametrize("min_frequency", [0, 2, 5])
def test_words_between_spaces_give_the_same_merges(min_frequency: int):
    counts = count_words([SOURCE], lambda text: [w for w, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)])
    assert ours(counts, 400, min_frequency) == library_bpe(counts, 400, min_frequency)


def test_the_order_of_the_words_does_not_matter():
    counts = count_words([SOURCE], str.split)
    assert ours(dict(sorted(counts.items())), 300) == ours(dict(sorted(counts.items(), reverse=True)), 300)


def test_a_frequency_that_no_pair_has_merges_nothing():
    assert learn_merges({"abab": 2}, ["a", "b"], 10, min_frequency=5).merges == {}


def test_counting_holds_words_and_not_text():
    assert count_words((text for text in ["a b", "b c"] * 1000), str.split) == Counter(
        {"b": 2000, "a": 1000, "c": 1000}
    )


@needs_data
def test_the_published_reference_is_learned():
    with zipfile.ZipFile(DATA / "tokenizers/bpe_training_reference.zip") as archive:
        text = archive.read("corpus.en").decode("utf-8")
        merges = archive.read("train-bpe-reference-merges.txt").decode("utf-8").splitlines()
        vocabulary = json.loads(archive.read("train-bpe-reference-vocab.json"))
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = train_plain([text], 500, ["<|endoftext|>"], splitter=splitter)
    spelled = [" ".join(spell(plain.pieces[i]) for i in pair) for pair in plain.merges]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    assert [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]] == spelled
    # The reference breaks ties by the greater pair of bytes, we and the library by the lower ids: four merges of 243
    # are others, and nothing but ties can have made them so, since the library agrees with us on each.
    assert len(vocabulary) == len(plain.pieces) == 500
    assert len(set(merges) - set(spelled)) == len(set(spelled) - set(merges)) == 4
