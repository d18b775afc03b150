"""Rotary positions: tables equal the published ones, scores depend on distance alone, and the buffers survive."""

import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.nn.rope import (
    RopeScaling,
    RotaryTable,
    inverse_frequencies,
    rotate,
    scaling_from_hf,
    scaling_to_hf,
)

SCALINGS = {
    "default": None,
    "linear": RopeScaling("linear", 4.0),
    "llama3": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    "llama3, short": RopeScaling("llama3", 32.0, 1.0, 4.0, 64),
}


@pytest.mark.peer
@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 10000.0), (128, 500000.0)])
def test_tables_equal_transformers(name, head_dim, theta):
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = SCALINGS[name]
    parameters = {"rope_theta": theta, **(scaling_to_hf(scaling) or {"rope_type": "default"})}
    config = LlamaConfig(hidden_size=head_dim * 2, num_attention_heads=2, rope_parameters=parameters)
    theirs = LlamaRotaryEmbedding(config)
    assert torch.equal(inverse_frequencies(head_dim, theta, scaling), theirs.inv_freq)
    cos, sin = theirs(torch.zeros(1), torch.arange(300)[None])
    ours = RotaryTable(head_dim, 300, theta, scaling)
    assert (ours.cos - cos[0, :, : head_dim // 2]).abs().max() < 1e-6
    assert (ours.sin - sin[0, :, : head_dim // 2]).abs().max() < 1e-6


def test_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    table = RotaryTable(32, 4000, 10000.0)
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)

    def score(at_q: int, at_k: int) -> torch.Tensor:
        turned = [rotate(x, table(1, torch.tensor([[at]]))) for x, at in ((q, at_q), (k, at_k))]
        return (turned[0] * turned[1]).sum()

    near = score(130, 100)
    for shift in (1, 97, 1024, 3800):  # no wrapping, wherever a block ends
        assert torch.allclose(score(130 + shift, 100 + shift), near, atol=1e-3)
    assert (score(131, 100) - near).abs() > 1e-2
    assert torch.allclose(score(5, 5), (q * k).sum(), atol=1e-5)


def test_positions_pick_rows_of_the_table():
    table = RotaryTable(8, 50, 100.0)
    x = torch.randn(2, 6, 3, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 7, 0, 49, 3, 1]])
    whole = rotate(x, table(6, positions))
    assert torch.equal(whole[:1], rotate(x[:1], table(6)))
    one = rotate(x[1:, 3:4], table(1, torch.tensor([[49]])))
    assert torch.equal(whole[1:, 3:4], one)


def test_tables_survive_the_meta_device_poison_and_casts():
    right = RotaryTable(16, 40, 10000.0, SCALINGS["llama3, short"])
    with torch.device("meta"):
        model = torch.nn.Sequential(RotaryTable(16, 40, 10000.0, SCALINGS["llama3, short"]))
    assert model[0].cos.is_meta
    model.to_empty(device="cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model[0].cos.fill_(float("nan"))
        model.to(dtype)
        assert model[0].cos.dtype == torch.float32
        assert torch.equal(model[0].cos, right.cos) and torch.equal(model[0].sin, right.sin)
    assert model.state_dict() == {}


def test_bfloat16_far_positions_keep_their_angle():
    """Position 20,001 in bfloat16 would be 19,968: the fast pairs would be off by whole turns."""
    table = RotaryTable(64, 20_002, 10000.0).to(torch.bfloat16)
    assert torch.allclose(table.cos[20_001, 0], torch.tensor(20_001.0).cos())
    x = torch.randn(1, 1, 2, 64).to(torch.bfloat16)
    assert rotate(x, table(1, torch.tensor([[20_001]]))).dtype == torch.bfloat16


def test_scaling_reads_old_and_new_spellings():
    assert scaling_from_hf(None) is None
    assert scaling_from_hf({"rope_type": "default", "rope_theta": 1e4}) is None
    assert scaling_from_hf({"type": "linear", "factor": 4.0}) == SCALINGS["linear"]
    for scaling in SCALINGS.values():
        assert scaling_from_hf(scaling_to_hf(scaling)) == scaling


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, "'yarn'; known: default, linear, llama3"),
        ({"type": "dynamic", "factor": 4.0}, "'dynamic'"),
        ({"rope_type": "linear"}, "needs the field 'factor'"),
        ({"rope_type": "linear", "factor": 0.5}, "at least 1"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_refuses_other_scalings_by_name(values, match):
    with pytest.raises(ConfigError, match=match):
        scaling_from_hf(values)


def test_llama3_band_of_no_width_is_refused():
    with pytest.raises(ConfigError, match="low one must be above 0 and below"):
        RopeScaling("llama3", 8.0, 4.0, 4.0, 64)
