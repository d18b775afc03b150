"""N-grams over ids (Kneser-Ney against a dictionary twin) and over words: scores, perplexity, refusals."""

import gzip
import math
import os
import random
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

import modelwright as mw
from modelwright.base.errors import ConfigError, DataError
from modelwright.models import SMOOTHINGS
from modelwright.models.ngram import NgramModel
from modelwright.models.ngram_smoothing import DEFAULT_DISCOUNT

BOUNDARY = "boundary"
NOVEL = ["the cat sat on the mat", "the dog sat", "a cat ran", "the dog ran to the mat", "a dog sat on a mat"]


def train_ids(documents, order, vocab_size, smoothing="kneser_ney", bos_id=None):
    return NgramModel.train(documents, order, smoothing, vocab_size=vocab_size, bos_id=bos_id)


class SlowKneserNey:
    """The same model in dictionaries, written from the formula alone."""

    def __init__(self, documents, order, vocab_size, bos_id=None):
        self.order, self.vocab_size = order, vocab_size
        self.bos = BOUNDARY if bos_id is None else bos_id
        self.counts = [Counter() for _ in range(order + 1)]
        lefts = [defaultdict(set) for _ in range(order + 1)]
        for number, document in enumerate(documents):
            stream = [self.bos, *document]
            for i in range(1, len(stream)):
                for k in range(1, order + 1):
                    if i - k + 1 < 0:
                        continue
                    gram = tuple(stream[i - k + 1 : i + 1])
                    if k == order:
                        self.counts[k][gram] += 1
                    else:
                        # A k-gram at the very start has nothing before it: each occurrence is its own.
                        left = stream[i - k] if i - k >= 0 else ("start", number)
                        lefts[k][gram].add(left)
        for k in range(1, order):
            self.counts[k] = Counter({gram: len(seen) for gram, seen in lefts[k].items()})
        self.discounts = [0.0]
        for k in range(1, order + 1):
            once, twice = (sum(c == r for c in self.counts[k].values()) for r in (1, 2))
            self.discounts.append(once / (once + 2 * twice) if once and twice else DEFAULT_DISCOUNT)

    def prob(self, word, context):
        if len(context) > self.order - 1:
            context = context[len(context) - self.order + 1 :]
        return self._prob(word, tuple(context), len(context) + 1)

    def _prob(self, word, context, k):
        if k == 0:
            return 1 / self.vocab_size
        lower = self._prob(word, context[1:], k - 1)
        after = [c for gram, c in self.counts[k].items() if gram[:-1] == context]
        if not after:
            return lower
        discount = self.discounts[k]
        kept = max(self.counts[k][(*context, word)] - discount, 0)
        return (kept + discount * len(after) * lower) / sum(after)

    def log_probs(self, ids):
        stream = [self.bos, *ids]
        return [math.log(self.prob(stream[i], stream[:i])) for i in range(1, len(stream))]


def random_documents(seed, vocab_size, num=12):
    draw = random.Random(seed)
    # Skewed draws, so that n-grams repeat and every level has counts of one, two and more.
    return [[int(vocab_size * draw.random() ** 2) for _ in range(draw.randint(0, 30))] for _ in range(num)] + [[0, 1]]


def test_bigram_computed_by_hand():
    # Documents "0 1" and "0 0 1" with boundary b: bigrams b0 x2, 01 x2, 00 x1. n1 = 1, n2 = 2: D2 = 1 / 5.
    # Distinct tokens before 0: {b, 0} = 2; before 1: {0} = 1; n1 = 1, n2 = 1: D1 = 1 / 3, total 3.
    model = train_ids([[0, 1], [0, 0, 1]], 2, 3)
    assert [found[0] for found in model.estimates] == pytest.approx([1 / 3, 1 / 5])
    uniform = (1 / 3) * 2 / 3 * (1 / 3)
    p0, p1 = (2 - 1 / 3) / 3 + uniform, (1 - 1 / 3) / 3 + uniform
    assert model.distribution([1]) == pytest.approx([p0, p1, uniform])  # nothing follows 1: the unigram level
    after_0 = [(1 - 0.2) / 3 + 0.2 * 2 / 3 * p0, (2 - 0.2) / 3 + 0.2 * 2 / 3 * p1, 0.2 * 2 / 3 * uniform]
    assert model.distribution([0]) == pytest.approx(after_0)
    after_boundary = [(2 - 0.2) / 2 + 0.2 * 1 / 2 * p0, 0.2 * 1 / 2 * p1, 0.2 * 1 / 2 * uniform]
    assert model.distribution() == pytest.approx(after_boundary)
    assert model.num_ngrams == (2, 3)


