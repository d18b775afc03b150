"""Train a recurrent network on a series of values in a CSV file; judged against the last value and a linear model.

The file is cut in order of time: the last part is never seen in training. Walking forward over several folds is
`modelwright.models.series.walk_forward` (benchmarks/classical.py). Source: see `modelwright.models.series`.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from modelwright.base.errors import ConfigError, DataError
from modelwright.data.examples import ExampleLoader, SeriesBatch
from modelwright.models.series import SeriesConfig, SeriesRegressor, cut_windows
from modelwright.models.weights import save_model
from modelwright.nn.init import init_weights
from modelwright.train.heads import SeriesRegression
from modelwright.train.loop import Hook, LoopConfig
from modelwright.train.task_run import TaskParts, TaskResult, run_parts, task_loop


@dataclass(frozen=True)
class ForecastConfig:
    """A run from a CSV file to a forecaster's folder."""

    data: Path  # CSV file with a header, one row a day, oldest first
    column: str  # of the values, as the header spells it
    out: Path  # model folder to make
    base: Path | None = None  # nothing: a forecaster begins anew
    model: SeriesConfig = field(default_factory=SeriesConfig)
    validation_fraction: float = 0.2  # of the windows, the last ones
    epochs: float | None = 20.0  # passes over the windows; None: give loop.num_steps
    loop: LoopConfig = field(default_factory=lambda: task_loop(3e-3))

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 1.")
        if self.base is not None:
            raise ConfigError(f"base is {self.base}; a forecaster begins from random weights. Leave it out.")


def read_column(file: Path, column: str) -> np.ndarray:
    """Return a column of numbers of a CSV file.

    Raises:
        DataError: There is no such column, or a value is no finite number; it says which row.
    """
    try:
        with open(file, newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}. Give a CSV file with a header.") from error
    known = list(rows[0]) if rows else []
    if column not in known:
        raise DataError(f"{file} has no column {column!r}; it has {', '.join(known) or 'no rows'}. Name one of these.")
    values = np.zeros(len(rows))
    for i, row in enumerate(rows):
        try:
            values[i] = float(row[column])
        except (TypeError, ValueError):
            values[i] = np.nan
        if not np.isfinite(values[i]):
            raise DataError(f"{file}, row {i + 1} has {row[column]!r} for {column}; expected a number. Fill the gap.")
    return values


def fit_linear(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the weights of the least-squares line from a window and 1 to what follows, (window + 1,)."""
    return np.linalg.lstsq(np.column_stack([inputs, np.ones(len(inputs))]), targets, rcond=None)[0]


TIED = 0.01  # of the error: what is better by less is not called better


def verdict(figures: Mapping[str, float]) -> str:
    """Say which forecast was best on the held-out part, and plainly so when it is the last value.

    >>> verdict({"rmse": 1.4, "naive_rmse": 1.3, "linear_rmse": 1.5})
    'The last value is the best forecast here (error 1.3); this model, 1.4, adds nothing to it.'
    """
    ours = figures["rmse"]
    error, best = min((figures["naive_rmse"], "last value"), (figures["linear_rmse"], "linear model"))
    if ours < (1 - TIED) * error:
        return f"This model is the best forecast here (error {ours:.4g}); next is the {best}, {error:.4g}."
    more = f"is within {TIED:.0%} of it" if ours < error else "adds nothing to it"
    return f"The {best} is the best forecast here (error {error:.4g}); this model, {ours:.4g}, {more}."


def run_forecast(config: ForecastConfig, hooks: Sequence[Hook] = ()) -> TaskResult:
    """Train on the first part of the series, score on the last, and save.

    Raises:
        DataError: The file or the column cannot be used, or the series is too short.
    """
    return run_parts(config, prepare_forecast(config), hooks, name="forecast")


def prepare_forecast(config: ForecastConfig, device: str | None = None) -> TaskParts:
    """Return model, objective, data and score; the model is small and always has its numbers."""
    c = config.model
    windows = cut_windows(read_column(config.data, config.column), c.window, c.horizon)
    edge = int(len(windows.targets) * (1 - config.validation_fraction))
    known = edge - (c.horizon - 1)  # later targets lie behind the first held-out window
    if known < 2 or edge == len(windows.targets):
        raise DataError(
            f"{config.data} gives {len(windows.targets)} windows of {c.window}; too few to train on and judge."
        )
    inputs, targets = (torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32)) for a in windows)
    model = init_weights(SeriesRegressor(c), config.loop.seed)
    nn.init.zeros_(model.output.weight)  # type: ignore[union-attr, arg-type]  # the first forecast is the naive one

    def collate(numbers: Sequence[int], epoch: int) -> SeriesBatch:
        return SeriesBatch(inputs[list(numbers)], targets[list(numbers)])

    line = fit_linear(windows.inputs[:known], windows.targets[:known])
    seen, truth = windows.inputs[edge:], windows.targets[edge:]

    @torch.inference_mode()
    def score(model: nn.Module) -> dict[str, float]:
        guesses = {
            "rmse": model(inputs[edge:]).double().numpy(),
            "naive_rmse": seen[:, -1],
            "linear_rmse": np.column_stack([seen, np.ones(len(seen))]) @ line,
        }
        return {name: float(np.sqrt(np.mean((guess - truth) ** 2))) for name, guess in guesses.items()}

    loader = ExampleLoader(known, collate, config.loop.micro_batch_size, seed=config.loop.seed)
    return TaskParts(model, SeriesRegression(), loader, score, save_model)
