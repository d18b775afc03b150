"""Searching settings: better than the default and than random draws of a toy, resumable, and what is wrong is said."""

import math

import pytest

from modelwright.base.errors import ConfigError, DataError
from modelwright.train.tune import Range, read_space, search

SPACE = {"rate": Range(1e-5, 1.0, log=True), "width": Range(choices=(1, 2, 4))}
DEFAULT = {"rate": 0.5, "width": 1}


def toy(settings, report):
    return (math.log10(settings["rate"]) + 3) ** 2 + (0 if settings["width"] == 4 else 1)


def test_a_search_beats_the_default_and_random_draws():
    pytest.importorskip("optuna")
    ours = [search(toy, SPACE, 25, seed=seed).best.loss for seed in range(3)]
    random = [search(toy, SPACE, 25, seed=seed, sampler="random").best.loss for seed in range(3)]
    assert sorted(ours)[1] < sorted(random)[1] < toy(DEFAULT, None)


def test_where_nothing_depends_on_the_settings_the_search_finds_nothing():
    pytest.importorskip("optuna")
    found = search(lambda settings, report: 1.0, SPACE, 5)
    assert {trial.loss for trial in found.trials} == {1.0}


def test_a_killed_search_goes_on(tmp_path):
    pytest.importorskip("optuna")
    calls = []

    def objective(settings, report):
        calls.append(settings)
        return toy(settings, report)

    search(objective, SPACE, 3, storage=tmp_path / "s.sqlite")
    found = search(objective, SPACE, 5, storage=tmp_path / "s.sqlite")
    assert len(calls) == len(found.trials) == 5


def test_a_trial_that_fails_or_is_stopped_does_not_win():
    pytest.importorskip("optuna")

    def objective(settings, report):
        if settings["width"] == 2:
            raise ConfigError("width is 2; it must not be.")
        return math.nan if settings["width"] == 1 else 3.0

    found = search(objective, SPACE, 12)
    assert found.best.settings["width"] == 4
    assert {trial.state for trial in found.trials} == {"complete", "failed"}
    with pytest.raises(DataError, match="None of 2 trials"):
        search(lambda settings, report: math.nan, SPACE, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "must map settings"),
        ({"a": {"low": 2, "high": 1}}, "low must be less"),
        ({"a": {"low": 0, "high": 1, "log": True}}, "above 0"),
        ({"a": {"min": 1}}, "give low and high"),
        ({"a": []}, "or none"),
    ],
)
def test_a_space_that_is_none_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        read_space(values)


def test_whole_numbers_stay_whole():
    assert read_space({"a": {"low": 1, "high": 8}, "b": [1, 2]})["a"].is_whole
    assert not read_space({"a": {"low": 1.0, "high": 8}})["a"].is_whole


@pytest.mark.slow
@pytest.mark.peer
def test_ray_draws_side_by_side():
    pytest.importorskip("ray.tune")
    from modelwright.train.tune import search_on_ray

    assert search_on_ray(toy, SPACE, 4).best.loss is not None