def test_kneser_ney_prefers_tokens_with_many_neighbours():
    # "Francisco" (1) is frequent but only ever after "San" (0); in a new context 2, seen after many, is likelier.
    documents = [[0, 1]] * 10 + [[4, 2], [5, 2], [6, 2], [7, 2]]
    after_new = train_ids(documents, order=2, vocab_size=9).distribution([8])
    assert after_new[2] > after_new[1]
    unigram = train_ids(documents, order=1, vocab_size=9).distribution()
    assert unigram[1] > unigram[2]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("bos_id", [None, 0])
def test_equals_the_dictionary_twin(order, bos_id):
    documents = random_documents(order, vocab_size=6)
    fast = train_ids(documents, order, 6, bos_id=bos_id)
    slow = SlowKneserNey(documents, order, 6, bos_id=bos_id)
    assert [found[0] for found in fast.estimates] == pytest.approx(slow.discounts[1:])
    for ids in random_documents(99, vocab_size=6, num=4):
        assert fast.log_probs(ids) == pytest.approx(slow.log_probs(ids))


@pytest.mark.parametrize("vocab_size", [5, 4096, 300_000])
@pytest.mark.parametrize("order", [1, 3, 5])
def test_probabilities_sum_to_one(vocab_size, order):
    documents = random_documents(3, vocab_size)
    model = train_ids(documents, order, vocab_size)
    seen = documents[0][:7]
    for context in ([], seen, [vocab_size - 1] * 6, [*seen, vocab_size - 1], random_documents(8, vocab_size)[0]):
        row = model.distribution(context)
        assert row.shape == (vocab_size,)
        assert row.sum() == pytest.approx(1.0, abs=1e-9)
        assert row.min() > 0


def test_large_vocabulary_gives_the_same_probabilities_as_a_small_one():
    documents = random_documents(4, vocab_size=6)
    spread = [[100_000 + 17_000 * token for token in ids] for ids in documents]
    slow = SlowKneserNey(spread, 4, 250_000)
    fast = train_ids(spread, 4, 250_000)
    assert fast.log_probs(spread[0]) == pytest.approx(slow.log_probs(spread[0]))


def test_log_probs_are_the_distribution_read_token_by_token():
    documents = random_documents(5, vocab_size=7)
    model = train_ids(documents, 4, 7)
    ids = [3, 0, 0, 1, 6, 2]
    expected = [math.log(model.distribution(ids[:i])[token]) for i, token in enumerate(ids)]
    assert model.log_probs(ids) == pytest.approx(expected)
    assert model.log_probs([]).shape == (0,)


def test_no_ngram_spans_two_documents():
    apart = train_ids([[0, 1], [2, 3]], 2, 4)
    joined = train_ids([[0, 1, 2, 3]], 2, 4)
    assert apart.distribution([1])[2] == apart.distribution([3])[2]
    assert joined.distribution([1])[2] > joined.distribution([3])[2]


def test_bits_per_byte_sums_over_documents():
    documents = random_documents(6, vocab_size=6)
    model = train_ids(documents, 3, 6)
    nats = -sum(model.log_probs(ids).sum() for ids in documents)
    assert model.bits_per_byte(documents, 50) == pytest.approx(nats / math.log(2) / 50)


def test_order_beyond_every_document():
    model = train_ids([[0, 1], [1]], order=7, vocab_size=2)
    assert model.order == 7
    assert model.distribution([0, 1]).sum() == pytest.approx(1.0)


def test_refusals_name_the_value():
    with pytest.raises(ConfigError, match="smoothing is 'witten_bell'; known: add_k, interpolated, katz, kneser_ney"):
        train_ids([[0]], 2, 4, smoothing="witten_bell")
    with pytest.raises(ConfigError, match="order is 0"):
        train_ids([[0]], 0, 4)
    with pytest.raises(ConfigError, match="bos_id is 4"):
        train_ids([[0]], 2, 4, bos_id=4)
    with pytest.raises(DataError, match="2 documents hold no tokens"):
        train_ids([[], []], 2, 4)
    with pytest.raises(DataError, match="Token id 9 is outside the vocabulary of 4"):
        train_ids([[0, 9]], 2, 4)
    with pytest.raises(DataError, match="Token id 4"):
        train_ids([[0]], 2, 4).log_probs([4])
    with pytest.raises(DataError, match="num_bytes is 0"):
        train_ids([[0]], 2, 4).bits_per_byte([[0]], 0)


