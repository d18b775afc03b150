"""The memory of a planned run: parts at the peak, the largest batch that fits, and whether to recompute.

Parts come from a step done without numbers (`modelwright.train.footprint`). The process's own size, interpreter and
libraries, is that of the process that plans, which has loaded the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from modelwright.data.load import Batch
from modelwright.train.footprint import Footprint, trace_step
from modelwright.train.loop import LoopConfig
from modelwright.train.objective import CausalLanguageModeling
from modelwright.train.recompute import RecomputeConfig

SPARE = 0.9  # of a machine's memory; the rest is left to others and to what is not seen
MAX_ROWS = 4096


@dataclass(frozen=True)
class MemoryPlan:
    """A footprint with what it means for this machine."""

    footprint: Footprint
    gradient_bytes: int  # when all of them exist
    framework_bytes: int
    largest_micro_batch: int  # rows; 0: not even one fits
    largest_micro_batch_recomputed: int
    recommended_recompute: str  # none, or layers where only that fits

    @property
    def total(self) -> int:
        """The process at its largest."""
        return self.footprint.total + self.framework_bytes


def plan_memory(
    make_model: Callable[[], nn.Module],
    loop: LoopConfig,
    row_len: int,
    *,
    vocab_size: int,
    precision: str,
    memory_bytes: int,
    is_masked: bool = False,
) -> MemoryPlan:
    """Trace steps of the model and return what they take.

    Args:
        make_model: Builds the model with its adapter.
        loop: The run's.
        row_len: Tokens a row.
        vocab_size: Of the model.
        precision: bf16, fp16 or fp32.
        memory_bytes: Of the device.
        is_masked: Rows hold several documents that do not see each other: there is a mask.
    """
    own = process_bytes() if loop.device is None or loop.device == "cpu" else 0

    def trace(rows: int, recompute: RecomputeConfig) -> Footprint:
        changed = replace(loop, micro_batch_size=rows, recompute=recompute)

        def batch() -> Batch:
            ids = torch.zeros(rows, row_len, dtype=torch.int64)
            if not is_masked:
                return Batch(ids, ids.clone())
            mask = torch.ones(rows, 1, row_len, row_len, dtype=torch.bool)
            return Batch(ids, ids.clone(), ids.clone(), mask)

        return trace_step(
            make_model, CausalLanguageModeling(), batch, changed, vocab_size=vocab_size, precision=precision
        )

    room = int(SPARE * memory_bytes) - own
    rows = loop.micro_batch_size
    found = trace(rows, loop.recompute)
    plain = found if loop.recompute == RecomputeConfig() else trace(rows, RecomputeConfig())
    kept = _largest(rows, plain.total, trace(2 * rows, RecomputeConfig()).total, room)
    again = [trace(many, RecomputeConfig("layers")).total for many in (rows, 2 * rows)]
    recomputed = max(kept, _largest(rows, again[0], again[1], room))
    with torch.device("meta"):
        trained = sum(p.numel() * p.element_size() for p in make_model().parameters() if p.requires_grad)
    advice = "none" if kept >= loop.micro_batch_size or recomputed <= kept else "layers"
    return MemoryPlan(found, trained, own, kept, recomputed, advice)


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
