"""The memory of a planned run: parts at the peak, the largest batch that fits, and whether to recompute.

Parts come from a step done without numbers (`modelwright.train.footprint`). The process's own size, interpreter and
libraries, is that of the process that plans, which has loaded the same. Of a layout of several processes the largest
rank is planned (`modelwright.train.plan_ranks`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from modelwright.train.footprint import Footprint, trace_step
from modelwright.train.loop import LoopConfig
from modelwright.train.objective import Objective
from modelwright.train.plan_ranks import as_rank, traced_ranks
from modelwright.train.recompute import RecomputeConfig

SPARE = 0.9  # of a machine's memory; the rest is left to others and to what is not seen
MAX_ROWS = 4096


@dataclass(frozen=True)
class Work:
    """What a run computes: enough to do a step of it without numbers."""

    make_model: Callable[[], nn.Module]  # with its adapter
    make_batch: Callable[[int], Any]  # rows -> a micro-batch
    objective: Objective
    loop: LoopConfig
    row_len: int  # positions that a row makes the model process
    vocab_size: int  # the last size of logits
    trained_share: float = 1.0  # of the positions, those that an objective chooses to take a loss of


@dataclass(frozen=True)
class MemoryPlan:
    """A footprint with what it means for this machine."""

    footprint: Footprint
    gradient_bytes: int  # when all of them exist
    framework_bytes: int
    checkpoint_bytes: int  # the copy that is written while training goes on
    largest_micro_batch: int  # rows; 0: not even one fits
    largest_micro_batch_recomputed: int
    recommended_recompute: str  # none, or layers where only that fits

    @property
    def total(self) -> int:
        """The process at its largest."""
        return self.footprint.total + self.framework_bytes + self.checkpoint_bytes


def plan_memory(work: Work, *, precision: str, memory_bytes: int) -> MemoryPlan:
    """Trace steps of the run and return what they take.

    Args:
        work: What is computed.
        precision: bf16, fp16 or fp32.
        memory_bytes: Of the device.

    Raises:
        ConfigError: The layout does not suit the model, or this process is one of several.
    """
    loop = work.loop
    own = process_bytes() if loop.device is None or loop.device == "cpu" else 0

    def trace(rows: int, recompute: RecomputeConfig) -> Footprint:
        found = []
        for rank in traced_ranks(loop.parallel):
            with as_rank(loop.parallel, rank, precision) as layout:
                found.append(
                    trace_step(
                        work.make_model,
                        work.objective,
                        lambda: work.make_batch(rows),
                        replace(loop, micro_batch_size=rows, recompute=recompute),
                        vocab_size=-(-work.vocab_size // loop.parallel.tensor),  # logits are cut too
                        precision=precision,
                        trained_share=work.trained_share,
                        layout=layout,
                    )
                )
        return max(found, key=lambda one: one.total)

    rows = loop.micro_batch_size
    found = trace(rows, loop.recompute)
    copied = found.facts.kept_bytes if loop.checkpoint.every and loop.checkpoint.is_asynchronous else 0
    room = int(SPARE * memory_bytes) - own - copied
    plain = found if loop.recompute == RecomputeConfig() else trace(rows, RecomputeConfig())
    kept = _largest(rows, plain.total, trace(2 * rows, RecomputeConfig()).total, room)
    recomputed, advice = kept, "none"
    if found.facts.has_blocks:
        again = [trace(many, RecomputeConfig("layers")).total for many in (rows, 2 * rows)]
        recomputed = max(kept, _largest(rows, again[0], again[1], room))
        advice = "none" if kept >= rows or recomputed <= kept else "layers"
    return MemoryPlan(found, found.facts.gradient_bytes, own, copied, kept, recomputed, advice)


def _largest(rows: int, once: int, twice: int, room: int) -> int:
    """Return the most rows that fit; what a step takes is a straight line in its rows."""
    a_row = max(1.0, (twice - once) / rows)
    return int(max(0, min(MAX_ROWS, (room - (once - rows * a_row)) // a_row)))


def process_bytes() -> int:
    """Return the resident size of this process; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return 0
