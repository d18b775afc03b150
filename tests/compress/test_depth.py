"""More layers: which stand where, that silent ones change nothing and learn, and what is refused."""

from dataclasses import replace

import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.compress.depth import add_silent_layers, arrange_layers, scale_depth
from modelwright.compress.surgery import measure_cost
from modelwright.models.gemma import Gemma, GemmaConfig
from modelwright.models.hybrid import Hybrid, HybridConfig
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.mamba import Mamba, MambaConfig
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights

CONFIG = LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=4, num_heads=2, max_seq_len=64)
ROWS = torch.arange(60).remainder(31).view(2, 30)


def fill(model):
    init_weights(model, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model.eval()


def sources(deep, model) -> list[int]:
    """Which layer of ``model`` each layer of ``deep`` is."""
    firsts = [layer.mlp.up.weight for layer in model.layers]
    return [next(i for i, w in enumerate(firsts) if torch.equal(w, layer.mlp.up.weight)) for layer in deep.layers]


def distinct(model):
    with torch.no_grad():
        for index, layer in enumerate(model.layers):
            layer.mlp.up.weight += index
    return model


def test_the_first_layers_are_followed_by_the_last():
    model = distinct(fill(Llama(CONFIG)))
    assert sources(scale_depth(model, 6), model) == [0, 1, 2, 1, 2, 3]
    assert sources(scale_depth(model, 7), model) == [0, 1, 2, 3, 1, 2, 3]
    assert sources(scale_depth(model, 8), model) == [0, 1, 2, 3, 0, 1, 2, 3]
    paper = distinct(fill(Llama(replace(CONFIG, num_layers=32))))
    assert sources(scale_depth(paper, 48), paper) == [*range(24), *range(8, 32)]


@pytest.mark.parametrize("num_layers", [5, 6, 8, 11])
def test_silent_layers_keep_the_function_to_the_bit_and_can_learn(num_layers, tmp_path):
    model = distinct(fill(Llama(CONFIG)))
    deep = add_silent_layers(model, num_layers)
    assert len(deep.layers) == deep.config.num_layers == num_layers
    assert sources(deep, model) == sorted(sources(deep, model)) and set(sources(deep, model)) == {0, 1, 2, 3}
    cost = measure_cost(model, deep, ROWS)
    assert cost.max_logit_difference == 0.0 and cost.perplexity_before == cost.perplexity_after
    assert cost.parameters_after > cost.parameters_before
    deep.train()(ROWS).logits.logsumexp(-1).sum().backward()
    silent = [layer for layer in deep.layers if not layer.mlp.down.weight.any()]
    assert len(silent) == num_layers - 4
    assert all(layer.mlp.down.weight.grad.any() and layer.attention.o.weight.grad.any() for layer in silent)
    save_model(deep, tmp_path)
    assert load_model(tmp_path).config.num_layers == num_layers


def test_scaled_depth_says_what_it_costs():
    model = fill(Llama(CONFIG))
    cost = measure_cost(model, scale_depth(model, 6), ROWS)
    assert cost.max_logit_difference > 0 and cost.perplexity_after > 1
    assert cost.cache_after == cost.cache_before * 6 // 4


def test_other_families_go_along_with_what_their_config_says_layer_by_layer():
    windowed = fill(Llama(replace(CONFIG, family="qwen2", sliding_window=8, num_full_layers=2)))
    deep = add_silent_layers(windowed, 6)
    assert [layer.window for layer in deep.cache_layout()] == [None, None, None, 8, 8, 8]
    assert measure_cost(windowed, deep, ROWS).max_logit_difference == 0.0
    with pytest.raises(ConfigError, match="cannot say this order"):
        arrange_layers(windowed, [0, 3, 1, 2])
    hybrid = fill(Hybrid(HybridConfig(vocab_size=31, hidden_size=64, num_layers=3, attention_layers=(1,))))
    deep = add_silent_layers(hybrid, 5)
    assert measure_cost(hybrid, deep, ROWS).max_logit_difference == 0.0
    mamba = fill(Mamba(MambaConfig(vocab_size=31, hidden_size=16, num_layers=2)))
    assert measure_cost(mamba, add_silent_layers(mamba, 3), ROWS).max_logit_difference == 0.0
    gemma = fill(Gemma(GemmaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)))
    assert measure_cost(gemma, add_silent_layers(gemma, 4), ROWS).max_logit_difference == 0.0


def test_refuses_fewer_layers_and_more_than_two_copies():
    model = fill(Llama(CONFIG))
    with pytest.raises(ConfigError, match="num_layers is 4; the model has 4 already"):
        add_silent_layers(model, 4)
    with pytest.raises(ConfigError, match="two copies of 4 layers give 8 at most"):
        scale_depth(model, 9)
