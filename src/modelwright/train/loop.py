"""The one training loop: it owns when things happen; the objective owns what happens in a step.

A step takes ``grad_accum_steps`` micro-batches from the loader, hands them to the objective, saves a checkpoint when
one is due, and then calls the hooks: an evaluation that fails costs no step. Everything that decides the course of a
run (weights, their average, optimizer state, step, place in the data, random state, scale of the loss, the watchdog's
memory) is in the checkpoint, so a killed run that is taken up again ends bit for bit where an uninterrupted one would
have, on CPU.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn

from modelwright.base import distributed
from modelwright.base.device import can_compile, pick_device
from modelwright.base.errors import ConfigError
from modelwright.base.progress import bar, console, track
from modelwright.nn.float8 import leave_float8
from modelwright.optim.build import OptimizerConfig, make_optimizer
from modelwright.optim.ema import Ema, EmaConfig
from modelwright.optim.parts import local_part
from modelwright.optim.schedule import ScheduleConfig, make_schedule
from modelwright.train.batches import check_batch
from modelwright.train.checkpoint import CheckpointConfig, CheckpointWriter, restore_newest, roll_back
from modelwright.train.layout import Layout as Layout
from modelwright.train.lengths import LengthConfig, cut_rows, length_at
from modelwright.train.memory import explain_out_of_memory
from modelwright.train.objective import Objective, StepReport
from modelwright.train.parallel import ParallelConfig, make_layout
from modelwright.train.precision import Precision, check_precision
from modelwright.train.recompute import RecomputeConfig, apply_recompute
from modelwright.train.speed import Speedometer
from modelwright.train.watchdog import Watchdog, WatchdogConfig

Hook = Callable[["Run", StepReport], None]

# A step of a 15M model in bfloat16, 8 rows of 512: peak of the process 1,471 MB and 1.61 s with all of them, 1,249 MB
# and 1.84 s with 0.8, 1,213 MB and 1.73 s with 0.6, 1,083 MB and 1.80 s with 0.4 (medians of seven, spread 0.4 s).
COMPILED_ACTIVATIONS = 0.6


@dataclass(frozen=True)
class LoopConfig:
    """When things happen."""

    num_steps: int | None = None  # optimizer updates; None: derived by the method from its budget
    micro_batch_size: int = 16  # rows a forward pass
    grad_accum_steps: int = 1  # micro-batches an update
    max_grad_norm: float | None = 1.0  # None: no clipping
    precision: str | None = None  # bf16, fp16 or fp8 (products; weights are float32) or fp32; None: bf16 where fast
    compile: bool | None = None  # torch.compile the loss; None: where a compiler is found and the run is long enough
    device: str | None = None  # None: a GPU where there is one, else the CPU
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    lengths: LengthConfig | None = None  # rows that begin short; None: whole from the first step on
    ema: EmaConfig | None = None  # None: the model ends as the last weights, not as their moving average
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # how the processes of a launch share the work

    def __post_init__(self) -> None:
        for name in ("num_steps", "micro_batch_size", "grad_accum_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"loop.{name} is {value}; it must be at least 1.")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ConfigError(
                f"loop.max_grad_norm is {self.max_grad_norm}; it must be above 0, or none for no clipping."
            )
        check_precision(self.precision)


# Compilation costs about 20 s; shorter runs than this many steps do not earn it back.
MIN_STEPS_TO_COMPILE = 200


class Loader(Protocol):
    """Where batches come from; `modelwright.data.load.RowLoader` is one."""

    def next_batch(self) -> Any:
        """Return the next micro-batch, a frozen dataclass of tensors with a method ``to``."""
        ...

    def state(self) -> dict[str, int]:
        """Return the place in the data, as JSON can hold it."""
        ...

    def load_state(self, state: dict[str, int]) -> None:
        """Go to a place that `state` returned."""
        ...


class Run:
    """One training run in progress: the state that a checkpoint saves, and the means to do a step."""

    def __init__(
        self, model: nn.Module, objective: Objective, loader: Loader, config: LoopConfig, layout: Layout | None = None
    ):
        if config.num_steps is None:
            raise ConfigError("loop.num_steps is not given and was not derived; set it to the number of updates.")
        self.config = config
        self.num_steps = config.num_steps
        self.device = pick_device(config.device)
        self.precision = Precision(config.precision, self.device)
        self.layout = layout or make_layout(config.parallel, self.device, self.precision.name)
        self.layout.check(config)
        apply_recompute(model, config.recompute)
        self.model = self.layout.place(self.precision.convert(model).train(), self.device)
        self.objective = objective
        self.loader = loader
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.ema = Ema(self.model, config.ema) if config.ema is not None else None
        self.factor = make_schedule(config.schedule, config.num_steps)
        self.watchdog = Watchdog(config.watchdog)
        self.step = 0
        self.losses: list[tuple[int, float]] = []
        self.last_rollback: Path | None = None
        self._is_updated = False
        is_compiled = config.compile
        if is_compiled is None:
            is_long = config.num_steps >= MIN_STEPS_TO_COMPILE
            is_compiled = can_compile() and is_long and not self.layout.is_parallel
        self.is_compiled = is_compiled
        self._loss = _compile_loss(objective) if is_compiled else objective.loss

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the loss is computed."""
        return self.precision.autocast()

    def compiled_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the objective's loss, through the compiled version when there is one."""
        return self._loss(model, batch)

    def sum_over_ranks(self, value: Tensor | float) -> float:
        """Return the sum of a number over the ranks that see different data."""
        return float(
            distributed.sum_over_ranks(
                torch.as_tensor(value, dtype=torch.float64, device=self.device), self.layout.group
            )
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a part of the step's loss, already divided by what the whole step is divided by."""
        (loss * (self.precision.scale * self.layout.gradient_factor)).backward()

    def update(self, loss: float) -> float:
        """Clip the gradients, let the watchdog judge, update the weights and forget the gradients.

        Args:
            loss: Mean loss of the step, the same on every rank.

        Returns:
            The gradient norm before clipping.
        """
        named = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        self.precision.unscale([local_part(gradient) for _, gradient in named])
        norm = self.layout.clip(named, self.config.max_grad_norm)
        self._is_updated = not self.precision.has_overflowed(norm) and self.watchdog.is_good(self.step + 1, loss, norm)
        if self._is_updated:
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update()
        self.optimizer.zero_grad()
        return norm

    def do_step(self) -> StepReport:
        """Take the next micro-batches and let the objective do one step.

        Raises:
            DataError: A batch cannot be trained on.
            DeviceError: The memory is not enough; the message says what to change.
        """
        start = time.perf_counter()
        self.optimizer.set_factor(self.factor(self.step))
        batches = self.layout.next_batches(self.loader, self.config.grad_accum_steps)
        for batch in batches:
            check_batch(self.model, batch)
        if self.config.lengths is not None:
            row_len = batches[0].input_ids.shape[1]
            batches = [cut_rows(b, length_at(self.step, row_len, self.config.lengths)) for b in batches]
        batches = [self.layout.part_of(batch) for batch in batches]
        self._is_updated = False
        with explain_out_of_memory(self.config):
            loss, num_trained, norm = self.objective.step(self, batches)
        self.step += 1
        if math.isfinite(loss):
            self.losses.append((self.step, loss))
        return StepReport(
            step=self.step,
            loss=loss,
            num_tokens=sum(self.objective.count_processed(batch) for batch in batches) * self.layout.num_parts,
            num_trained_tokens=num_trained,
            gradient_norm=norm,
            learning_rate=next(self.optimizer.groups())["lr"],
            seconds=time.perf_counter() - start,
            is_skipped=not self._is_updated,
        )


def _compile_loss(objective: Objective) -> Callable[[nn.Module, Any], Tensor]:
    """Compile the loss with the batch's tensors as plain arguments; the shapes of a run are fixed.

    The compiler computes the cheapest activations again in the backward pass, until those that are kept take
    `COMPILED_ACTIVATIONS` of what they would.
    """

    def plain(model: nn.Module, kind: type, values: tuple[Any, ...]) -> Tensor:
        return objective.loss(model, kind(*values))

    compiled = torch.compile(plain, dynamic=False)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with functorch_config.patch(activation_memory_budget=COMPILED_ACTIVATIONS):
            return compiled(model, type(batch), tuple(vars(batch).values()))

    return loss


def train(
    model: nn.Module,
    objective: Objective,
    loader: Loader,
    config: LoopConfig,
    *,
    folder: Path | None = None,
    hooks: Sequence[Hook] = (),
    name: str = "train",
    layout: Layout | None = None,
) -> Run:
    """Train the model in place to the last step, taking up the newest checkpoint in ``folder`` if there is one.

    Args:
        model: Its trainable parameters are changed; float32 weights are kept whatever the precision.
        objective: What a step is.
        loader: Where batches come from; a fresh one, its place is restored from a checkpoint.
        config: When things happen.
        folder: Where checkpoints go; needed when ``checkpoint.every`` is set.
        hooks: Called with the run and the report after each step, and after a checkpoint that is due.
        name: Shown beside the progress bar.
        layout: How the model lies on devices; None: this process alone.

    Raises:
        ConfigError: The checkpoint was made with other settings, or the run diverges.
        DataError: A batch cannot be trained on.
        DeviceError: The memory or the disk is full.
        CheckpointError: The checkpoint is damaged.
    """
    if config.checkpoint.every and folder is None:
        raise ConfigError("loop.checkpoint.every is set, but no folder was given to keep checkpoints in.")
    torch.manual_seed(config.seed)
    run = Run(model, objective, loader, config, layout)
    writer = None
    if folder is not None:
        writer = CheckpointWriter(folder, config.checkpoint)
        restore_newest(run, folder)
    with run.layout.watched():
        try:
            _do_steps(run, writer, hooks if distributed.rank() == 0 else (), name)
        finally:
            if writer is not None:
                writer.wait(is_last=run.step == run.num_steps)
        if run.ema is not None:
            run.ema.copy_to_model()
        run.model = run.layout.whole_model(run.model, model)
    distributed.leave_to_first()
    leave_float8(run.model)
    run.model.eval()
    return run


def _do_steps(run: Run, writer: CheckpointWriter | None, hooks: Sequence[Hook], name: str) -> None:
    every = run.config.checkpoint.every
    meter = Speedometer(run)
    with bar(name, total=run.num_steps) as shown:
        shown.advance(run.step)
        while run.step < run.num_steps:
            report = run.do_step()
            if run.watchdog.wants_rollback:
                before = run.step
                _recover(run, writer, report)
                shown.advance(run.step - before)
            elif every and writer is not None and _is_due(run, every):
                writer.save(run)
            shown.advance()
            if console.is_terminal:
                shown.describe(meter.line(report))
            for hook in hooks:
                hook(run, report)


def _is_due(run: Run, every: int) -> bool:
    # While the watchdog suspects the weights they are not saved over those that it may go back to.
    return run.step == run.num_steps or (run.step % every == 0 and not run.watchdog.num_in_row)


def _recover(run: Run, writer: CheckpointWriter | None, report: StepReport) -> None:
    """Go back to a checkpoint where that is left; else the watchdog accepts the new level of the loss or stops."""
    if writer is not None and run.watchdog.may_roll_back():
        writer.wait()
        if roll_back(run, writer.folder):
            return
    run.watchdog.accept_or_stop(report.step, report.loss)


def measure_step_seconds(run: Run, num_steps: int = 6) -> float:
    """Do two steps that settle compilation and memory, then return the median time of the next ones.

    The run is spent by it: its weights have changed.
    """
    seconds = [run.do_step().seconds for _ in track(range(num_steps + 2), "compile and time a step")]
    return statistics.median(seconds[2:])


def smooth(losses: Sequence[tuple[int, float]], window: int = 20) -> list[tuple[int, float]]:
    """Return the running mean of the losses over ``window`` steps, for plots."""
    kept: list[tuple[int, float]] = []
    for i, (step, _) in enumerate(losses):
        part = [loss for _, loss in losses[max(0, i - window + 1) : i + 1] if math.isfinite(loss)]
        kept.append((step, sum(part) / max(len(part), 1)))
    return kept
