"""Looking: dead units are those made dead, attention rows sum to one, paths go down, and pictures are pictures."""

import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.train.look import look_at_activations, look_at_attention, plot_activations, plot_attention
from modelwright.train.paths import RULES, SURFACES, optimizer_path, plot_paths

IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def model():
    shape = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, max_seq_len=64)
    made = init_weights(Llama(shape), 0)
    with torch.no_grad():
        made.layers[1].mlp.up.weight[:5] = 0
    return made


def test_dead_units_are_those_that_were_made_dead(model):
    layers = look_at_activations(model, IDS)
    assert [layer.name for layer in layers][:2] == ["layer 0, feed-forward units", "layer 0, output"]
    assert [layer.num_dead for layer in layers if "units" in layer.name] == [0, 5]
    assert all(sum(layer.counts) == layer.num_units * 12 for layer in layers)
    assert not model.layers[0]._forward_hooks


def test_attention_rows_sum_to_one_and_look_back_only(model):
    maps = look_at_attention(model, IDS)
    assert len(maps) == 2 and maps[0].shape == (4, 12, 12)
    assert torch.allclose(maps[0].sum(-1), torch.ones(4, 12), atol=1e-5)
    assert float(maps[0].triu(1).abs().max()) == 0


@pytest.mark.parametrize("surface", ["bowl", "rosenbrock", "beale"])
@pytest.mark.parametrize("rule", RULES)
def test_every_path_goes_down(rule, surface):
    path = optimizer_path(rule, surface)
    assert len(path) > 10 and path[-1][2] < 0.7 * path[0][2]


def test_a_rate_that_is_too_large_climbs_and_ends():
    path = optimizer_path("sgd", "rosenbrock", learning_rate=1.0)
    assert len(path) < 10
    with pytest.raises(ConfigError, match=r"optimizer is 'adm'.*Did you mean 'adam'"):
        optimizer_path("adm", "bowl")
    with pytest.raises(ConfigError, match=r"surface is 'bowll'"):
        optimizer_path("adam", "bowll")


def test_pictures_are_pictures(model, tmp_path):
    pytest.importorskip("matplotlib")
    plot_paths("bowl", ["sgd", "adam"], tmp_path / "a.png", 20)
    plot_activations(look_at_activations(model, IDS), tmp_path / "b.png")
    plot_attention(look_at_attention(model, IDS), list("hello $\n wor"), tmp_path / "c.png", -1)
    for name in "abc":
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match="layer is 2, and the model has 2"):
        plot_attention(look_at_attention(model, IDS), ["x"], tmp_path / "d.png", 2)
    assert set(SURFACES) >= {"bowl", "saddle"}


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="no list of blocks"):
        look_at_activations(torch.nn.Linear(2, 2), IDS)
