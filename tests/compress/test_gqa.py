"""Fewer key/value heads: the arithmetic, the refusals, and what a short up-training brings back."""

import argparse
import inspect

import pytest
import torch
import torch.nn.functional as F

from modelwright.base.errors import ConfigError
from modelwright.compress.gqa import share_heads
from modelwright.compress.rtn import quantize_model
from modelwright.compress.surgery import measure_cost
from modelwright.models.bert import Bert, BertConfig
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.mamba import Mamba, MambaConfig
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights

CONFIG = LlamaConfig(
    vocab_size=31,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=8,
    head_dim=4,
    max_seq_len=64,
    family="qwen2",
    attention_bias=True,
)


def llama(**changes) -> Llama:
    model = init_weights(Llama(CONFIG), seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    return model.eval()


def test_consecutive_heads_are_averaged_and_nothing_else_changes():
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shared = share_heads(model, 2)
    assert shared.config.num_kv_heads == 2 and not shared.training
    for name, tensor in shared.state_dict().items():
        if ".attention.k." in name or ".attention.v." in name:
            heads = before[name].view(8, 4, -1)
            expected = torch.cat([heads[:4].mean(0), heads[4:].mean(0)])
            assert torch.allclose(tensor.view(8, -1), expected, atol=1e-6)
        else:
            assert torch.equal(tensor, before[name])
    with torch.no_grad():
        next(shared.parameters()).zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_heads_that_are_alike_within_their_groups_lose_nothing(tmp_path):
    """The identity: a grouped model spelled out as a multi-head one is itself again."""
    grouped = share_heads(llama(), 2)
    state = {
        name: t.view(2, 1, 4, *t.shape[1:]).expand(-1, 4, -1, *t.shape[1:]).reshape(32, *t.shape[1:])
        if ".attention.k." in name or ".attention.v." in name
        else t
        for name, t in grouped.state_dict().items()
    }
    spelled = Llama(CONFIG).eval()
    spelled.load_state_dict(state)
    again = share_heads(spelled, 2)
    cost = measure_cost(spelled, again, torch.arange(60).remainder(31).view(2, 30))
    assert cost.max_logit_difference < 1e-5 and cost.perplexity_after == pytest.approx(cost.perplexity_before)
    assert cost.cache_before == 4 * cost.cache_after
    save_model(again, tmp_path)
    assert load_model(tmp_path).config.num_kv_heads == 2


def test_one_head_for_all_and_a_pool_of_ones_own():
    assert share_heads(llama(), 1).layers[0].attention.k.out_features == 4
    last = share_heads(llama(), 4, pool=lambda heads: heads[:, -1])
    assert torch.equal(last.layers[1].attention.v.weight[:4], llama().layers[1].attention.v.weight[4:8])


def test_refuses_what_cannot_be_shared():
    with pytest.raises(ConfigError, match=r"num_kv_heads is 3; it must divide the model's 8.*1, 2, 4, 8"):
        share_heads(llama(), 3)
    with pytest.raises(ConfigError, match="pool is 'max'; known: first, mean"):
        share_heads(llama(), 2, pool="max")
    with pytest.raises(ConfigError, match="A Bert is no decoder"):
        share_heads(Bert(BertConfig(num_layers=1, hidden_size=16, num_heads=2)), 1)
    with pytest.raises(ConfigError, match="A Mamba has no key/value heads"):
        share_heads(Mamba(MambaConfig(vocab_size=31, hidden_size=16, num_layers=1)), 1)
    with pytest.raises(ConfigError, match="The model is quantized"):
        share_heads(quantize_model(llama(), 8), 2)


# Learning: characters of a module of the standard library. Seed 0; other seeds in docs/weights.md.

TEXT = inspect.getsource(argparse)
LENGTH = 48


def batch(ids: torch.Tensor, generator: torch.Generator, rows: int) -> torch.Tensor:
    starts = torch.randint(0, len(ids) - LENGTH - 1, (rows,), generator=generator)
    return torch.stack([ids[i : i + LENGTH + 1] for i in starts.tolist()])


def loss_of(model: Llama, rows: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())


def train(model: Llama, ids: torch.Tensor, steps: int, peak: float, seed: int) -> Llama:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=peak, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        loss = loss_of(model, batch(ids, generator, 8))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def test_a_short_up_training_brings_most_of_it_back_and_heads_at_random_do_not():
    letters = sorted(set(TEXT))
    ids = torch.tensor([letters.index(c) for c in TEXT])
    seen, held_out = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]

    @torch.no_grad()
    def score(model: Llama) -> float:
        return float(loss_of(model, batch(held_out, torch.Generator().manual_seed(9), 128)))

    config = LlamaConfig(
        vocab_size=len(letters), hidden_size=48, intermediate_size=96, num_layers=2, num_heads=4, max_seq_len=LENGTH
    )
    model = train(init_weights(Llama(config), seed=0), seen, 250, 4e-3, seed=0)

    def drawn_anew(heads: torch.Tensor) -> torch.Tensor:
        return heads.std() * torch.randn(heads[:, 0].shape, generator=torch.Generator().manual_seed(5))

    base, pooled, after = score(model), {}, {}
    for name, pool in (("mean", "mean"), ("random", drawn_anew)):
        shared = share_heads(model, 1, pool)
        pooled[name] = score(shared)
        after[name] = score(train(shared, seen, 40, 2e-3, seed=100))  # a sixth of the training
    recovered = (pooled["mean"] - after["mean"]) / (pooled["mean"] - base)
    assert recovered > 0.7, (base, pooled, after)
    assert after["mean"] < after["random"] - 0.1, (base, pooled, after)
