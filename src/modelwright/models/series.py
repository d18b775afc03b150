"""Forecasts of a time series by an LSTM over a window of the past, judged by walking forward.

Each window is scaled by its own mean and spread, so that a level never seen before is no obstacle, and the network
predicts the change from the window's last value in that scale: predicting nothing is the naive forecast, which is
what any forecast must beat. Walking forward, a model is fitted on everything before a fold and judged on the fold.
Source: Hochreiter & Schmidhuber 1997 (LSTM); Hyndman & Koehler 2006 (naive forecast, scaled errors);
Kim et al. 2022 (scaling each window). Not done: seasonal models, intervals.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, DataError
from modelwright.base.registry import lookup
from modelwright.models.fit import fit_steps
from modelwright.models.own_format import OwnFormat, fields_from_hf, fields_to_hf
from modelwright.nn import RECURRENT_CELLS
from modelwright.nn.init import init_weights
from modelwright.nn.recurrent import make_recurrent

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SeriesConfig:
    """How a forecaster is built."""

    window: int = 20  # values seen
    horizon: int = 1  # steps ahead of the one value predicted
    hidden_size: int = 32
    num_layers: int = 1
    cell: str = "lstm"  # rnn, lstm or gru

    def __post_init__(self) -> None:
        lookup(RECURRENT_CELLS, self.cell, "cell")
        for name, least in (("window", 2), ("horizon", 1), ("hidden_size", 1), ("num_layers", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}.")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "SeriesConfig":
        """Read a ``config.json`` of ours."""
        return fields_from_hf(cls, values)

    def to_hf(self) -> dict[str, Any]:
        """Return the ``config.json``."""
        return fields_to_hf(self, "series", "SeriesRegressor")


class SeriesRegressor(OwnFormat):
    """A window of values in, one value ``horizon`` steps ahead out."""

    config_class: ClassVar[type[SeriesConfig]] = SeriesConfig

    def __init__(self, config: SeriesConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(make_recurrent(config.cell, 1, config.hidden_size, config.num_layers))
        self.output = nn.Linear(config.hidden_size, 1)

    def forward(self, windows: Tensor) -> Tensor:
        """Map windows (B, window) to forecasts (B,), both in the series' own unit."""
        mean = windows.mean(1, keepdim=True)
        spread = windows.std(1, keepdim=True).clamp_min(1e-8)
        x = ((windows - mean) / spread)[..., None]  # (B, T, 1)
        for layer in self.layers:
            x = layer(x)  # (B, T, H)
        return windows[:, -1] + (self.output(x[:, -1]) * spread)[:, 0]


class Windows(NamedTuple):
    """Every window of a series with what follows it."""

    inputs: Floats  # (number, window)
    targets: Floats  # (number,)


def cut_windows(series: Floats, window: int, horizon: int = 1) -> Windows:
    """Return every window of a series and the value ``horizon`` steps behind it.

    >>> cut_windows(np.array([1.0, 2.0, 3.0, 4.0]), window=2).targets
    array([3., 4.])

    Raises:
        DataError: The series is not a row of finite numbers, or too short for one window.
    """
    series = np.asarray(series, dtype=np.float64)
    if series.ndim != 1 or not np.isfinite(series).all():
        raise DataError(
            f"The series has shape {series.shape}; expected one row of finite numbers. Fill the gaps first."
        )
    if len(series) < window + horizon:
        raise DataError(
            f"The series has {len(series)} values; a window of {window} and a target {horizon} ahead need "
            f"{window + horizon}. Give a longer series or a shorter window."
        )
    inputs = np.lib.stride_tricks.sliding_window_view(series[: len(series) - horizon], window)
    return Windows(inputs, series[window + horizon - 1 :])


class WalkForward(NamedTuple):
    """What walking forward found, over all folds."""

    forecasts: Floats
    naive: Floats  # the last value seen
    targets: Floats
    first_targets: tuple[int, ...]  # place in the series of each fold's first target

    @property
    def rmse(self) -> float:
        """Root mean squared error of the forecasts."""
        return float(np.sqrt(np.mean((self.forecasts - self.targets) ** 2)))

    @property
    def naive_rmse(self) -> float:
        """Root mean squared error of repeating the last value."""
        return float(np.sqrt(np.mean((self.naive - self.targets) ** 2)))

    @property
    def skill(self) -> float:
        """1 - (squared error / naive squared error): above 0 is better than naive, 1 perfect."""
        return 1 - (self.rmse / self.naive_rmse) ** 2


Fit = Callable[[Floats, Floats], Callable[[Floats], Floats]]  # windows and targets -> a forecaster of windows


def walk_forward(
    series: Floats, fit: Fit, *, window: int, horizon: int = 1, num_folds: int = 5, train_fraction: float = 0.5
) -> WalkForward:
    """Fit on everything before a fold, forecast the fold, move on.

    Args:
        series: The values in order of time.
        fit: Called once a fold with the windows and targets that lie wholly before it.
        window: Values that a forecast sees.
        horizon: Steps ahead.
        num_folds: Equal parts that what follows the first training part is cut into.
        train_fraction: How much of the windows stands before the first fold.

    Raises:
        DataError: The series is too short.
    """
    inputs, targets = cut_windows(series, window, horizon)
    edges = np.linspace(int(len(targets) * train_fraction), len(targets), num_folds + 1).astype(int)
    # The targets of the last `horizon - 1` windows before a fold lie behind the fold's first window: not yet known.
    if edges[0] - (horizon - 1) < 1 or np.any(np.diff(edges) < 1):
        raise DataError(
            f"{len(targets)} windows are too few for {num_folds} folds behind {train_fraction:.0%} of them. "
            "Give a longer series or fewer folds."
        )
    forecasts = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        known = start - (horizon - 1)
        forecasts.append(fit(inputs[:known], targets[:known])(inputs[start:stop]))
    first = tuple(int(e) + window + horizon - 1 for e in edges[:-1])
    kept = slice(edges[0], None)
    return WalkForward(np.concatenate(forecasts), inputs[kept, -1], targets[kept], first)


def fit_regressor(
    inputs: Floats,
    targets: Floats,
    config: SeriesConfig,
    *,
    seed: int = 0,
    num_steps: int = 300,
    learning_rate: float = 3e-3,
    batch_size: int = 64,
) -> Callable[[Floats], Floats]:
    """Train a `SeriesRegressor` on windows and return it as a function from windows to forecasts.

    The squared error is taken in each window's own scale, so that calm and wild stretches weigh the same.
    """
    model = SeriesRegressor(config)
    init_weights(model, seed)
    nn.init.zeros_(model.output.weight)  # the first forecast is the naive one
    x, y = (torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32)) for a in (inputs, targets))
    generator = torch.Generator().manual_seed(seed)

    def loss_at(step: int) -> Tensor:
        rows = torch.randint(len(x), (min(batch_size, len(x)),), generator=generator)
        scale = x[rows].std(1).clamp_min(1e-8)
        return (((model(x[rows]) - y[rows]) / scale) ** 2).mean()

    fit_steps(model, loss_at, num_steps, learning_rate=learning_rate)

    @torch.no_grad()
    def forecast(windows: Floats) -> Floats:
        return model(torch.from_numpy(np.ascontiguousarray(windows, dtype=np.float32))).double().numpy()

    return forecast


ARCHITECTURES = {"SeriesRegressor": SeriesRegressor}
