"""A middle at the end holds the same tokens in a known order; a prefix is seen whole and not trained on."""

import numpy as np
import pytest
from tests.conftest import Toy

from modelwright.base.errors import ConfigError
from modelwright.data.infill import FimConfig, FimTokens, fill_in_middle, prefix_batch
from modelwright.data.pack import IGNORED, Rows
from modelwright.tokenizer.formats import load_tokenizer

TOKENS = FimTokens(100, 101, 102, 103)


def parts_of(row):
    """Return (prefix, middle, suffix) of a document in either order."""
    row = row.tolist()
    assert row[-1] == 103
    if row[:2] == [100, 101]:  # SPM: the prefix and the middle stand together behind the middle token
        middle = row.index(102)
        return "spm", row[middle + 1 : -1], row[2:middle]
    suffix, middle = row.index(101), row.index(102)
    return "psm", row[1:suffix] + row[middle + 1 : -1], row[suffix + 1 : middle]


def test_both_orders_hold_the_document():
    ids, kinds = np.arange(30), []
    for seed in range(400):
        kind, start, suffix = parts_of(fill_in_middle(ids, TOKENS, FimConfig(1.0, 0.5), np.random.default_rng(seed)))
        assert start + suffix == ids.tolist()
        kinds.append(kind)
    assert 0.4 < kinds.count("spm") / 400 < 0.6


def test_the_rate_says_how_many_documents_are_cut():
    ids = np.arange(30)
    cut = [len(fill_in_middle(ids, TOKENS, FimConfig(0.5), np.random.default_rng(s))) > 30 for s in range(1000)]
    assert 0.45 < np.mean(cut) < 0.55
    assert (fill_in_middle(ids, TOKENS, FimConfig(0.0), np.random.default_rng(0)) == ids).all()


def test_tokenizers_without_the_tokens_are_refused_and_with_them_read(toy: Toy):
    plain = load_tokenizer(toy.tokenizer)
    with pytest.raises(ConfigError, match=r"no tokens to fill in the middle with; known: <\|fim_prefix\|>"):
        FimTokens.find(plain)
    found = FimTokens.find(plain.with_tokens(["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]))
    assert (found.prefix, found.end) == (plain.vocab_size, plain.eos_id)


def test_a_prefix_is_seen_whole_and_not_trained_on():
    rows = Rows(np.arange(80).reshape(4, 20), np.arange(1, 81).reshape(4, 20))
    batch = prefix_batch(rows, np.random.default_rng(0))
    for labels, mask in zip(batch.labels.numpy(), batch.mask[:, 0].numpy(), strict=True):
        first = int(np.flatnonzero(labels != IGNORED)[0])  # the last token of the prefix
        assert (labels[first:] != IGNORED).all()
        assert mask[: first + 1, : first + 1].all()
        assert not np.triu(mask[first + 1 :, first + 1 :], 1).any()
        assert not mask[: first + 1, first + 1 :].any()  # the prefix sees nothing of what is to be written
