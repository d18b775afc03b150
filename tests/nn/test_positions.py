"""Positions that are added: equal to the published ones, and what they promise of order and distance holds."""

import pytest
import torch

from modelwright.base.errors import ConfigError, RequestError
from modelwright.nn.attention import attend, attend_plain
from modelwright.nn.flash import flash_attend
from modelwright.nn.positions import (
    LearnedPositions,
    RelativeBias,
    alibi_bias,
    alibi_bias_two_sided,
    alibi_slopes,
    relative_buckets,
    sinusoids,
)


def test_sinusoids_are_the_papers():
    table = sinusoids(600, 16)
    for position, i in ((0, 0), (3, 2), (599, 7)):
        angle = torch.tensor(position / 10000 ** (2 * i / 16))
        assert torch.isclose(table[position, 2 * i], angle.sin(), atol=1e-5)
        assert torch.isclose(table[position, 2 * i + 1], angle.cos(), atol=1e-5)
    half = sinusoids(600, 16, "half_split")
    assert torch.equal(torch.cat((table[:, 0::2], table[:, 1::2]), dim=1), half)
    dots = table @ table.T  # PE(p) . PE(p + d) depends on d alone
    assert torch.allclose(dots.diagonal(17), dots[0, 17].expand(583), atol=1e-4)


@pytest.mark.peer
def test_sinusoids_equal_transformers():
    pytest.importorskip("transformers")
    from transformers.models.pegasus.modeling_pegasus import PegasusSinusoidalPositionalEmbedding
    from transformers.models.whisper.modeling_whisper import sinusoids as whisper_sinusoids

    theirs = PegasusSinusoidalPositionalEmbedding(100, 24)
    theirs.weight = torch.nn.Parameter(theirs.create_weight().clone())
    assert (theirs.weight - sinusoids(100, 24, "half_split")).abs().max() < 1e-6
    # theirs is float32 throughout, so an angle of 1500 is off by its rounding
    assert (whisper_sinusoids(1500, 24) - sinusoids(1500, 24, "whisper")).abs().max() < 2e-4
    assert (whisper_sinusoids(8, 24) - sinusoids(8, 24, "whisper")).abs().max() < 1e-6


def test_learned_positions_pick_rows_and_refuse_the_unlearned():
    learned = LearnedPositions(10, 4, offset=2)
    assert learned.weight.shape == (12, 4)
    assert torch.equal(learned(torch.tensor([[0, 9]])), learned.weight[None, [2, 11]])
    with pytest.raises(RequestError, match="Position 10 was asked for; this model learned positions 0 to 9"):
        learned(torch.tensor([[3, 10]]))


@pytest.mark.peer
@pytest.mark.parametrize("num_heads", [1, 2, 4, 6, 7, 8, 12, 16, 20, 32, 71, 112])
def test_alibi_equals_transformers(num_heads):
    pytest.importorskip("transformers")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    ones = torch.ones(2, 40, dtype=torch.long)
    theirs = build_alibi_tensor(ones, num_heads, torch.float32).view(2, num_heads, 1, 40)
    ours = alibi_bias(alibi_slopes(num_heads), torch.arange(40)[None].expand(2, 40))
    assert torch.allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("attention", [attend, attend_plain, flash_attend])
def test_alibi_by_key_position_is_alibi_by_distance(attention):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 20, 6, 8).unbind(0)
    slopes, at = alibi_slopes(6), torch.arange(20)[None]
    far = alibi_bias_two_sided(slopes, at, at)
    assert far[0, 1, 7, 3] == -4 * slopes[1] == far[0, 1, 3, 7]
    by_key, by_distance = (
        attention(q, k, v, scale=0.3, is_causal=True, bias=bias) for bias in (alibi_bias(slopes, at), far)
    )
    assert torch.allclose(by_key, by_distance, atol=1e-5)
    moved = attention(q, k, v, scale=0.3, is_causal=True, bias=alibi_bias(slopes, at + 1000))
    assert torch.allclose(moved, by_key, atol=1e-4)  # distance alone counts
    assert not torch.allclose(attention(q, k, v, scale=0.3, is_causal=True), by_key, atol=1e-2)


@pytest.mark.peer
@pytest.mark.parametrize("is_bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (64, 1000)])
def test_t5_bias_equals_transformers(is_bidirectional, num_buckets, max_distance):
    pytest.importorskip("transformers")
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(
        num_heads=3,
        d_model=12,
        d_kv=4,
        relative_attention_num_buckets=num_buckets,
        relative_attention_max_distance=max_distance,
        is_decoder=not is_bidirectional,
    )
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    torch.nn.init.normal_(theirs.relative_attention_bias.weight)
    ours = RelativeBias(3, is_bidirectional=is_bidirectional, num_buckets=num_buckets, max_distance=max_distance)
    ours.embed.weight.data.copy_(theirs.relative_attention_bias.weight)
    assert torch.equal(ours(300, 200), theirs.compute_bias(300, 200))
    assert torch.equal(ours(1, 200, offset=150), theirs.compute_bias(1, 200, past_seen_tokens=150))
    wide = torch.arange(-3000, 3001)
    assert torch.equal(
        relative_buckets(wide, is_bidirectional=is_bidirectional, num_buckets=num_buckets, max_distance=max_distance),
        T5Attention._relative_position_bucket(wide, is_bidirectional, num_buckets, max_distance),
    )


def test_t5_bias_of_rows_at_other_positions():
    bias = RelativeBias(2, is_bidirectional=False, num_buckets=8, max_distance=20)
    at = torch.tensor([[0, 1, 2, 3], [7, 8, 9, 10]])
    found = bias.at(at[:, None, :] - at[:, :, None])
    assert found.shape == (2, 2, 4, 4)
    assert torch.equal(found[0], found[1]) and torch.equal(found[:1], bias(4, 4))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: sinusoids(4, 5), "size 5"),
        (lambda: alibi_slopes(0), "num_heads is 0"),
        (lambda: relative_buckets(torch.arange(3), is_bidirectional=True, num_buckets=2), "2 buckets"),
        (lambda: relative_buckets(torch.arange(3), is_bidirectional=False, max_distance=16), "distance of 16"),
    ],
)
def test_refuses_sizes_that_cannot_be(make, match):
    with pytest.raises(ConfigError, match=match):
        make()
