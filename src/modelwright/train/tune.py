"""Hyper-parameter search: settings are drawn from a space, short runs are judged, and the best settings come back.

Optuna proposes (TPE by default, or plain random draws) and keeps its trials in a SQLite file, so that a killed search
goes on. A trial that is clearly worse than the others at the same step is stopped (median rule). On a Ray cluster
trials run side by side (`search_on_ray`).

A space is a mapping from a setting's path to its range:

    loop.optimizer.adamw.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
    loop.micro_batch_size: {choices: [4, 8, 16]}

Source: Bergstra et al. 2011 (TPE); Akiba et al. 2019, arXiv:1907.10902 (Optuna). Not done: Hyperband.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelwright.base.errors import ConfigError, DataError, MissingExtraError

Report = Callable[[int, float], bool]  # (step, loss so far) -> whether to go on
Objective = Callable[[dict[str, Any], Report], float]  # settings by path -> loss, less is better


@dataclass(frozen=True)
class Range:
    """The values that one setting may take: choices, or numbers from low to high."""

    low: float | None = None
    high: float | None = None
    log: bool = False  # drawn evenly in its logarithm
    is_whole: bool = False
    choices: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        if self.choices is not None:
            if not self.choices or self.low is not None or self.high is not None:
                raise ConfigError(f"A range has choices {self.choices} beside low or high, or none. Give one kind.")
            return
        if self.low is None or self.high is None or not self.low < self.high or (self.log and self.low <= 0):
            raise ConfigError(
                f"A range goes from {self.low} to {self.high} (log: {self.log}); low must be less than high, and "
                "above 0 for log. Or give choices."
            )


@dataclass(frozen=True)
class Trial:
    """One set of settings and how it did."""

    settings: dict[str, Any]
    loss: float | None  # None: stopped, or failed
    state: str  # complete, stopped or failed


@dataclass(frozen=True)
class Search:
    """What a search found."""

    best: Trial
    trials: tuple[Trial, ...]


def read_space(values: Mapping[str, Any]) -> dict[str, Range]:
    """Return a space from what a YAML file holds.

    Raises:
        ConfigError: A range is not one.
    """
    if not isinstance(values, Mapping) or not values:
        raise ConfigError(f"The space is {values!r}; it must map settings to ranges: {{path: {{low: 1, high: 2}}}}.")
    space = {}
    for path, given in values.items():
        if isinstance(given, list):
            given = {"choices": given}
        if not isinstance(given, Mapping) or set(given) - {"low", "high", "log", "choices"}:
            raise ConfigError(f"{path} is {given!r}; give low and high (and log: true), or choices.")
        whole = isinstance(given.get("low"), int) and isinstance(given.get("high"), int)
        choices = given.get("choices")
        space[path] = Range(
            given.get("low"),
            given.get("high"),
            bool(given.get("log", False)),
            whole,
            None if choices is None else tuple(choices),
        )
    return space


def search(
    objective: Objective,
    space: Mapping[str, Range],
    num_trials: int,
    *,
    storage: Path | None = None,
    seed: int = 0,
    sampler: str = "tpe",
) -> Search:
    """Let Optuna draw settings, run the objective on them, and return the best.

    Args:
        objective: Runs one trial; it calls its report now and then, and ends early when that says False.
        space: What is drawn.
        num_trials: All together, those of an earlier, killed search in ``storage`` included.
        storage: SQLite file; None: in memory.
        seed: Of the draws.
        sampler: tpe or random.

    Raises:
        MissingExtraError: Optuna is not installed.
        DataError: No trial ended with a finite loss.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", "tune", "A search of hyper-parameters") from error
    if num_trials < 1 or sampler not in ("tpe", "random"):
        raise ConfigError(f"trials is {num_trials}, sampler {sampler!r}; give at least 1 trial, and tpe or random.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = optuna.samplers.TPESampler(seed=seed) if sampler == "tpe" else optuna.samplers.RandomSampler(seed=seed)
    study = optuna.create_study(
        study_name="modelwright",
        storage=None if storage is None else f"sqlite:///{storage.resolve()}",
        load_if_exists=True,
        sampler=made,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
    )

    def run(trial: Any) -> float:
        settings = {path: _draw(trial, path, one) for path, one in space.items()}

        def report(step: int, loss: float) -> bool:
            trial.report(loss, step)
            return not trial.should_prune()

        loss = objective(settings, report)
        if trial.should_prune():
            raise optuna.TrialPruned
        return loss if math.isfinite(loss) else math.nan  # Optuna counts NaN as failed

    ended = sum(trial.state.is_finished() for trial in study.trials)
    if num_trials > ended:
        study.optimize(run, n_trials=num_trials - ended, catch=(ConfigError,))
    names = {"COMPLETE": "complete", "PRUNED": "stopped"}
    trials = tuple(
        Trial(dict(t.params), t.value if t.state.name == "COMPLETE" else None, names.get(t.state.name, "failed"))
        for t in study.trials
    )
    return _best(trials)


def _draw(trial: Any, path: str, one: Range) -> Any:
    if one.choices is not None:
        return trial.suggest_categorical(path, list(one.choices))
    if one.is_whole:
        return trial.suggest_int(path, int(one.low or 0), int(one.high or 0), log=one.log)
    return trial.suggest_float(path, one.low, one.high, log=one.log)


def _best(trials: tuple[Trial, ...]) -> Search:
    ended = [trial for trial in trials if trial.loss is not None]
    if not ended:
        raise DataError(f"None of {len(trials)} trials ended with a finite loss. Narrow the space, or lower its rates.")
    return Search(min(ended, key=lambda trial: trial.loss or 0.0), trials)


def search_on_ray(objective: Objective, space: Mapping[str, Range], num_trials: int, *, seed: int = 0) -> Search:
    """Draw settings at random and run the trials side by side on a Ray cluster.

    Args:
        objective: As for `search`; it and what it holds are sent to the workers.
        space: What is drawn.
        num_trials: How many.
        seed: Of the draws.

    Raises:
        MissingExtraError: Ray Tune is not installed.
        DataError: No trial ended with a finite loss.
    """
    try:
        from ray import tune
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "A search on a cluster") from error

    def run(settings: dict[str, Any]) -> dict[str, float]:
        return {"loss": objective(dict(settings), lambda step, loss: True)}

    drawn = {path: _ray_domain(tune, one) for path, one in space.items()}
    from ray.tune.search.basic_variant import BasicVariantGenerator

    config = tune.TuneConfig(
        metric="loss", mode="min", num_samples=num_trials, search_alg=BasicVariantGenerator(random_state=seed)
    )
    results = tune.Tuner(run, param_space=drawn, tune_config=config).fit()
    trials = []
    for index in range(len(results)):
        one = results[index]
        loss = (one.metrics or {}).get("loss")
        is_good = one.error is None and loss is not None and math.isfinite(loss)
        trials.append(Trial(dict(one.config or {}), loss if is_good else None, "complete" if is_good else "failed"))
    return _best(tuple(trials))


def _ray_domain(tune: Any, one: Range) -> Any:
    if one.choices is not None:
        return tune.choice(list(one.choices))
    if one.is_whole:
        low, high = int(one.low or 0), int(one.high or 0) + 1  # Ray leaves the upper end out
        return tune.lograndint(low, high) if one.log else tune.randint(low, high)
    return (tune.loguniform if one.log else tune.uniform)(one.low, one.high)
