"""Lion, Adafactor and the lean AdamWs against torch.optim and the published formulas; their state in bytes."""

import math

import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.optim import OPTIMIZERS
from modelwright.optim.adafactor import Adafactor, AdafactorConfig
from modelwright.optim.adamw8bit import LeanAdamW
from modelwright.optim.build import AdamWConfig, OptimizerConfig, make_optimizer
from modelwright.optim.dynamic8 import BLOCK, dequantize, dynamic_code, quantize
from modelwright.optim.ema import Ema, EmaConfig
from modelwright.optim.lion import Lion, LionConfig
from modelwright.optim.muon import MuonConfig


def train_beside(ours, theirs, shapes=((40, 130), (7,)), num_steps=6):
    """Feed both optimizers the same gradients and return the pairs of weights."""
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    other = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    a, b = ours(mine), theirs(other)
    for _ in range(num_steps):
        for p, q in zip(mine, other, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    return list(zip(mine, other, strict=True))


@pytest.mark.parametrize("is_paged", [False, True])
def test_lean_adamw_of_32_bits_is_that_of_torch(is_paged):
    pairs = train_beside(
        lambda p: LeanAdamW(p, 0.01, (0.9, 0.95), weight_decay=0.1, num_bits=32, is_paged=is_paged),
        lambda p: torch.optim.AdamW(p, 0.01, (0.9, 0.95), weight_decay=0.1),
    )
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_adafactor_is_that_of_torch():
    pairs = train_beside(
        lambda p: Adafactor(p, 0.02, weight_decay=0.1), lambda p: torch.optim.Adafactor(p, 0.02, weight_decay=0.1)
    )
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


class WrittenOutLion(torch.optim.Optimizer):
    """Algorithm 2 of the paper, line by line."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            m = self.state[p].setdefault("m", torch.zeros_like(p))
            c = 0.95 * m + (1 - 0.95) * p.grad
            p.copy_(p - 0.01 * (torch.sign(c) + 0.5 * p))
            m.copy_(0.98 * m + (1 - 0.98) * p.grad)


def test_lion_is_the_paper_written_out():
    for mine, other in train_beside(lambda p: Lion(p, 0.01, (0.95, 0.98), weight_decay=0.5), WrittenOutLion):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_the_code_is_that_of_bitsandbytes():
    signed, unsigned = dynamic_code(True), dynamic_code(False)
    assert len(signed) == len(unsigned) == 256 == len(set(signed.tolist()))
    assert signed[-2:].tolist() == pytest.approx([0.9929687, 1.0])
    assert float(signed[0]) == pytest.approx(-0.9929687)
    assert float(signed[signed > 0][0]) == pytest.approx(5.5e-07)
    assert float(unsigned[unsigned > 0][0]) == pytest.approx(3.25e-07)


@pytest.mark.parametrize("is_signed", [True, False])
def test_rounding_takes_the_nearest_value_of_the_code(is_signed):
    torch.manual_seed(0)
    values = torch.randn(4 * BLOCK) * torch.logspace(-6, 2, 4).repeat_interleave(BLOCK)
    values = values if is_signed else values.abs()
    codes, scales = quantize(values, is_signed)
    assert codes.dtype == torch.uint8
    found = dequantize(codes, scales, is_signed)
    relative = values.view(4, -1) / scales[:, None]
    nearest = (relative[..., None] - dynamic_code(is_signed)).abs().amin(-1).view(-1) * scales.repeat_interleave(BLOCK)
    assert ((found - values).abs() <= nearest + 1e-6 * scales.repeat_interleave(BLOCK)).all()
    assert torch.equal(dequantize(*quantize(torch.zeros(BLOCK), is_signed), is_signed), torch.zeros(BLOCK))


@pytest.mark.parametrize("is_paged", [False, True])
def test_eight_bits_stay_near_32_and_take_a_quarter(is_paged):
    made = []

    def lean(params):
        made.append(LeanAdamW(params, 0.01, (0.9, 0.99), num_bits=8, is_paged=is_paged))
        return made[0]

    pairs = train_beside(lean, lambda p: torch.optim.AdamW(p, 0.01, (0.9, 0.99), weight_decay=0.0), ((64, 130),), 20)
    for mine, other in pairs:
        start = torch.manual_seed(0) and torch.randn(64, 130)
        moved = (other - start).norm()
        assert 0 < float((mine - other).norm()) < 0.05 * float(moved)
    num_blocks = -(-64 * 130 // BLOCK)
    assert made[0].state_bytes() == num_blocks * (2 * BLOCK + 2 * 4)


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(20, 8)
        self.inner = torch.nn.Linear(8, 8)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_rule_reaches_every_parameter_and_lowers_a_loss(name):
    torch.manual_seed(0)
    model = Small()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rule = make_optimizer(model, OptimizerConfig(name=name))
    ids, target = torch.arange(20), torch.randn(20, 8)
    losses = []
    for _ in range(40):
        loss = (model.inner(model.embed(ids)) - target).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        rule.step()
        rule.zero_grad()
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_section_that_the_rule_does_not_read_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer.lion was set, which has no effect"):
        OptimizerConfig(name="adamw8bit", lion=LionConfig(learning_rate=1.0))
    with pytest.raises(ConfigError, match="betas is"):
        AdamWConfig(betas=(0.9, 1.0))
    for kind in (AdamWConfig, LionConfig, AdafactorConfig, MuonConfig):
        for rate in (0.0, -1e-3, math.nan, math.inf):
            with pytest.raises(ConfigError, match="the rate must be above 0"):
                kind(learning_rate=rate)
        with pytest.raises(ConfigError, match="weight decay -0.1"):
            kind(weight_decay=-0.1)
    for wrong in ({"num_iterations": 0}, {"num_iterations": 6}, {"momentum": 1.0}):
        with pytest.raises(ConfigError, match="the iterations from 1 to 5"):
            MuonConfig(**wrong)
    assert OptimizerConfig(name="paged_adamw8bit", adamw=AdamWConfig(learning_rate=1.0)).name


def test_the_average_follows_the_formula_and_can_be_looked_at():
    model = torch.nn.Linear(1, 1, bias=False)
    ema, expected = Ema(model, EmaConfig(decay=0.5)), float(model.weight.detach())
    for t in range(1, 20):
        with torch.no_grad():
            model.weight.fill_(t)
        ema.update()
        d = min(0.5, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * t
    with ema.averaged():
        assert float(model.weight.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(model.weight.detach()) == 19
    ema.copy_to_model()
    assert float(model.weight.detach()) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigError, match="ema.decay is 1"):
        EmaConfig(decay=1.0)
