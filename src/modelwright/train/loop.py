"""The one training loop: it owns when things happen; the objective owns what happens in a step.

A step takes ``grad_accum_steps`` micro-batches from the loader, hands them to the objective, calls the hooks, and
saves a checkpoint when one is due. Everything that decides the course of a run (weights, optimizer state, step,
place in the data, random state) is in the checkpoint, so a killed run that is taken up again ends bit for bit where
an uninterrupted one would have, on CPU.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.device import can_compile, has_fast_bf16, pick_device
from modelwright.base.errors import ConfigError
from modelwright.base.progress import bar, human_count, track
from modelwright.data.load import Batch, RowLoader
from modelwright.optim.build import OptimizerConfig, make_optimizer
from modelwright.optim.schedule import ScheduleConfig, make_schedule
from modelwright.train.checkpoint import restore_newest, save_checkpoint
from modelwright.train.objective import Objective, StepReport

Hook = Callable[["Run", StepReport], None]


@dataclass(frozen=True)
class LoopConfig:
    """When things happen."""

    num_steps: int | None = None  # optimizer updates; None: derived by the method from its budget
    micro_batch_size: int = 16  # rows a forward pass
    grad_accum_steps: int = 1  # micro-batches an update
    max_grad_norm: float | None = 1.0  # None: no clipping
    precision: str | None = None  # "bf16" (autocast over float32 weights) or "fp32"; None: bf16 where it is fast
    compile: bool | None = None  # torch.compile the loss; None: where a compiler is found and the run is long enough
    checkpoint_every: int | None = None  # steps; None: no checkpoints on the way
    num_checkpoints: int = 2  # newest ones kept
    device: str | None = None  # None: a GPU where there is one, else the CPU
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        for name in ("num_steps", "micro_batch_size", "grad_accum_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"loop.{name} is {value}; it must be at least 1.")
        if self.precision not in (None, "bf16", "fp32"):
            raise ConfigError(f"loop.precision is {self.precision!r}; known: bf16, fp32.")


# Compilation costs about 20 s; shorter runs than this many steps do not earn it back.
MIN_STEPS_TO_COMPILE = 200


class Run:
    """One training run in progress: the state that a checkpoint saves, and the means to do a step."""

    def __init__(self, model: nn.Module, objective: Objective, loader: RowLoader, config: LoopConfig):
        if config.num_steps is None:
            raise ConfigError("loop.num_steps is not given and was not derived; set it to the number of updates.")
        self.config = config
        self.num_steps = config.num_steps
        self.device = pick_device(config.device)
        self.model = model.to(self.device).train()
        self.objective = objective
        self.loader = loader
        self.optimizer = make_optimizer(model, config.optimizer)
        self.factor = make_schedule(config.schedule, config.num_steps)
        self.step = 0
        self.losses: list[tuple[int, float]] = []
        self.is_bf16 = (config.precision or ("bf16" if has_fast_bf16(self.device) else "fp32")) == "bf16"
        is_compiled = config.compile
        if is_compiled is None:
            is_compiled = can_compile() and config.num_steps >= MIN_STEPS_TO_COMPILE
        self.is_compiled = is_compiled
        self._loss = _compile_loss(objective) if is_compiled else objective.loss

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the loss is computed."""
        if self.is_bf16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def compiled_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the objective's loss, through the compiled version when there is one."""
        return self._loss(model, batch)

    def do_step(self) -> StepReport:
        """Take the next micro-batches and let the objective do one step."""
        start = time.perf_counter()
        self.optimizer.set_factor(self.factor(self.step))
        batches = [self.loader.next_batch() for _ in range(self.config.grad_accum_steps)]
        loss, num_trained, norm = self.objective.step(self, batches)
        self.step += 1
        self.losses.append((self.step, loss))
        return StepReport(
            step=self.step,
            loss=loss,
            num_tokens=sum(batch.input_ids.numel() for batch in batches),
            num_trained_tokens=num_trained,
            gradient_norm=norm,
            learning_rate=next(self.optimizer.groups())["lr"],
            seconds=time.perf_counter() - start,
        )


def _compile_loss(objective: Objective) -> Callable[[nn.Module, Batch], Tensor]:
    """Compile the loss with the batch's tensors as plain arguments; the shapes of a run are fixed."""

    def plain(
        model: nn.Module, inputs: Tensor, labels: Tensor, positions: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        return objective.loss(model, Batch(inputs, labels, positions, mask))

    compiled = torch.compile(plain, dynamic=False)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return compiled(model, batch.input_ids, batch.labels, batch.positions, batch.mask)

    return loss


def train(
    model: nn.Module,
    objective: Objective,
    loader: RowLoader,
    config: LoopConfig,
    *,
    folder: Path | None = None,
    hooks: Sequence[Hook] = (),
    name: str = "train",
) -> Run:
    """Train the model in place to the last step, taking up the newest checkpoint in ``folder`` if there is one.

    Args:
        model: Its trainable parameters are changed; float32 weights are kept whatever the precision.
        objective: What a step is.
        loader: Where batches come from; a fresh one, its place is restored from a checkpoint.
        config: When things happen.
        folder: Where checkpoints go; needed when ``checkpoint_every`` is set.
        hooks: Called with the run and the report after each step.
        name: Shown beside the progress bar.

    Raises:
        ConfigError: The checkpoint was made with other settings, or the loss is no longer finite.
        CheckpointError: The checkpoint is damaged.
    """
    if config.checkpoint_every and folder is None:
        raise ConfigError("loop.checkpoint_every is set, but no folder was given to keep checkpoints in.")
    torch.manual_seed(config.seed)
    run = Run(model, objective, loader, config)
    if folder is not None:
        restore_newest(run, folder)
    with bar(name, total=run.num_steps) as shown:
        shown.advance(run.step)
        while run.step < run.num_steps:
            report = run.do_step()
            shown.advance()
            shown.describe(
                f"loss {report.loss:.3f}  {human_count(report.num_tokens / max(report.seconds, 1e-9))} tokens/s"
            )
            for hook in hooks:
                hook(run, report)
            is_due = config.checkpoint_every and run.step % config.checkpoint_every == 0
            if is_due and folder is not None and run.step < run.num_steps:
                save_checkpoint(run, folder)
    run.model.eval()
    return run


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
