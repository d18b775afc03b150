"""Every smoothing: it sums to one, equals a twin written from its formula, and does what it is for."""

import gzip
import math
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from modelwright.models import SMOOTHINGS
from modelwright.models.ngram import NgramModel
from modelwright.models.ngram_smoothing import DEFAULT_DISCOUNTS

WORDS = [f"w{i}" for i in range(12)]


def random_sentences(seed, num=60, words=WORDS):
    """Skewed draws with some memory, so that n-grams repeat and counts of one to many occur at every order."""
    draw = random.Random(seed)
    sentences = []
    for _ in range(num):
        state, sentence = 0, []
        for _ in range(draw.randint(0, 12)):
            state = (state * 3 + int(len(words) * draw.random() ** 2.5)) % len(words)
            sentence.append(words[state])
        sentences.append(sentence)
    return sentences


def counts_of(sentences, order):
    """{k-gram: occurrences} of all orders whose last token is predicted."""
    marked = [["<s>", *s, "</s>"] for s in sentences]
    return Counter(
        tuple(s[i - k + 1 : i + 1]) for s in marked for i in range(1, len(s)) for k in range(1, order + 1) if i + 1 >= k
    )


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one_after_any_context(smoothing, order):
    model = NgramModel.train(random_sentences(order), order, smoothing)
    draw = random.Random(7)
    for _ in range(40):
        context = [draw.choice([*WORDS, "never", "seen"]) for _ in range(draw.randint(0, order + 2))]
        row = model.distribution(context)
        assert row.min() > 0
        assert row.sum() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize(
    "texts",
    [["a"], ["a", "a", "a"], ["a b"] * 50, [["a", "b", "c"], []], [str(i % 7) for i in range(300)], ["<unk> a", "a"]],
    ids=["one word", "one word thrice", "certain", "an empty one", "often", "unknown in training"],
)
def test_odd_corpora_sum_to_one(smoothing, texts):
    for order in (1, 2, 4):
        model = NgramModel.train(texts, order, smoothing)
        for context in ([], ["a"], ["a", "b"], ["z", "a"]):
            row = model.distribution(context)
            assert row.sum() == pytest.approx(1.0, abs=1e-9) and row.min() >= 0
            assert np.isfinite(model.log_prob("a b zzz"))


@pytest.mark.parametrize(("smoothing", "k"), [("laplace", None), ("add_k", 0.25), ("add_k", None)])
def test_add_k_is_its_formula(smoothing, k):
    sentences = random_sentences(1)
    grams = counts_of(sentences, 3)
    model = NgramModel.train(sentences, 3, smoothing, k=k)
    add = {"laplace": 1.0, "add_k": k or 0.05}[smoothing]
    vocabulary = model.vocabulary
    for text in (["w0", "w3", "w1"], ["w5", "w5"], ["w2"], []):
        context = tuple(["<s>", *text][-2:])
        after = [grams[(*context, word)] for word in vocabulary]
        expected = [(c + add) / (sum(after) + add * len(vocabulary)) for c in after]
        assert model.distribution(text) == pytest.approx(expected)


def test_modified_kneser_ney_is_its_formula():
    sentences = random_sentences(2, num=150)
    order = 3
    grams = counts_of(sentences, order)
    adjusted = [Counter() for _ in range(order + 1)]
    for gram in grams:
        if len(gram) == order or gram[0] == "<s>":
            adjusted[len(gram)][gram] = grams[gram]
    for k in range(1, order):
        longer = {gram for gram in grams if len(gram) == k + 1}
        adjusted[k].update(Counter(gram[1:] for gram in longer))
    model = NgramModel.train(sentences, order, "modified_kneser_ney")
    discounts = [None]
    for k in range(1, order + 1):
        n = Counter(adjusted[k].values())
        found = [0.0]
        if all(n[r] for r in (1, 2, 3, 4)):
            found = [r - (r + 1) * n[1] / (n[1] + 2 * n[2]) * n[r + 1] / n[r] for r in (1, 2, 3)]
        discounts.append(found if min(found) > 0 else list(DEFAULT_DISCOUNTS))
    assert [list(found) for found in model.estimates] == [pytest.approx(d) for d in discounts[1:]]
    assert any(d != list(DEFAULT_DISCOUNTS) for d in discounts[1:])

    def prob(word, context):
        lower = prob(word, context[1:]) if context else 1 / len(model.vocabulary)
        k = len(context) + 1
        after = {gram: c for gram, c in adjusted[k].items() if gram[:-1] == context}
        if not after:
            return lower
        taken = {gram: discounts[k][min(c, 3) - 1] for gram, c in after.items()}
        gram = (*context, word)
        return (after.get(gram, 0) - taken.get(gram, 0) + sum(taken.values()) * lower) / sum(after.values())

    for text in (["w0", "w3"], ["w1"], [], ["w7", "w9", "w2"]):
        context = tuple(["<s>", *text][-2:])
        assert model.distribution(text) == pytest.approx([prob(word, context) for word in model.vocabulary])


