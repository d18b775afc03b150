"""The law of scale: known laws are found again, published figures come out, and shuffled losses predict nothing."""

import numpy as np
import pytest

from modelwright.base.errors import ConfigError, DataError
from modelwright.train.scaling_law import CHINCHILLA, CHINCHILLA_AS_PUBLISHED, ScalingLaw, fit_law

TRUE = ScalingLaw(1.2, 30.0, 80.0, 0.4, 0.35)
RUNS = [(n, d) for n in (1e4, 2e4, 5e4, 1e5) for d in (2.5e5, 5e5, 1e6, 2e6)]


def noisy(seed=0, spread=0.002):
    random = np.random.default_rng(seed)
    return [TRUE.loss(n, d) * float(np.exp(random.normal() * spread)) for n, d in RUNS]


def fit(losses, **settings):
    return fit_law([n for n, _ in RUNS], [d for _, d in RUNS], losses, **{"num_resamples": 20, **settings})


def test_a_known_law_is_found_again_and_predicts_a_larger_run_within_its_bar():
    found = fit(noisy())
    expected, low, high = found.predict(1e6, 8e6)
    assert abs(expected / TRUE.loss(1e6, 8e6) - 1) < 0.02
    assert low < expected < high and high - low < 0.15
    assert abs(found.law.size_power - 0.4) < 0.06 and abs(found.law.data_power - 0.35) < 0.06


def test_without_noise_the_constants_are_exact():
    found = fit(noisy(spread=0.0), num_resamples=2)
    assert found.residual < 1e-4
    assert found.law.irreducible == pytest.approx(1.2, rel=0.01)


def test_shuffled_losses_predict_nothing():
    losses = noisy()
    np.random.default_rng(1).shuffle(losses)
    found = fit(losses, num_resamples=2)
    assert abs(found.predict(1e6, 8e6)[0] / TRUE.loss(1e6, 8e6) - 1) > 0.1
    assert found.residual > 0.05


def test_what_is_best_for_a_budget_agrees_with_what_is_published():
    parameters, tokens = CHINCHILLA.size_for_flops(5.76e23)  # Gopher's budget; Chinchilla: 70e9 on 1.4e12 tokens
    assert 60e9 < parameters < 80e9 and 1.2e12 < tokens < 1.5e12
    assert 6 * parameters * tokens == pytest.approx(5.76e23)
    assert CHINCHILLA.tokens_for_size(parameters) == pytest.approx(tokens)
    assert CHINCHILLA.size_for_tokens(tokens) == pytest.approx(parameters)
    published, _ = CHINCHILLA_AS_PUBLISHED.size_for_flops(5.76e23)
    assert published < 0.6 * parameters  # the fit that stopped too early contradicts the paper's own model


def test_the_best_size_is_best():
    best, _ = TRUE.size_for_flops(1e15)
    losses = [TRUE.loss(best * factor, 1e15 / 6 / (best * factor)) for factor in (0.8, 1.0, 1.25)]
    assert min(losses) == losses[1]


@pytest.mark.parametrize(
    ("parameters", "tokens", "losses", "message"),
    [
        ([1e4] * 6, [1e5, 2e5, 3e5] * 2, [2.0] * 6, "6 runs of 1 sizes"),
        ([1e4, 2e4, 3e4] * 2, [1e5, 2e5, 3e5, 1e5, 2e5, 3e5], [2.0, float("nan")] * 3, "not above zero"),
    ],
)
def test_runs_that_fix_no_law_are_refused(parameters, tokens, losses, message):
    with pytest.raises(DataError, match=message):
        fit_law(parameters, tokens, losses)


def test_a_budget_below_zero_is_refused():
    with pytest.raises(ConfigError, match=r"flops is -1"):
        CHINCHILLA.size_for_flops(-1)
