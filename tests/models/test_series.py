"""Forecasts: windows without a look ahead, folds in order of time, and skill only where there is something to learn."""

import csv
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import modelwright as mw
from modelwright.base.errors import ConfigError, DataError
from modelwright.models.series import SeriesConfig, SeriesRegressor, cut_windows, fit_regressor, walk_forward
from modelwright.nn.init import init_weights


def seasonal(num=500):
    time = np.arange(num)
    noise = np.random.default_rng(0).normal(0, 0.1, num)
    return 50 + 0.05 * time + 3 * np.sin(2 * np.pi * time / 12) + noise


def random_walk(num=500):
    return 50 + np.random.default_rng(1).normal(0, 1, num).cumsum()


def test_windows_and_targets():
    inputs, targets = cut_windows(np.arange(6.0), window=3, horizon=2)
    assert inputs.tolist() == [[0, 1, 2], [1, 2, 3]] and targets.tolist() == [4, 5]


@pytest.mark.parametrize("horizon", [1, 3])
def test_a_fold_is_fitted_on_what_was_known_before_it(horizon):
    seen = []

    def fit(inputs, targets):
        seen.append((inputs.max(), targets.max()))

        def forecast(windows):
            # The newest value known when the first forecast of the fold is made is the last of its window.
            assert seen[-1][1] <= windows[0, -1]
            return windows[:, -1] + horizon

        return forecast

    found = walk_forward(np.arange(100.0), fit, window=5, horizon=horizon, num_folds=4)
    assert len(seen) == 4 and seen == sorted(seen)
    assert found.rmse == 0 and found.naive_rmse == horizon and found.skill == 1
    assert found.targets[0] == found.first_targets[0] and len(found.targets) == 100 - found.first_targets[0]


def test_an_lstm_beats_the_naive_forecast_on_a_season_and_not_on_a_random_walk():
    fit = partial(fit_regressor, config=SeriesConfig(window=24, hidden_size=16), num_steps=120, learning_rate=1e-2)
    walk = partial(walk_forward, fit=fit, window=24, num_folds=2)
    assert walk(seasonal()).skill > 0.8
    assert walk(random_walk()).skill < 0.05


def test_what_comes_later_changes_no_forecast():
    """Nothing leaks: values behind a fold may be anything. A forecaster that scales by the whole series is told."""
    values, later = random_walk(120), random_walk(120)
    later[80:] += 500  # everything from the last value of the first fold on
    fit = partial(fit_regressor, config=SeriesConfig(window=8, hidden_size=4), num_steps=4)
    forecasts = [walk_forward(v, fit, window=8, num_folds=3).forecasts for v in (values, later)]
    num = 80 - walk_forward(values, fit, window=8, num_folds=3).first_targets[0]
    assert 15 < num < 25 and np.array_equal(forecasts[0][:num], forecasts[1][:num])
    leaking = [walk_forward((v - v.mean()) / v.std(), fit, window=8, num_folds=3).forecasts for v in (values, later)]
    assert not np.allclose(leaking[0][:num], leaking[1][:num], rtol=0.1)


def test_untrained_it_is_the_naive_forecast_and_scale_does_not_matter():
    model = init_weights(SeriesRegressor(SeriesConfig(window=8)), 0, std=0.5).eval()
    windows = torch.randn(4, 8)
    with torch.no_grad():
        moved = model(1000 * windows + 5000)
        assert torch.allclose(moved, 1000 * model(windows) + 5000, rtol=1e-3)
        torch.nn.init.zeros_(model.output.weight)
        assert torch.equal(model(windows), windows[:, -1])
        assert torch.isfinite(model(torch.ones(1, 8))).all()  # a window without any spread


@torch.no_grad()
def test_a_saved_model_loads_as_it_was(tmp_path):
    model = init_weights(SeriesRegressor(SeriesConfig(window=8, cell="gru", num_layers=2)), 0, std=0.5).eval()
    mw.save_model(model, tmp_path)
    loaded = mw.load_model(tmp_path)
    windows = torch.randn(4, 8)
    assert loaded.config == model.config and torch.allclose(loaded(windows), model(windows), atol=1e-6)


def test_real_prices_are_close_to_a_random_walk():
    place = Path(os.environ.get("MODELWRIGHT_DATA", "")) / "series/aapl_daily.csv"
    if not place.is_file():
        pytest.skip("set MODELWRIGHT_DATA to a folder with series/aapl_daily.csv")
    with open(place, encoding="utf-8") as handle:
        prices = np.array([float(row["AAPL.Close"]) for row in csv.DictReader(handle)])
    fit = partial(fit_regressor, config=SeriesConfig(window=10, hidden_size=8), num_steps=60)
    found = walk_forward(prices, fit, window=10, num_folds=2)
    assert 0.8 * found.naive_rmse < found.rmse < 1.25 * found.naive_rmse  # honest: no magic here


def test_refusals():
    with pytest.raises(ConfigError, match="window is 1"):
        SeriesConfig(window=1)
    with pytest.raises(DataError, match="one row of finite numbers"):
        cut_windows(np.array([1.0, np.nan, 2.0]), 1)
    with pytest.raises(DataError, match="The series has 3 values; a window of 3"):
        cut_windows(np.arange(3.0), 3)
    with pytest.raises(DataError, match="windows are too few for 5 folds"):
        walk_forward(np.arange(8.0), lambda x, y: lambda w: w[:, -1], window=3)