def test_longer_context_helps_on_real_text_and_not_on_shuffled_text():
    place = Path(os.environ.get("MODELWRIGHT_DATA", "")) / "text/tinyshakespeare.txt.gz"
    if not place.is_file():
        pytest.skip("set MODELWRIGHT_DATA to a folder with text/tinyshakespeare.txt.gz")
    data = np.frombuffer(gzip.decompress(place.read_bytes()), np.uint8)[:300_000].astype(np.int64)
    train, held_out = data[:270_000], data[270_000:]
    begin = time.perf_counter()
    bits = [train_ids([train], k, 256).bits_per_byte([held_out], len(held_out)) for k in (1, 3, 5)]
    assert time.perf_counter() - begin < 20  # about 0.5 s on an idle machine
    assert bits[0] > bits[1] > bits[2] and bits[2] < 2.6
    shuffled = np.random.default_rng(0).permutation(train)
    control = train_ids([shuffled], 5, 256).bits_per_byte([held_out], len(held_out))
    assert control > bits[0] - 0.01


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_sentences_end_and_unknown_words_have_a_probability(smoothing):
    model = NgramModel.train(NOVEL, 3, smoothing)
    assert model.vocabulary is not None and model.vocabulary[:2] == ["<unk>", "</s>"] and "<s>" not in model.vocabulary
    scores = model.log_probs("the cat sat")
    assert len(scores) == 4  # three words and the end
    assert model.log_prob(["the", "cat", "sat"]) == pytest.approx(scores.sum())
    assert model.log_prob("the cat sat", end=False) == pytest.approx(scores[:3].sum())
    context = ["the", "cat", "sat"]
    steps = [model.distribution(context[:i])[model.vocabulary.index(w)] for i, w in enumerate([*context, "</s>"])]
    assert np.exp(scores) == pytest.approx(steps)
    unknown = model.log_probs("the platypus sat")
    assert np.isfinite(unknown).all() and unknown[1] == pytest.approx(model.log_probs("the <unk> sat")[1])
    assert model.perplexity("the cat sat") == pytest.approx(math.exp(-scores.mean()))
    both = [*scores, *model.log_probs("a dog")]
    assert model.perplexity("the cat sat", ["a", "dog"]) == pytest.approx(math.exp(-np.mean(both)))


def test_words_lists_and_numbers_are_the_same_text():
    split = NgramModel.train([text.split() for text in NOVEL], 3)
    assert split.log_prob("the cat ran") == NgramModel.train(NOVEL, 3).log_prob(["the", "cat", "ran"])
    numbers = NgramModel.train([[10, 20, 10], [20, 10]], 2)
    assert numbers.log_prob([10, 20]) == numbers.log_prob("10 20")


def test_a_string_holds_a_sentence_on_each_line():
    joined, apart = NgramModel.train(["\n\n".join(NOVEL)], 3), NgramModel.train(NOVEL, 3)
    assert joined.log_prob("the cat ran") == apart.log_prob("the cat ran")
    assert apart.perplexity("\n".join(NOVEL)) == pytest.approx(apart.perplexity(*NOVEL))


def test_rare_words_are_counted_as_unknown():
    model = NgramModel.train(["a a b", "a b c", "d"], 2, "laplace", min_count=2)
    assert model.vocabulary == ["<unk>", "</s>", "a", "b"]
    assert model.log_prob("c") == model.log_prob("d") > NgramModel.train(["a a b", "a b"], 2, "laplace").log_prob("c")


def test_sentences_drawn_from_a_model_are_its_own():
    model = NgramModel.train(["a b c d"] * 20, 3)
    drawn = [model.generate(seed) for seed in range(10)]
    assert drawn == [model.generate(seed) for seed in range(10)]
    assert sum(sentence == ["a", "b", "c", "d"] for sentence in drawn) >= 5
    assert all(len(model.generate(seed, max_tokens=2)) <= 2 for seed in range(5))


def test_the_public_name():
    assert mw.NgramModel is NgramModel


def test_refusals_over_words():
    with pytest.raises(DataError, match="texts is one string"):
        NgramModel.train("a b")
    with pytest.raises(DataError, match="'</s>', which marks a sentence's boundary"):
        NgramModel.train(["a </s> b"])
    with pytest.raises(DataError, match="1 documents hold no tokens"):
        NgramModel.train(["  "])
    with pytest.raises(ConfigError, match=r"k is 0\.1 with smoothing 'katz'"):
        NgramModel.train(["a"], 2, "katz", k=0.1)
    with pytest.raises(ConfigError, match="min_count is 0"):
        NgramModel.train(["a"], 2, min_count=0)
    with pytest.raises(ConfigError, match="bos_id is 1; expected None"):
        NgramModel.train(["a"], 2, bos_id=1)
    with pytest.raises(DataError, match="no tokens; perplexity needs"):
        NgramModel.train(["a"], 2).perplexity()
    ids = NgramModel.train([[0, 1]], 2, vocab_size=2)
    with pytest.raises(ConfigError, match="trained over token ids"):
        ids.save_arpa("never.arpa")
    with pytest.raises(ConfigError, match="trained over token ids"):
        ids.generate(0)
    with pytest.raises(DataError, match="is a string, but this model is over token ids"):
        ids.log_prob("0 1")
