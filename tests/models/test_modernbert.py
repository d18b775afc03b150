"""ModernBERT: windows, two rotations, and configs of before transformers 5."""

import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.models.modernbert import FULL, SLIDING, ModernBert, ModernBertConfig
from modelwright.nn.init import init_weights

SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "pad_token_id": 0}


@pytest.mark.parametrize(("types", "is_far"), [((SLIDING, SLIDING), False), ((SLIDING, FULL), True)])
def test_a_window_reaches_half_its_width_to_each_side(types, is_far):
    """Two layers with windows of 4 to each side carry a change 8 positions and no further; a full layer does."""
    config = ModernBertConfig(**SMALL, num_layers=2, local_attention=8, layer_types=types)
    model = init_weights(ModernBert(config), 0, std=0.2)
    ids = torch.randint(5, 40, (1, 60), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 30] = 4
    with torch.no_grad():
        gap = (model(ids).last_hidden_state - model(changed).last_hidden_state).abs().amax(-1)[0]
    moved = (gap > 1e-6).nonzero().flatten()
    assert (moved.min(), moved.max()) == ((0, 59) if is_far else (22, 38))


def test_an_old_config_is_read_as_the_new_one():
    old = {
        "num_hidden_layers": 5,
        "global_attn_every_n_layers": 2,
        "global_rope_theta": 5000.0,
        "local_rope_theta": 100.0,
        "position_embedding_type": "absolute",
        "hidden_size": 32,
        "num_attention_heads": 4,
    }
    config = ModernBertConfig.from_hf(old)
    assert config.layer_types == (FULL, SLIDING, FULL, SLIDING, FULL)
    assert (config.full_theta, config.local_theta) == (5000.0, 100.0)
    assert ModernBertConfig.from_hf(config.to_hf()) == config
    assert ModernBertConfig.from_hf({}).full_theta == 160_000.0


def test_the_two_rotations_are_two():
    config = ModernBertConfig(**SMALL, num_layers=3)
    model = ModernBert(config)
    assert not torch.allclose(model.full_rope(9)[0], model.local_rope(9)[0])


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"layer_types": [FULL]}, "layer_types is"),
        ({"classifier_pooling": "max"}, "classifier_pooling is 'max'; known: cls, mean"),
        ({"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}}, "scaling is computed for full"),
    ],
)
def test_refuses_what_it_does_not_compute(values, match):
    with pytest.raises(ConfigError, match=match):
        ModernBertConfig.from_hf({"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4} | values)