def test_katz_is_its_formula():
    many = [f"w{i}" for i in range(60)]  # a long tail of rare bigrams, which Good and Turing need
    sentences = random_sentences(3, num=400, words=many)
    grams = counts_of(sentences, 2)
    model = NgramModel.train(sentences, 2, "katz")
    n = Counter(c for gram, c in grams.items() if len(gram) == 2)
    rates = model.estimates[1]
    cutoff = len(rates) - 1
    a = (cutoff + 1) * n[cutoff + 1] / n[1]
    for r in range(1, cutoff + 1):
        assert rates[r] == pytest.approx(((r + 1) * n[r + 1] / n[r] / r - a) / (1 - a))
    # The mass taken from the counts up to the cutoff is Good and Turing's n_1, that of bigrams seen once.
    freed = sum(n[r] * r * (1 - rates[r]) for r in range(1, cutoff + 1))
    assert freed == pytest.approx(n[1])
    unigrams = NgramModel.train(sentences, 1, "katz").distribution()
    for word in ("w0", "w4", "w11"):
        after = {gram[1]: c for gram, c in grams.items() if len(gram) == 2 and gram[0] == word}
        total = sum(after.values())
        seen = {w: c * (rates[c] if c <= cutoff else 1) / total for w, c in after.items()}
        assert sum(seen.values()) < 1
        index = {w: i for i, w in enumerate(model.vocabulary)}
        weight = (1 - sum(seen.values())) / (1 - sum(unigrams[index[w]] for w in seen))
        expected = [seen.get(w, weight * unigrams[i]) for w, i in index.items()]
        assert model.distribution([word]) == pytest.approx(expected)


def test_lambdas_maximise_the_likelihood_with_each_token_left_out():
    sentences = random_sentences(4, num=200)
    grams = counts_of(sentences, 1)
    total, vocab_size = sum(grams.values()), len({*grams}) + 1  # and the unknown word

    def likelihood(mix):
        return sum(c * math.log(mix * (c - 1) / (total - 1) + (1 - mix) / vocab_size) for c in grams.values())

    fitted = NgramModel.train(sentences, 1, "interpolated").estimates[0][-1]
    assert 0 < fitted < 1
    assert all(likelihood(fitted) > likelihood(fitted + step) for step in (-0.05, 0.05) if 0 < fitted + step < 1)


def test_smoothing_rewards_what_the_corpus_rewards():
    # One corpus with memory, one without: only with memory does the longer context help, whatever the smoothing.
    held = random_sentences(99, num=100)
    words = [w for s in random_sentences(5, num=400) for w in s]
    random.Random(0).shuffle(words)
    drawn = iter(words)
    shuffled = [[next(drawn) for _ in s] for s in random_sentences(5, num=400)]
    for smoothing in SMOOTHINGS:
        one, two = (NgramModel.train(random_sentences(5, num=400), k, smoothing).perplexity(*held) for k in (1, 2))
        control = NgramModel.train(shuffled, 2, smoothing).perplexity(*held)
        assert two < 0.85 * one and control > 0.97 * one, smoothing


@pytest.mark.slow
def test_wikitext_orders_the_smoothings_as_the_literature_does():
    folder = Path(os.environ.get("MODELWRIGHT_DATA", "")) / "text/wikitext2"
    if not folder.is_dir():
        pytest.skip("set MODELWRIGHT_DATA to a folder with text/wikitext2")
    train, held = (
        [line for line in gzip.open(folder / name, "rt", encoding="utf-8") if line.strip()]
        for name in ("train_part.txt.gz", "valid.txt.gz")
    )
    found = {s: NgramModel.train(train, 3, s, min_count=2).perplexity(*held) for s in SMOOTHINGS}
    assert found["modified_kneser_ney"] < found["kneser_ney"] < found["interpolated"] < found["add_k"]
    assert found["kneser_ney"] < found["katz"] < found["add_k"] < found["laplace"]
