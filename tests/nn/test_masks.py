"""Masks against their definitions written out, joined, and in all attention backends."""

import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.nn import ATTENTION_BACKENDS, masks
from modelwright.nn.attention import (
    Attention,
    AttentionOptions,
    AttentionRule,
    attend,
    attend_plain,
    record_attention,
    use_backend,
)

T = 12


def by_hand(rule, rows=1):
    """Apply a rule on plain numbers to every (row, query, key)."""
    return torch.tensor([[[rule(b, q, k) for k in range(T)] for q in range(T)] for b in range(rows)])


IDS = torch.tensor([[0] * 5 + [1] * 7, [3] * 2 + [4] * 9 + [5]])
TOKENS = torch.tensor([[0] * 3 + [1] * 9, [1] * 8 + [0] * 4])
LENGTHS = torch.tensor([4, 0])
GLOBAL = torch.zeros(2, T, dtype=torch.bool)
GLOBAL[0, 0] = GLOBAL[1, 7] = True

DEFINITIONS = {
    "full": (masks.full(), lambda b, q, k: True),
    "causal": (masks.causal(), lambda b, q, k: k <= q),
    "offset": (masks.causal(3), lambda b, q, k: k <= q + 3),
    "sliding": (masks.sliding(3), lambda b, q, k: abs(q - k) < 3),
    "prefix": (masks.prefix(LENGTHS), lambda b, q, k: k < LENGTHS[b]),
    "padding": (masks.padding(TOKENS), lambda b, q, k: bool(TOKENS[b, k]) or q == k),
    "packed": (masks.packed(IDS), lambda b, q, k: bool(IDS[b, q] == IDS[b, k])),
    "longformer": (masks.longformer(4, GLOBAL), lambda b, q, k: abs(q - k) <= 2 or bool(GLOBAL[b, q] | GLOBAL[b, k])),
    "prefix LM": (masks.prefix(LENGTHS) | masks.causal(), lambda b, q, k: k < LENGTHS[b] or k <= q),
    "packed window": (
        masks.causal() & masks.sliding(4) & masks.packed(IDS),
        lambda b, q, k: 0 <= q - k < 4 and bool(IDS[b, q] == IDS[b, k]),
    ),
    "not causal": (~masks.causal(), lambda b, q, k: k > q),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_each_mask_is_its_definition(name):
    mask, rule = DEFINITIONS[name]
    dense = mask.dense(T, T)
    expected = by_hand(rule, mask.batch_size)
    assert torch.equal(dense[:, 0], expected)
    blocks = mask.block_mask(T, T)
    assert blocks.shape[-2:] == (T, T)


def test_bigbird_has_ends_neighbours_and_so_many_random_blocks():
    size, count = 4, 2
    dense = masks.bigbird(64, size, count, seed=3).dense(64, 64)[0, 0]
    blocks = dense.view(16, size, 16, size).permute(0, 2, 1, 3).flatten(2)
    assert torch.equal(blocks.any(-1), blocks.all(-1))  # whole blocks
    seen = blocks.any(-1)
    assert seen[0].all() and seen[-1].all() and seen[:, 0].all() and seen[:, -1].all()
    for row in range(2, 14):
        assert seen[row, row - 1 : row + 2].all()
        assert int(seen[row].sum()) == 3 + 2 + count
    other = masks.bigbird(64, size, count, seed=4).dense(64, 64)[0, 0]
    assert not torch.equal(dense, other)


def test_refusals():
    with pytest.raises(ConfigError, match="window is 0"):
        masks.sliding(0)
    with pytest.raises(ConfigError, match="for 2 and 3 rows"):
        masks.padding(torch.ones(2, 4)) & masks.padding(torch.ones(3, 4))
    with pytest.raises(ConfigError, match="at least 8 blocks"):
        masks.bigbird(16, 4, 3)
    with pytest.raises(ConfigError, match="known: auto, .*plain"):
        with use_backend("magic"):
            pass


RULES = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "rule": AttentionRule(window=5)},
    "window to both sides": {"rule": AttentionRule(window=3)},
    "softcap": {"is_causal": True, "rule": AttentionRule(softcap=2.0)},
    "sinks": {"is_causal": True, "rule": AttentionRule(sinks=torch.linspace(-1, 2, 4))},
    "bias": {"is_causal": True, "bias": torch.linspace(-3, 3, 4 * T * T).view(1, 4, T, T)},
    "mask": {"mask": (masks.packed(IDS) & masks.causal()).dense(T, T)},
    "mask and causal": {"mask": masks.packed(IDS).dense(T, T), "is_causal": True},
    "mask a head": {
        "mask": torch.eye(T).bool() | (torch.rand(2, 4, T, T, generator=torch.Generator().manual_seed(0)) < 0.5)
    },
}
REFUSED = {
    "sdpa": {"softcap", "sinks"},
    "products": {"plain", "window to both sides", "softcap", "sinks", "bias", "mask", "mask a head"},
    "flex": {"sinks"},
    "tiles": {"plain", "window to both sides", "bias", "mask", "mask and causal", "mask a head"},
}


# The Triton kernel needs a GPU or its interpreter; it has a test of its own.
@pytest.mark.parametrize("backend", ["auto", *sorted(set(ATTENTION_BACKENDS) - {"triton", "ring"})])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_backend_computes_the_same(backend, rule, kv_heads):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, T, 4, 8, generator=generator, requires_grad=True)
    k = torch.randn(2, T, kv_heads, 8, generator=generator, requires_grad=True)
    v = torch.randn(2, T, kv_heads, 6, generator=generator, requires_grad=True)
    if rule in REFUSED.get(backend, ()):
        with use_backend(backend), pytest.raises(ConfigError, match=f"'{backend}'"):
            attend(q, k, v, scale=0.4, **RULES[rule])
        return
    expected = attend_plain(q, k, v, scale=0.4, **RULES[rule])
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    if backend == "flex":  # no backward pass on a CPU
        with use_backend(backend), pytest.raises(ConfigError, match="no backward pass on a CPU"):
            attend(q, k, v, scale=0.4, **RULES[rule])
        with use_backend(backend), torch.no_grad():
            assert (attend(q, k, v, scale=0.4, **RULES[rule]) - expected).abs().max() < 1e-5
        return
    with use_backend(backend):
        out = attend(q, k, v, scale=0.4, **RULES[rule])
        gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert out.shape == (2, T, 4, 6)
    assert (out - expected).abs().max() < 1e-5
    for mine, other in zip(gradients, wanted, strict=True):
        assert (mine - other).abs().max() < 1e-4


def test_recorded_maps_are_the_weights_and_change_nothing():
    torch.manual_seed(0)
    layer = Attention(32, 4, 2, 8, options=AttentionOptions(window=4))
    x = torch.randn(2, T, 32)
    with torch.no_grad():
        plain = layer(x)
        with record_attention() as maps:
            watched = layer(x)
    assert (plain - watched).abs().max() < 1e-6
    assert len(maps) == 1 and maps[0].shape == (2, 4, T, T)
    assert torch.allclose(maps[0].sum(-1), torch.ones(2, 4, T))
    seen = (masks.causal() & masks.sliding(4)).dense(T, T)
    assert (maps[0][~seen.expand_as(maps[0])] == 0).all()
    with record_attention() as nothing:
        pass
    assert nothing == []
