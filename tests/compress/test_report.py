"""The comparison of two models: its figures against their definitions, and its negative control."""

import copy
import math

import pytest
import torch

from modelwright.base.errors import ConfigError, DataError
from modelwright.compress import report
from modelwright.compress.report import compare, tensor_bytes
from modelwright.models.llama import Llama, LlamaConfig


def llama(seed, vocab_size=50):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_layers=1, max_seq_len=64)
    return Llama(config).eval()


ROWS = torch.arange(60).view(5, 12) % 50


@torch.no_grad()
def test_figures_are_their_definitions():
    one, two = llama(0), llama(1)
    p, q = (m(ROWS).logits[:, :-1].double().log_softmax(-1).flatten(0, 1) for m in (one, two))
    targets = ROWS[:, 1:].flatten()
    figures = compare(one, two, ROWS)
    before, after = (-x[torch.arange(len(targets)), targets].mean().item() for x in (p, q))
    assert figures["original_perplexity"] == pytest.approx(math.exp(before), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(after), rel=1e-5)
    assert figures["perplexity_ratio"] == pytest.approx(math.exp(after - before), rel=1e-5)
    assert figures["kl_divergence"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert figures["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert figures["num_tokens"] == 55


def test_a_model_agrees_with_itself():
    model = llama(0)
    figures = compare(model, copy.deepcopy(model), ROWS)
    assert figures["perplexity_ratio"] == 1.0 and figures["top1_agreement"] == 1.0
    assert figures["kl_divergence"] == pytest.approx(0, abs=1e-7)
    assert figures["size_bytes"] == figures["original_size_bytes"]


def test_chunks_and_batches_do_not_change_the_figures(monkeypatch):
    one, two = llama(0), llama(1)
    whole = compare(one, two, ROWS)
    monkeypatch.setattr(report, "MAX_CHUNK_BYTES", 4 * 50 * 7)
    monkeypatch.setattr(report, "MAX_BATCH_TOKENS", 24)
    assert compare(one, two, ROWS) == pytest.approx(whole, rel=1e-5)
    ragged = [ROWS[0].tolist(), *[row.tolist() for row in ROWS[1:]], [3]]
    assert compare(one, two, ragged) == pytest.approx(whole, rel=1e-5)


def test_the_mode_of_the_models_is_kept():
    one, two = llama(0).train(), llama(1)
    compare(one, two, ROWS)
    assert one.training and not two.training


def test_a_tied_tensor_is_counted_once():
    sizes = {}
    for tie in (True, False):
        config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_layers=1, tie_embeddings=tie)
        sizes[tie] = tensor_bytes(Llama(config))
    assert sizes[False] - sizes[True] == 50 * 32 * 4


def test_refusals():
    with pytest.raises(ConfigError, match="50 and 60 tokens"):
        compare(llama(0), llama(0, 60), ROWS)
    with pytest.raises(DataError, match="No row holds two tokens"):
        compare(llama(0), llama(1), [[1], []])
