"""Word vectors: gradients against autograd, planted analogies with shuffled text as the control, files."""

import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modelwright.base.errors import ConfigError, DataError
from modelwright.models import glove, word2vec
from modelwright.models.glove import GloveConfig, count_neighbours, train_glove
from modelwright.models.word2vec import Word2VecConfig, train_word2vec
from modelwright.models.word_vectors import WordVectors, count_words

NUM_THINGS = 6
LEARNERS = {
    "skipgram": lambda text: train_word2vec(
        text, Word2VecConfig(size=24, window=4, min_count=1, subsample=None, learning_rate=0.05, batch_size=64)
    ),
    "cbow": lambda text: train_word2vec(
        text,
        Word2VecConfig("cbow", size=24, window=4, min_count=1, subsample=None, learning_rate=0.05, batch_size=64),
    ),
    "glove": lambda text: train_glove(
        text, GloveConfig(size=16, window=4, min_count=1, x_max=50, num_epochs=40, batch_size=64)
    ),
}


def planted(seed, num=1500, *, is_shuffled=False):
    """Sentences about a thing in one of two roles: its name in that role, words of the thing, words of the role.

    A fifth of the words is noise: GloVe learns from pairs it has seen, so what does not belong together must be seen.
    """
    draw = random.Random(seed)
    sentences = []
    for _ in range(num):
        thing, role = draw.randrange(NUM_THINGS), draw.randrange(2)
        words = [f"name{thing}{role}", *(f"thing{thing}{draw.randrange(3)}" for _ in range(2))]
        words += [f"role{role}{draw.randrange(3)}" for _ in range(2)]
        draw.shuffle(words)
        noise = [f"thing{draw.randrange(NUM_THINGS)}{draw.randrange(3)}", f"role{draw.randrange(2)}{draw.randrange(3)}"]
        sentences.append([draw.choice(noise) if draw.random() < 0.2 else word for word in words])
    if is_shuffled:
        tokens = [word for sentence in sentences for word in sentence]
        draw.shuffle(tokens)
        sentences = [tokens[i : i + 5] for i in range(0, len(tokens), 5)]
    return sentences


def analogy_accuracy(vectors):
    pairs = [(i, j) for i in range(NUM_THINGS) for j in range(NUM_THINGS) if i != j]
    found = [vectors.analogy(f"name{j}0", f"name{j}1", f"name{i}0", 1)[0][0] == f"name{i}1" for i, j in pairs]
    return np.mean(found)


@pytest.mark.parametrize("learner", LEARNERS)
def test_planted_analogies_are_found_and_not_in_shuffled_text(learner):
    vectors = LEARNERS[learner](planted(0))
    assert vectors.losses[-1] < vectors.losses[0]
    assert analogy_accuracy(vectors) >= 0.8
    control = LEARNERS[learner](planted(0, is_shuffled=True))
    assert analogy_accuracy(control) <= 0.2
    near = [name[:4] for name, _ in vectors.nearest("role00", 2)]
    assert near == ["role", "role"]


def test_a_seed_gives_the_same_vectors():
    for learner in LEARNERS.values():
        a, b = learner(planted(1, 200)), learner(planted(1, 200))
        assert np.array_equal(a.vectors, b.vectors)


@pytest.mark.parametrize("algorithm", ["skipgram", "cbow"])
def test_a_step_of_word2vec_follows_the_gradient_of_its_loss(algorithm):
    torch.manual_seed(0)
    v, u = torch.randn(7, 5), torch.randn(7, 5)
    inputs = torch.tensor([[1], [1], [4]]) if algorithm == "skipgram" else torch.tensor([[1, 2], [1, -1], [4, 4]])
    targets, negatives = torch.tensor([2, 3, 2]), torch.tensor([[0, 5], [3, -1], [6, 6]])
    negatives[1, 0] = -1  # the target itself was drawn
    leaf_v, leaf_u = v.clone().requires_grad_(), u.clone().requires_grad_()
    loss = torch.zeros(())
    for row, target, drawn in zip(inputs.tolist(), targets.tolist(), negatives.tolist(), strict=True):
        near = [leaf_v[i] for i in row if i >= 0]
        mean = torch.stack(near).mean(0)
        # The value of the mean with the gradient of the sum: each neighbour gets the whole of it, as in word2vec.c.
        h = torch.stack(near).sum(0) + (mean - torch.stack(near).sum(0)).detach()
        loss = loss - F.logsigmoid(leaf_u[target] @ h)
        loss = loss - sum(F.logsigmoid(-(leaf_u[n] @ h)) for n in drawn if n >= 0)
    loss.backward()
    before_v, before_u = v.clone(), u.clone()
    assert word2vec._update(v, u, inputs, targets, negatives, 0.1) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert torch.allclose(before_v - v, 0.1 * leaf_v.grad, atol=1e-6)
    assert torch.allclose(before_u - u, 0.1 * leaf_u.grad, atol=1e-6)


