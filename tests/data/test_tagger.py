"""The tagger run by NumPy is the network that was trained; it learns names beyond its lists, and not from chance."""

import random
import time

import numpy as np
import pytest
import torch

from modelwright.base.errors import DataError
from modelwright.data import tagger as tagging
from modelwright.data import tagger_training as training
from modelwright.data.personal_data import TAGGED, Finding
from modelwright.data.tagger import LABELS, MAX_FEATURES, Tagger, features, load_tagger, read_labels, split_words
from modelwright.data.tagger_text import Maker
from modelwright.data.tagger_training import TaggerConfig, train_tagger

SMALL = TaggerConfig(
    num_texts=500, num_plain=0, hidden_size=24, num_epochs=4, batch_words=512, learning_rate=8e-3, lean=-1.0
)


def recall(tagger, texts):
    """The share of labelled names that is found with exact edges and kind."""
    found = [(set(tagger.find(t.text)), set(t.spans)) for t in texts]
    return sum(len(a & b) for a, b in found) / sum(len(b) for _, b in found)


@pytest.fixture(scope="module")
def small():
    return train_tagger(SMALL)


def test_it_learns_and_with_shuffled_labels_it_does_not(small):
    unseen = list(Maker(99, made_fraction=1.0).texts(150))
    assert recall(small, unseen) > 0.1
    assert recall(train_tagger(SMALL, labels_seed=0), unseen) < 0.02


def test_numpy_runs_the_network_that_torch_trained(monkeypatch):
    kept = []
    fit = training._fit
    monkeypatch.setattr(training, "_fit", lambda *given: kept.append(fit(*given)) or kept[-1])
    tagger = train_tagger(TaggerConfig(num_texts=60, num_plain=0, hidden_size=16, num_epochs=1, lean=0.0))
    words = "Dear Anna , the parcel for O ' Neill goes to 12 Mill Lane \n in Porto".split(" ")
    rows = np.zeros((len(words), MAX_FEATURES), dtype=np.int64)
    for i, word in enumerate(words):
        found = features(word, tagger.common)
        rows[i, : len(found)] = found
    with torch.no_grad():
        wanted = kept[0](torch.from_numpy(rows)).numpy()
    assert np.allclose(tagger.scores(words), wanted, atol=1e-4)


def test_the_same_seed_trains_the_same_tagger():
    config = TaggerConfig(num_texts=40, num_plain=0, hidden_size=16, num_epochs=1)
    one, two = train_tagger(config), train_tagger(config)
    assert all(np.array_equal(one.weights[name], two.weights[name]) for name in one.weights)


def test_saved_and_read_it_finds_the_same(small, tmp_path):
    small.save(tmp_path / "tagger.safetensors")
    again = Tagger.load(tmp_path / "tagger.safetensors")
    texts = [t.text for t in Maker(5).texts(40)]
    same = sum(again.find(text) == small.find(text) for text in texts)
    assert same >= 38  # bytes and half precision change a score near a tie


def test_labels_do_not_depend_on_where_a_long_text_is_cut(small, monkeypatch):
    words = [w for t in Maker(6).texts(60) for w in t.text.split()]
    whole = small.scores(words)
    monkeypatch.setattr(tagging, "PIECE", 64)
    assert np.allclose(small.scores(words), whole, atol=1e-4)


def test_a_text_in_stretches_gives_the_spans_of_the_whole(small, monkeypatch):
    text = " ".join(t.text for t in Maker(8).texts(80))
    whole = small.find(text)
    monkeypatch.setattr(tagging, "STRETCH", 2000)
    parts = small.find(text)
    assert len(text) > 5000 and len(set(whole) & set(parts)) > 0.9 * len(whole)
    monkeypatch.setattr(tagging, "STRETCH", 3)
    assert small.find("x" * 50) is not None  # nowhere to cut


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("My name is Ottoline Vanterpool and I live in Wexbury.", {"Vanterpool": "person", "Wexbury": "location"}),
        ("Please send it to 48 Larkspur Lane, Dunmore, OH 44101.", {"48 Larkspur Lane": "street_address"}),
        ("She works at Quillhaven Logistics Ltd in Norway.", {"Quillhaven": "organization", "Norway": "location"}),
    ],
)
def test_the_shipped_tagger_finds_names_that_are_in_no_list(text, wanted):
    found = {text[f.start : f.end]: f.kind for f in load_tagger().find(text)}
    for value, kind in wanted.items():
        assert [k for v, k in found.items() if value in v] == [kind], found


@pytest.mark.parametrize("text", ["", " \n\n ", "the river is wide and the night is long", "x = f(a, b)[0] + 1", "???"])
def test_the_shipped_tagger_leaves_plain_text(text):
    assert load_tagger().find(text) == []


def test_made_texts_have_exact_spans_and_follow_the_seed():
    texts = list(Maker(3).texts(200))
    assert texts == list(Maker(3).texts(200)) != list(Maker(4).texts(200))
    for made in texts:
        assert all(f.kind in TAGGED and made.text[f.start : f.end].strip() for f in made.spans)
        words = split_words(made.text)
        labels = read_labels(len(words), made.spans, words)
        assert sum(LABELS[i][0] == "B" for i in labels) == len(made.spans)


def test_words_hold_every_sign_once():
    text = "O'Neill paid $5,\n\n  then_left\u00e9"
    spans = split_words(text)
    assert "".join(text[a:b] for a, b in spans).replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(
        " ", ""
    )
    assert read_labels(3, [Finding(2, 7, "person")], [(0, 1), (2, 4), (5, 7)]).tolist() == [
        0,
        LABELS.index("B-person"),
        LABELS.index("I-person"),
    ]


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(DataError, match="cannot be read as a tagger"):
        Tagger.load(tmp_path / "bad.safetensors")
    with pytest.raises(DataError, match="is no tagger"):
        Tagger({"table": np.zeros((2, 2), np.float32)})


def test_time_grows_with_the_length_alone():
    tagger, dice = load_tagger(), random.Random(0)

    def seconds(num_chars):
        text = "".join(dice.choices("abcdefghij ABC,.\n0123", k=num_chars))
        begun = time.perf_counter()
        tagger.find(text)
        return time.perf_counter() - begun

    seconds(1000)
    assert seconds(80_000) < 40 * max(seconds(10_000), 0.01)  # quadratic work would take 64 times as long
    assert tagger.find("a" * 100_000) is not None
