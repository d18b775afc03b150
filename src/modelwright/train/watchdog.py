"""The watchdog: looks at every loss and gradient norm before the weights are touched.

A step that is not finite, or whose loss stands far above the recent ones, is not applied: its batch is skipped. Some
of those in a row mean that the weights are bad, not the batch: the run goes back to a checkpoint and on with the data
that comes next, as PaLM did by hand. When that does not help, or there is no checkpoint, a run that is not finite or
stands above where it began is stopped with the reason; a new level that is finite and lower than that is accepted.

Source: Chowdhery et al. 2022, arXiv:2204.02311, section 5.1 (go back, skip the batches around the spike).
Not done: looking at the norms of single layers.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from modelwright.base.errors import ConfigError
from modelwright.base.logs import get_logger

logger = get_logger(__name__)
MIN_SEEN = 20  # losses needed before one of them can be called a spike
# Median absolute deviations are turned into standard ones of a normal distribution, and floored: the loss of a run
# that hardly varies would else make a spike of every ripple.
TO_SIGMA, FLOOR_FRACTION = 1.4826, 0.02
# A loss this many times the first one is no level that a run may come to, nor one of the recent ones: at a rate of 50
# the first update takes 8.3 nats to 490, and a median of such losses would find nothing odd any more. The absolute
# part is for losses that begin near zero.
FAR_FACTOR, FAR_ABSOLUTE = 10.0, 10.0


@dataclass(frozen=True)
class WatchdogConfig:
    """What is taken for a spike, and how often the run helps itself."""

    spike_deviations: float | None = 12.0  # robust standard deviations above the recent median; None: only NaN counts
    window: int = 64  # losses that are the recent ones
    max_skips: int = 3  # steps skipped in a row before the weights are suspected
    max_rollbacks: int = 2  # returns to a checkpoint; 0: the run stops at once

    def __post_init__(self) -> None:
        for name in ("max_skips", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loop.watchdog.{name} is {getattr(self, name)}; it must be 0 or more.")
        if self.window < MIN_SEEN or (self.spike_deviations is not None and not self.spike_deviations > 0):
            raise ConfigError(
                f"loop.watchdog has window {self.window} and spike_deviations {self.spike_deviations}; the window "
                f"must be at least {MIN_SEEN}, the deviations above 0 or none."
            )


class Watchdog:
    """Judges each step of one run; its memory is part of every checkpoint."""

    def __init__(self, config: WatchdogConfig):
        self.config = config
        self.recent: list[float] = []
        self.began: float | None = None  # loss of the first step
        self.first: float | None = None  # median loss of the first steps
        self._is_finite = True  # the loss and the gradient of the step that was judged last
        self.num_in_row = 0
        self.num_rollbacks = 0
        self.skipped: list[tuple[int, str]] = []  # steps not applied, and why
        self.wants_rollback = False

    def is_good(self, step: int, loss: float, norm: float) -> bool:
        """Tell whether the step may be applied; remember it if so, count it as skipped if not."""
        reason = self._reason(loss, norm)
        if not reason:
            self.num_in_row = 0
            self.began = loss if self.began is None else self.began
            self.recent = [*self.recent, loss][-self.config.window :]
            if self.first is None and len(self.recent) == MIN_SEEN:
                self.first = statistics.median(self.recent)
            return True
        self.skip(step, reason)
        return False

    def skip(self, step: int, reason: str) -> None:
        """Count a step that was not applied; after too many in a row, ask for a return to a checkpoint."""
        self.skipped.append((step, reason))
        self.num_in_row += 1
        logger.warning("step %d is skipped: %s", step, reason)
        self.wants_rollback = self.num_in_row > self.config.max_skips

    def _reason(self, loss: float, norm: float) -> str:
        self._is_finite = math.isfinite(loss) and math.isfinite(norm)
        if not self._is_finite:
            return f"the loss or gradient is not finite (loss {loss}, gradient norm {norm})"
        if self.config.spike_deviations is None:
            return ""
        if len(self.recent) >= MIN_SEEN:
            middle = statistics.median(self.recent)
            spread = TO_SIGMA * statistics.median(abs(value - middle) for value in self.recent)
            limit = middle + self.config.spike_deviations * max(spread, FLOOR_FRACTION * abs(middle))
            if loss > limit:
                return f"the loss {loss:.4g} is a spike; the recent median is {middle:.4g}, the limit {limit:.4g}"
        if self.began is not None and loss > FAR_FACTOR * abs(self.began) + FAR_ABSOLUTE:
            return f"the loss {loss:.4g} is far above {self.began:.4g}, where the run began"
        return ""

    def may_roll_back(self) -> bool:
        """Tell whether a return to a checkpoint is left."""
        return self.num_rollbacks < self.config.max_rollbacks

    def accept_or_stop(self, step: int, loss: float) -> None:
        """With no checkpoint to go to: take a new level for what it is if its gradients are finite too, or stop.

        Raises:
            ConfigError: The loss is not finite, or the run diverges.
        """
        self.wants_rollback = False
        reason = self.skipped[-1][1]
        first = self.began if self.first is None else self.first
        if self._is_finite and math.isfinite(loss) and (first is None or loss < first):
            logger.warning("step %d: the new level of the loss (%.4g) is accepted", step, loss)
            self.recent, self.num_in_row = [], 0
            return
        began = "" if first is None else f" The run began at a loss of {first:.4g}: it diverges."
        raise ConfigError(
            f"Training stopped at step {step}: {self.num_in_row} steps in a row could not be applied, the last because "
            f"{reason}.{began} The weights are those before these steps. Lower the optimizer's learning rates or "
            "loop.max_grad_norm, lengthen loop.schedule.warmup_steps, or look for broken rows in the data."
        )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        names = ("recent", "began", "first", "num_in_row", "num_rollbacks", "skipped")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to what `state` returned."""
        for name, value in state.items():
            setattr(self, name, value)
        self.skipped = [(int(step), str(reason)) for step, reason in self.skipped]
        self.wants_rollback = False