def test_the_first_step_of_glove_follows_the_gradient_of_its_loss():
    torch.manual_seed(0)
    sides = [torch.randn(6, 4), torch.randn(6, 4)]
    i, j = torch.tensor([0, 3, 5]), torch.tensor([1, 2, 4])
    weight, wanted = torch.rand(3), torch.randn(3)
    w, v = (side.clone().requires_grad_() for side in sides)
    loss = (weight * ((w[i, :-1] * v[j, :-1]).sum(1) + w[i, -1] + v[j, -1] - wanted) ** 2).sum()
    loss.backward()
    before = [side.clone() for side in sides]
    squares = [torch.ones(6, 4), torch.ones(6, 4)]
    assert glove._update(sides, squares, (i, j), weight, wanted, 0.1) == pytest.approx(float(loss.detach()))
    for side, old, leaf, square in zip(sides, before, (w, v), squares, strict=True):
        assert torch.allclose(old - side, 0.1 * leaf.grad, atol=1e-6)
        assert torch.allclose(square, 1 + leaf.grad**2, rtol=1e-5)


def test_neighbours_are_counted_by_distance_within_a_sentence():
    words, _, tokens, places = count_words(["a b a", "c a"], 1)
    i, j, x = count_neighbours(tokens, places, 3, window=2)
    found = {(words[a], words[b]): value for a, b, value in zip(i, j, x, strict=True)}
    assert found == {("a", "a"): 1.0, ("a", "b"): 2.0, ("b", "a"): 2.0, ("a", "c"): 1.0, ("c", "a"): 1.0}


def test_examples_stay_in_their_sentence_and_window():
    words, _, tokens, places = count_words(["a b c d", "e f"], 1)
    draw = np.random.default_rng(0)
    for algorithm in ("skipgram", "cbow"):
        config = Word2VecConfig(algorithm, window=2, min_count=1)
        seen = set()
        for _ in range(20):
            inputs, targets = word2vec._examples(tokens, places, config, draw)
            seen |= {
                (words[i], words[t])
                for row, t in zip(inputs.tolist(), targets.tolist(), strict=True)
                for i in row
                if i >= 0
            }
        expected = {(a, b) for s in ("abcd", "ef") for a in s for b in s if a != b and abs(ord(a) - ord(b)) <= 2}
        assert seen == expected


def test_negatives_follow_the_power_of_the_counts():
    share = np.array([0.7, 0.2, 0.1])
    noise = torch.from_numpy(np.cumsum(share**0.75) / np.sum(share**0.75))
    config = Word2VecConfig(num_negatives=50)
    drawn = word2vec._negatives(noise, torch.full((2000,), 2), config, torch.Generator().manual_seed(0))
    assert (drawn == 2).sum() == 0 and (drawn == -1).any()
    counts = torch.bincount(drawn.masked_fill(drawn < 0, 2).flatten()) / drawn.numel()
    assert np.allclose(counts.numpy(), share**0.75 / np.sum(share**0.75), atol=0.01)


def test_files_are_the_format_of_word2vec(tmp_path):
    vectors = WordVectors(["a", "bé"], np.array([[0.1, -2.5e-7], [3.0, 4.0]]))
    vectors.save(tmp_path / "v.txt")
    assert (tmp_path / "v.txt").read_text(encoding="utf-8").splitlines()[0] == "2 2"
    back = WordVectors.load(tmp_path / "v.txt")
    assert back.words == vectors.words and np.array_equal(back.vectors, vectors.vectors)
    (tmp_path / "glove.txt").write_text("a 1 2\nb 3 4\n")  # without a first line
    assert WordVectors.load(tmp_path / "glove.txt")["b"].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 2\na 1 2\n", r"holds 1 vectors, its first line says \(2, 2\)"),
        ("2 2\na 1 2\nb 1\n", r"line 3: expected a word and 2 numbers, found 'b 1'"),
        ("1 2\na 1 x\n", r"line 2: expected a word and 2 numbers"),
        ("1 2\na 1 nan\n", r"line 2"),
        ("2 1\na 1\na 2\n", r"A word stands twice"),
        ("", r"holds 0 vectors"),
    ],
)
def test_damaged_files_are_refused(text, message, tmp_path):
    (tmp_path / "bad.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        WordVectors.load(tmp_path / "bad.txt")


def test_refusals(tmp_path):
    vectors = WordVectors(["a b", "c"], np.eye(2))
    with pytest.raises(DataError, match="'a b' is empty or holds white space"):
        vectors.save(tmp_path / "never.txt")
    with pytest.raises(DataError, match="'dog' has no vector; there are 2 words"):
        vectors.nearest("dog")
    with pytest.raises(DataError, match="expected a row a word"):
        WordVectors(["a"], np.eye(2))
    with pytest.raises(ConfigError, match="algorithm is 'sg'; known: skipgram, cbow"):
        Word2VecConfig("sg")
    with pytest.raises(ConfigError, match="x_max is 0"):
        GloveConfig(x_max=0)
    with pytest.raises(DataError, match="1 words occur 2 times or more"):
        train_word2vec(["a a b"], Word2VecConfig(min_count=2))
    with pytest.raises(DataError, match="sentences is one string"):
        train_glove("a b c")
    with pytest.raises(DataError, match="No two words stand in one sentence"):
        train_glove(["a", "b"], GloveConfig(min_count=1))
