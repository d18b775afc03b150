"""Cross-encoders: equal to transformers on pairs, deaf to padding, and learned ones put the right passage first."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from modelwright.base.errors import CheckpointError
from modelwright.models import bert
from modelwright.models.heads import Labels
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights
from modelwright.rag.rerank import CrossEncoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij"]


def write_reranker(folder, num_labels=1, seed=0):
    config = bert.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, max_seq_len=24,
        labels=Labels.numbered(num_labels),
    )  # fmt: skip
    model = bert.ARCHITECTURES["BertForSequenceClassification"](config)
    save_model(init_weights(model, seed, std=0.3), folder)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    words.save(str(folder / "tokenizer.json"))
    return model


PAIRS = [("a b", "c d e"), ("a", "a"), ("b c", "d e f g h i j"), ("a b", "c d e"), ("j", "")]


def test_scores_do_not_depend_on_neighbours_and_repeat_for_equal_pairs(tmp_path):
    write_reranker(tmp_path)
    encoder = CrossEncoder(tmp_path, dtype=torch.float32, device="cpu")
    scores = encoder.score(PAIRS)
    assert scores.shape == (5,) and scores[0] == scores[3] and ((scores > 0) & (scores < 1)).all()
    alone = np.concatenate([encoder.score([pair]) for pair in PAIRS])
    assert np.abs(scores - alone).max() < 1e-6
    assert np.ptp(scores) > 0.01
    assert encoder.pair_lengths([("a b", "c")]) == [6]


@pytest.mark.peer
def test_equal_to_transformers_with_both_kinds_of_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_reranker(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    encoder = CrossEncoder(tmp_path, dtype=torch.float32, device="cpu")
    ids, types = torch.tensor([[2, 4, 5, 3, 6, 7, 8, 3]]), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        logit = theirs(ids, token_type_ids=types).logits[0, 0]
        blind = theirs(ids).logits[0, 0]
    assert encoder.score([("a b", "c d e")])[0] == pytest.approx(float(torch.sigmoid(logit)), abs=1e-6)
    assert abs(float(logit - blind)) > 1e-3  # the control: without the second text's mark the score is another


def test_long_pairs_are_cut_at_the_longer_text(tmp_path):
    write_reranker(tmp_path)
    encoder = CrossEncoder(tmp_path, dtype=torch.float32, device="cpu")
    cut = encoder.score([("a b", "c " * 500), ("a b", "c " * (24 - 5))])
    assert cut[0] == cut[1] and encoder.pair_lengths([("a b", "c " * 500)]) == [505]


def test_a_model_that_is_no_reranker_is_refused(tmp_path):
    write_reranker(tmp_path / "three", num_labels=3)
    with pytest.raises(CheckpointError, match="with 3 labels; expected a sequence classifier with one"):
        CrossEncoder(tmp_path / "three")
    write_reranker(tmp_path / "one")
    save_model(load_model(tmp_path / "one", task="encoder"), tmp_path / "bare")
    assert json.loads((tmp_path / "bare" / "config.json").read_text())["architectures"] == ["BertModel"]
    with pytest.raises(CheckpointError, match="Give the folder of a reranker"):
        CrossEncoder(tmp_path / "bare")


def test_a_trained_one_puts_the_passage_with_the_word_first(tmp_path):
    """The query is one word; the passage that holds it is right. Beside it, a model that never trained."""
    model = write_reranker(tmp_path / "untrained")
    model.train()
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def examples(count):
        query = torch.randint(4, 14, (count, 1), generator=draw)
        passage = torch.randint(4, 14, (count, 4), generator=draw)
        passage[::2, 1] = query[::2, 0]
        cls, sep = torch.full((count, 1), 2), torch.full((count, 1), 3)
        ids = torch.cat([cls, query, sep, passage, sep], 1)
        return ids, (torch.arange(8) > 2).long().expand(count, 8), (passage == query).any(1).float()

    for _ in range(400):
        ids, types, is_right = examples(64)
        logits = model(ids, token_type_ids=types).logits[:, 0]
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(logits, is_right).backward()
        optimizer.step()
    write_reranker(tmp_path / "trained")
    save_model(model.eval(), tmp_path / "trained")
    pairs = [
        (q, f"{w[0]} {p} {w[1]} {w[2]}")
        for q in "abcdefghij"
        for w in ("hgf", "cba")
        for p in (q, "e" if q != "e" else "j")
    ]
    pairs = [pair for pair in pairs if pair[0] not in pair[1].split()[0::2] or pair[1].split()[1] == pair[0]]
    is_right = np.array([query in passage.split() for query, passage in pairs])

    def accuracy(folder):
        return ((CrossEncoder(tmp_path / folder, dtype=torch.float32).score(pairs) > 0.5) == is_right).mean()

    assert accuracy("trained") >= 0.9 > 0.75 > accuracy("untrained")
