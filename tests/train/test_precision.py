"""Number formats, recomputation and the averaged weights inside the loop."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from tests.train.test_loop import gradients, plain_loop, stream_loader, tiny_model

from modelwright.base.errors import ConfigError
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.optim.ema import EmaConfig
from modelwright.train.checkpoint import CheckpointConfig
from modelwright.train.loop import Run, train
from modelwright.train.objective import CausalLanguageModeling, Objective
from modelwright.train.precision import FIRST_SCALE, Precision
from modelwright.train.recompute import RecomputeConfig


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_float32_learns(precision):
    exact = train(tiny_model(), CausalLanguageModeling(), stream_loader(8), plain_loop(num_steps=20))
    half = train(
        tiny_model(), CausalLanguageModeling(), stream_loader(8), plain_loop(num_steps=20, precision=precision)
    )
    assert half.losses[-1][1] == pytest.approx(exact.losses[-1][1], abs=0.05)
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert half.watchdog.skipped == []


class Faint(Objective):
    """A loss whose gradient by the activations is below what fp16 can hold (6e-8)."""

    def loss(self, model, batch):
        return model(batch.input_ids).logits.float().square().sum() * 1e-9


def test_weights_of_16_bits_move_at_a_rate_that_would_be_rounded_away():
    slow = plain_loop(num_steps=4, optimizer=OptimizerConfig(name="adamw", adamw=AdamWConfig(learning_rate=1e-6)))
    first = tiny_model().bfloat16().float()
    expected = train(copy.deepcopy(first), CausalLanguageModeling(), stream_loader(), slow).model.state_dict()
    run = train(tiny_model().bfloat16(), CausalLanguageModeling(), stream_loader(), slow)
    for name, value in run.model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name]), name
    moved = run.model.layers[0].mlp.up.weight
    assert float((moved != first.layers[0].mlp.up.weight).float().mean()) > 0.9
    # The control: rounded to 16 bits, hardly one of these weights differs.
    assert float((moved.bfloat16() != first.layers[0].mlp.up.weight.bfloat16()).float().mean()) < 0.1


def test_scaling_saves_gradients_that_fp16_cannot_hold():
    def norm(scale):
        config = plain_loop(precision="fp16", max_grad_norm=None)
        run = Run(tiny_model(), Faint(), stream_loader(), config)
        run.precision.scale = scale
        return run.do_step().gradient_norm

    exact = Run(tiny_model(), Faint(), stream_loader(), plain_loop(max_grad_norm=None)).do_step().gradient_norm
    assert norm(FIRST_SCALE) == pytest.approx(exact, rel=0.02)
    assert norm(1.0) < 0.9 * exact


def test_an_overflow_halves_the_scale_skips_the_update_and_is_not_a_fault():
    run = Run(tiny_model(), CausalLanguageModeling(), stream_loader(), plain_loop(precision="fp16"))
    run.precision.scale = 2.0**40
    before = run.model.embed.weight.clone()
    report = run.do_step()
    assert report.is_skipped and not math.isfinite(report.gradient_norm)
    assert run.precision.scale == 2.0**39 and torch.equal(run.model.embed.weight, before)
    assert run.watchdog.skipped == []
    while run.do_step().is_skipped:
        pass
    assert not torch.equal(run.model.embed.weight, before)


def test_the_scale_grows_after_a_while():
    precision = Precision("fp16", torch.device("cpu"))
    for _ in range(2000):
        assert not precision.has_overflowed(1.0)
    assert precision.scale == 2 * FIRST_SCALE


@pytest.mark.parametrize("way", ["layers", "selective"])
@pytest.mark.parametrize("every", [1, 2])
def test_recomputing_gives_the_same_gradients(way, every):
    config = plain_loop(max_grad_norm=None)
    kept = gradients(tiny_model(), stream_loader(), config)
    again = gradients(tiny_model(), stream_loader(), replace(config, recompute=RecomputeConfig(way, every)))
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=1e-6, atol=1e-7)


def saved_numbers(recompute):
    """Count the numbers that the backward pass keeps."""
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    run = Run(tiny_model(), CausalLanguageModeling(), stream_loader(), plain_loop(recompute=recompute))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run.objective.loss(run.model, run.loader.next_batch())
    return sum(kept)


def test_recomputing_keeps_less():
    nothing, half, all_ = (saved_numbers(RecomputeConfig(*way)) for way in (("none",), ("layers", 2), ("layers", 1)))
    assert all_ < 0.5 * nothing and all_ < half < nothing


def test_what_cannot_be_recomputed_is_refused():
    with pytest.raises(ConfigError, match="known: none, layers, selective"):
        RecomputeConfig("some")
    with pytest.raises(ConfigError, match="no list of blocks called layers"):
        Run(
            torch.nn.Linear(2, 2),
            CausalLanguageModeling(),
            stream_loader(),
            plain_loop(recompute=RecomputeConfig("layers")),
        )


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit", "paged_adamw", "adafactor", "lion"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resumed_is_bitwise_also_with_lean_states_averages_and_a_scale(tmp_path, name, precision):
    loop = plain_loop(num_steps=6, optimizer=OptimizerConfig(name=name), precision=precision, ema=EmaConfig(0.9))
    whole = train(tiny_model(), CausalLanguageModeling(), stream_loader(), loop)
    saved = replace(loop, checkpoint=CheckpointConfig(every=2))

    def kill(run, report):
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), CausalLanguageModeling(), stream_loader(), saved, folder=tmp_path, hooks=[kill])
    resumed = train(tiny_model(5), CausalLanguageModeling(), stream_loader(), saved, folder=tmp_path)
    assert resumed.losses == whole.losses and resumed.precision.state() == whole.precision.state()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_the_model_ends_as_the_average_and_training_does_not_notice():
    loop = plain_loop(num_steps=12)
    plain = train(tiny_model(), CausalLanguageModeling(), stream_loader(), loop)
    averaged = train(tiny_model(), CausalLanguageModeling(), stream_loader(), replace(loop, ema=EmaConfig(0.9)))
    assert averaged.losses == plain.losses
    assert not torch.equal(averaged.model.embed.weight, plain.model.embed.weight)
    for name, parameter in averaged.model.named_parameters():
        assert torch.equal(parameter, averaged.ema.averages[name])


def test_changed_settings_are_taken_when_asked_for(tmp_path):
    loop = plain_loop(num_steps=3, checkpoint=CheckpointConfig(every=1))
    train(tiny_model(), CausalLanguageModeling(), stream_loader(), loop, folder=tmp_path)
    longer = replace(loop, num_steps=5, max_grad_norm=0.5)
    with pytest.raises(
        ConfigError, match=r"max_grad_norm was 1.0, is now 0.5; num_steps was 3, is now 5.*allow_changes"
    ):
        train(tiny_model(), CausalLanguageModeling(), stream_loader(), longer, folder=tmp_path)
    asked = replace(longer, checkpoint=CheckpointConfig(every=1, allow_changes=True))
    run = train(tiny_model(), CausalLanguageModeling(), stream_loader(), asked, folder=tmp_path)
    assert run.step == 5 and len(run.losses) == 5
