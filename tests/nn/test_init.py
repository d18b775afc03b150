"""First weights: the same for a seed, of the stated spread, and none left as it was."""

import pytest
import torch
from torch import nn

from modelwright.base.errors import ConfigError
from modelwright.nn.init import init_weights, mark_residual_output
from modelwright.nn.mlp import GatedMlp, Mlp
from modelwright.nn.norm import RMSNorm


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(400, 64)
        self.mlp = GatedMlp(64, 128, bias=True)
        self.norms = nn.ModuleList([RMSNorm(64), nn.LayerNorm(64)])
        self.head = nn.Linear(64, 400, bias=False)
        self.head.weight = self.embed.weight
        mark_residual_output(self.mlp.down, num_layers=8)


def test_a_seed_gives_the_same_weights_and_another_seed_others():
    first, again, other = (init_weights(Tied(), seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])


def test_spread_is_as_stated():
    model = init_weights(Tied(), 0)
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.mlp.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)  # 1 / sqrt(2 * 8)
    assert (model.mlp.up.bias == 0).all() and (model.norms[0].weight == 1).all() and (model.norms[1].bias == 0).all()
    assert model.head.weight is model.embed.weight


def test_poison_leaves_nothing_behind():
    model = Tied()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    init_weights(model, 0)
    assert all(torch.isfinite(t).all() for t in (*model.parameters(), *model.buffers()))


def test_refuses_empty_storage_and_unknown_layers():
    with torch.device("meta"):
        empty = Mlp(4, 8)
    with pytest.raises(ConfigError, match=r"up\.weight has no storage yet"):
        init_weights(empty, 0)
    with pytest.raises(ConfigError, match="belongs to a Conv1d, for which init_weights has no rule"):
        init_weights(nn.Sequential(nn.Conv1d(1, 1, 1)), 0)


class Decay(nn.Module):
    """A layer with first values of its own, one of them drawn."""

    def __init__(self, forgets=False):
        super().__init__()
        self.rate, self.gate = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1000))
        self.inner = nn.Linear(2, 2)
        self.forgets = forgets

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        self.rate.copy_(torch.tensor([1.0, 2.0, 3.0]))
        if not self.forgets:
            self.gate.copy_(torch.rand(1000, generator=generator))


def test_a_module_may_fill_its_own_parameters_but_must_fill_all():
    first, again, other = (init_weights(Decay(), seed) for seed in (0, 0, 1))
    assert first.rate.tolist() == [1.0, 2.0, 3.0]
    assert torch.equal(first.gate, again.gate) and not torch.equal(first.gate, other.gate)
    assert 0 < first.inner.weight.std() < 0.1 and (first.inner.bias == 0).all()  # children follow the common rules
    with pytest.raises(ConfigError, match="gate was not filled by Decay.reset_own_parameters"):
        init_weights(nn.Sequential(Decay(forgets=True)), 0)
