"""The law of scale: how a language model's loss falls with parameters and tokens, and what follows.

    L(N, D) = E + A / N^alpha + B / D^beta                    C = 6 N D
    N_opt(C) = G (C/6)^(beta/(alpha+beta)),   D_opt(C) = (C/6) / N_opt,   G = (alpha A / (beta B))^(1/(alpha+beta))

A law is fitted to runs by the robust loss of their logarithms (Huber, delta 1e-3), from a grid of beginnings; its error
bars come from fits to runs drawn with replacement.

Source: Hoffmann et al. 2022, arXiv:2203.15556, section 3.3 (approach 3) and appendix D.3; `CHINCHILLA` is the fit to
the same runs by Besiroglu et al. 2024, arXiv:2404.10102, table 1: the published one had stopped too early.
Not done: data that is read more than once (Muennighoff et al. 2023).
Symbols: N parameters, D tokens, C FLOPs of training.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modelwright.base.errors import ConfigError, DataError

HUBER_DELTA = 1e-3  # in the logarithm of the loss, as in the paper
NUM_ITERATIONS = 150
MIN_RUNS = 6  # one more than the law has constants


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = irreducible + size_factor / N^size_power + data_factor / D^data_power, in nats a token."""

    irreducible: float
    size_factor: float
    data_factor: float
    size_power: float
    data_power: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the loss that a run is expected to end with.

        >>> round(CHINCHILLA.loss(70e9, 1.4e12), 2)
        1.97
        """
        return float(
            self.irreducible
            + self.size_factor * parameters**-self.size_power
            + self.data_factor * tokens**-self.data_power
        )

    @property
    def _balance(self) -> float:
        ratio = self.size_power * self.size_factor / (self.data_power * self.data_factor)
        return float(ratio ** (1 / (self.size_power + self.data_power)))

    def size_for_flops(self, flops: float) -> tuple[float, float]:
        """Return the parameters and tokens that end with the least loss for so many FLOPs.

        >>> n, d = CHINCHILLA.size_for_flops(5.76e23)  # what Chinchilla was given: 70e9 parameters, 1.4e12 tokens
        >>> f"{n:.1e} {d:.1e}"
        '7.2e+10 1.3e+12'
        """
        _check_positive("flops", flops)
        share = self.data_power / (self.size_power + self.data_power)
        parameters = self._balance * (flops / 6) ** share
        return parameters, flops / 6 / parameters

    def tokens_for_size(self, parameters: float) -> float:
        """Return the tokens with which a model of this size is the best one for its FLOPs."""
        _check_positive("parameters", parameters)
        share = self.data_power / (self.size_power + self.data_power)
        return float((parameters / self._balance) ** (1 / share) / parameters)

    def size_for_tokens(self, tokens: float) -> float:
        """Return the parameters with which a run over so many tokens is the best one for its FLOPs."""
        _check_positive("tokens", tokens)
        share = self.size_power / (self.size_power + self.data_power)
        return float((tokens * self._balance) ** (1 / share) / tokens)


CHINCHILLA = ScalingLaw(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
CHINCHILLA_AS_PUBLISHED = ScalingLaw(1.69, 406.4, 410.7, 0.34, 0.28)  # Hoffmann et al. 2022, equation 10


@dataclass(frozen=True)
class FittedLaw:
    """A law and how sure one can be of it."""

    law: ScalingLaw
    resampled: tuple[ScalingLaw, ...]  # fits to runs drawn with replacement
    residual: float  # root of the mean square difference of the logarithms

    def interval(self, values: Sequence[float], level: float = 0.9) -> tuple[float, float]:
        """Return the middle ``level`` of some figure's values over the resampled fits."""
        low, high = np.quantile(np.asarray(values), [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def predict(self, parameters: float, tokens: float) -> tuple[float, float, float]:
        """Return the expected loss of a run, and the ends of its interval of 90 %."""
        low, high = self.interval([law.loss(parameters, tokens) for law in self.resampled])
        return self.law.loss(parameters, tokens), low, high


def fit_law(
    parameters: Sequence[float],
    tokens: Sequence[float],
    losses: Sequence[float],
    *,
    num_resamples: int = 200,
    seed: int = 0,
) -> FittedLaw:
    """Fit the law to runs.

    Raises:
        DataError: There are too few runs, sizes or amounts of data, or a figure is not above zero.
    """
    runs = np.array([parameters, tokens, losses], dtype=np.float64)  # (3, runs)
    if runs.shape[1] < MIN_RUNS or len(set(parameters)) < 3 or len(set(tokens)) < 3:
        raise DataError(
            f"A scaling law has five constants; {runs.shape[1]} runs of {len(set(parameters))} sizes and "
            f"{len(set(tokens))} amounts of data do not fix them. Give at least {MIN_RUNS} runs, 3 sizes and 3 amounts."
        )
    if not (np.isfinite(runs).all() and (runs > 0).all()):
        raise DataError("A run has a size, an amount of tokens or a loss that is not above zero. Leave it out.")
    logs = torch.from_numpy(np.log(runs))
    starts = _starts(float(losses[int(np.argmin(losses))]))
    weights = torch.ones(len(starts), runs.shape[1], dtype=torch.float64)
    found, errors = _descend(starts, logs, weights)
    best = found[errors.argmin()]
    nearest = found[errors.argsort()[:4]]
    generator, num_runs = np.random.default_rng(seed), runs.shape[1]
    drawn = generator.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=num_resamples)
    counts = torch.from_numpy(drawn.astype(np.float64)).repeat_interleave(len(nearest), 0)
    again, errors = _descend(nearest.repeat(num_resamples, 1), logs, counts)  # all resamples from all beginnings
    best_of = errors.view(num_resamples, -1).argmin(1)
    resampled = [_law(row) for row in again.view(num_resamples, -1, 5)[torch.arange(num_resamples), best_of]]
    difference, _ = _residual(best[None], logs)
    return FittedLaw(_law(best), tuple(resampled), float(difference.square().mean().sqrt()))


def _starts(lowest: float) -> Tensor:
    """Return beginnings (starts, 5) of a, b, e, alpha, beta; a, b, e are logarithms."""
    grid = itertools.product((0.0, 3.0, 6.0), (0.0, 3.0, 6.0), (0.3, 0.7, 0.95), (0.2, 0.5, 0.9), (0.2, 0.5, 0.9))
    rows = [(a, b, math.log(lowest * share), alpha, beta) for a, b, share, alpha, beta in grid]
    return torch.tensor(rows, dtype=torch.float64)


def _residual(theta: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """Return log L_predicted - log L (starts, runs), and its derivative (starts, runs, 5)."""
    a, b, e, alpha, beta = theta.T[:, :, None]  # each (starts, 1)
    terms = torch.stack([a - alpha * logs[0], b - beta * logs[1], e.expand(-1, logs.shape[1])], -1)
    shares = terms.softmax(-1)  # (starts, runs, 3)
    slopes = [shares[..., 0], shares[..., 1], shares[..., 2], -shares[..., 0] * logs[0], -shares[..., 1] * logs[1]]
    return terms.logsumexp(-1) - logs[2], torch.stack(slopes, -1)


def _descend(theta: Tensor, logs: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Levenberg and Marquardt's method on reweighted squares, for all beginnings at once."""
    damping = torch.full((len(theta), 1), 1e-2, dtype=torch.float64)
    residual, slopes = _residual(theta, logs)
    error = _huber(residual, counts)
    unit = torch.eye(5, dtype=torch.float64)
    for _ in range(NUM_ITERATIONS):
        weights = counts / residual.abs().clamp_min(HUBER_DELTA)
        gradient = torch.einsum("krp,kr->kp", slopes, weights * residual)
        curvature = torch.einsum("krp,kr,krq->kpq", slopes, weights, slopes)
        scale = curvature.diagonal(dim1=1, dim2=2).clamp_min(1e-12)
        step = torch.linalg.solve(curvature + unit * (damping * scale + 1e-12)[:, None, :], gradient)
        tried = theta - step
        tried[:, 3:].clamp_(0.01, 3.0)
        new_residual, new_slopes = _residual(tried, logs)
        new_error = _huber(new_residual, counts)
        better = (new_error < error)[:, None]
        theta = torch.where(better, tried, theta)
        residual = torch.where(better, new_residual, residual)
        slopes = torch.where(better[:, :, None], new_slopes, slopes)
        error = torch.where(better[:, 0], new_error, error)
        damping = torch.where(better, damping / 3, damping * 4).clamp(1e-9, 1e9)
    return theta, error


def _huber(residual: Tensor, counts: Tensor) -> Tensor:
    size = residual.abs()
    value = torch.where(size < HUBER_DELTA, size.square() / 2, HUBER_DELTA * (size - HUBER_DELTA / 2))
    return torch.nan_to_num((value * counts).sum(-1), nan=math.inf)


def _law(theta: Tensor) -> ScalingLaw:
    a, b, e, alpha, beta = theta.tolist()
    return ScalingLaw(math.exp(e), math.exp(a), math.exp(b), alpha, beta)


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name} is {value}; it must be a number above 0.")
