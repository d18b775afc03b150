"""How fast a run is and how long it still takes: tokens a second, share of the matrix rate, memory, time left.

FLOPs follow Chowdhery et al. 2022 (PaLM, appendix B): 6 a token for each trained number of a matrix and 4 for each
frozen one (its gradient is not computed), and 12 L D T for attention where the model's config says its shape.
"""

import functools
import statistics
from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import nn

from modelwright.base.device import measure_matmul_flops, peak_memory_bytes
from modelwright.base.progress import human_bytes, human_count
from modelwright.train.objective import StepReport, unwrap

if TYPE_CHECKING:
    from modelwright.train.loop import Run

WINDOW = 20  # steps over which speed is taken


@functools.cache
def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    return measure_matmul_flops(device, dtype, 0.3)


def step_flops_per_token(model: nn.Module, row_len: int) -> float:
    """Return the FLOPs of a training step for each token, forward and backward."""
    bare = unwrap(model)
    tables = {id(m.weight) for m in bare.modules() if isinstance(m, nn.Embedding)}
    seen = {id(m.weight): m.weight for m in bare.modules() if isinstance(m, nn.Linear)}
    matrices = [p for p in bare.parameters() if p.ndim >= 2 and (id(p) not in tables or id(p) in seen)]
    flops = sum((6 if p.requires_grad else 4) * p.numel() for p in matrices)
    shape = getattr(bare, "config", None)
    width = getattr(shape, "num_heads", 0) * (getattr(shape, "head_dim", None) or 0)
    return float(flops + 12 * getattr(shape, "num_layers", 0) * width * row_len)


class Speedometer:
    """Turns step reports into figures; the machine's matrix rate is measured at the first call."""

    def __init__(self, run: "Run", row_len: int | None = None):
        self.run = run
        shape = getattr(unwrap(run.model), "config", None)
        self.row_len = row_len or int(getattr(shape, "max_seq_len", 0))
        self._recent: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._flops = 0.0

    def figures(self, report: StepReport) -> dict[str, float]:
        """Return tokens a second, MFU, memory and seconds left after a step."""
        self._recent.append((report.num_tokens, report.seconds))
        # The median step: the first ones compile, and a checkpoint is not speed.
        seconds = statistics.median(s for _, s in self._recent)
        rate = self._recent[-1][0] / max(seconds, 1e-9)
        if not self._flops:
            self._flops = step_flops_per_token(self.run.model, self.row_len)
        dtype = torch.float32 if self.run.precision.name == "fp32" else torch.bfloat16
        device = self.run.device
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()
        return {
            "tokens_per_second": rate,
            "mfu_fraction": rate * self._flops / _matrix_rate(device, dtype),
            "memory_bytes": float(memory),
            "seconds_left": (self.run.num_steps - report.step) * seconds,
        }

    def line(self, report: StepReport) -> str:
        """Return the figures for people."""
        found = self.figures(report)
        left = int(found["seconds_left"])
        return (
            f"loss {report.loss:.4f}  {human_count(found['tokens_per_second'])} tokens/s  "
            f"MFU {found['mfu_fraction']:.0%}  {human_bytes(found['memory_bytes'])}  "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )
