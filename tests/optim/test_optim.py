"""Update rules against their definitions, and schedules at their corners."""

import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.optim import SCHEDULES
from modelwright.optim.build import AdamWConfig, OptimizerConfig, make_optimizer
from modelwright.optim.muon import Muon, orthogonalize
from modelwright.optim.schedule import ScheduleConfig, make_schedule


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    out = orthogonalize(x, 5).float()
    values = torch.linalg.svdvals(out)
    assert 0.85 < values.median() < 1.15 and values.max() < 1.3
    exact = torch.linalg.svd(x, full_matrices=False)
    polar = exact.U @ exact.Vh
    assert torch.nn.functional.cosine_similarity(out.flatten(1), polar.flatten(1)).min() > 0.97


def test_batched_muon_equals_one_matrix_at_a_time():
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(16, 24)) for _ in range(3)]
    copies = [torch.nn.Parameter(m.detach().clone()) for m in matrices]
    together = Muon(matrices, 0.1, weight_decay=0.1)
    apart = [Muon([c], 0.1, weight_decay=0.1) for c in copies]
    for _ in range(3):
        for matrix, copy in zip(matrices, copies, strict=True):
            matrix.grad = torch.randn_like(matrix)
            copy.grad = matrix.grad.clone()
        together.step()
        for rule in apart:
            rule.step()
    for matrix, copy in zip(matrices, copies, strict=True):
        torch.testing.assert_close(matrix, copy, rtol=2e-2, atol=2e-3)


def test_muon_update_has_the_stated_size():
    matrix = torch.nn.Parameter(torch.zeros(64, 64))
    matrix.grad = torch.randn(64, 64)
    Muon([matrix], 1.0).step()
    assert float(matrix.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match="Muon takes matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))], 0.1)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_rise_to_the_peak_and_stay_in_range(name):
    factor = make_schedule(ScheduleConfig(name=name, warmup_steps=4, decay_fraction=0.5), 40)
    values = [factor(step) for step in range(40)]
    assert values[0] == pytest.approx(0.2) and max(values) == pytest.approx(1.0)
    assert all(0 <= v <= 1 for v in values)
    assert (values[-1] == 1.0) == (name == "constant")


def test_settings_without_effect_and_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="has no effect"):
        OptimizerConfig(name="muon", adamw=AdamWConfig(learning_rate=1.0))
    with pytest.raises(ConfigError, match="known: adafactor, adamw, .*muon"):
        make_optimizer(torch.nn.Linear(2, 2), OptimizerConfig(name="lian"))
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        make_optimizer(frozen, OptimizerConfig(name="adamw"))


def test_a_table_of_scalars_is_neither_decayed_nor_made_orthogonal():
    class Filter(torch.nn.Module):
        vector_names = ("rates",)

        def __init__(self):
            super().__init__()
            self.rates, self.weight = torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(4, 3))

    model = Filter()
    adamw = make_optimizer(model, OptimizerConfig(name="adamw"))
    assert {id(p): g["weight_decay"] > 0 for g in adamw.groups() for p in g["params"]} == {
        id(model.rates): False,
        id(model.weight): True,
    }
    muon = make_optimizer(model, OptimizerConfig(name="muon")).optimizers
    assert [id(p) for g in muon["muon"].param_groups for p in g["params"]] == [id(model.weight)]
