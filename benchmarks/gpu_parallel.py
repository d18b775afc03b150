"""What a layout gives on several GPUs: tokens/s and peak memory of a step, beside data parallelism alone.

Run by hand on a machine with GPUs, once a layout; the rows of one file are joined by their names:

    torchrun --nproc-per-node 8 benchmarks/gpu_parallel.py --json benchmarks/results/gpu_parallel.json \
        --layout shard=8 --layout shard=4,tensor=2

Not run yet: no machine with several GPUs was at hand.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelwright.base import distributed
from modelwright.base.measured import write_result
from modelwright.data.load import RowLoader
from modelwright.data.pack import Rows
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.optim.build import OptimizerConfig
from modelwright.train.loop import LoopConfig, Run
from modelwright.train.objective import CausalLanguageModeling
from modelwright.train.parallel import ParallelConfig

VOCAB_SIZE = 32_000


def measure(parallel: ParallelConfig, row_len: int, num_rows: int, num_steps: int) -> tuple[float, float]:
    """Return tokens a second over all ranks and the peak bytes of this rank's GPU."""
    config = LlamaConfig(VOCAB_SIZE, 2048, 5632, 16, 16, 8, max_seq_len=row_len)
    ids = np.random.default_rng(0).integers(1, VOCAB_SIZE, (num_rows, row_len + 1))
    rows = Rows(ids[:, :-1], ids[:, 1:], None)
    loop = LoopConfig(
        num_steps=num_steps,
        micro_batch_size=num_rows // 4,
        grad_accum_steps=4,
        precision="bf16",
        optimizer=OptimizerConfig(name="adamw"),
        parallel=parallel,
    )
    torch.cuda.reset_peak_memory_stats()
    model = init_weights(Llama(config), 0)
    run = Run(model, CausalLanguageModeling(), RowLoader(lambda _: rows, num_rows // 4), loop)
    reports = []
    for _ in range(num_steps):
        reports.append(run.do_step())
        torch.cuda.synchronize()
    seconds = statistics.median(report.seconds for report in reports[2:])
    return num_rows * row_len / seconds, float(torch.cuda.max_memory_allocated())


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--layout", action="append", required=True, help="degrees, as in shard=4,tensor=2")
    parser.add_argument("--row-len", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with distributed.join():
        rival, rival_bytes = measure(ParallelConfig(), given.row_len, given.rows, given.steps)
        for layout in given.layout:
            degrees: dict[str, Any] = {
                name: int(n) for name, _, n in (part.partition("=") for part in layout.split(","))
            }
            ours, ours_bytes = measure(ParallelConfig(**degrees), given.row_len, given.rows, given.steps)
            shared = {"rival_name": "data parallel", "runs": given.steps - 2}
            for name, unit, a, b in (("speed", "tokens/s", ours, rival), ("peak", "bytes", ours_bytes, rival_bytes)):
                row = {"name": f"{layout}: {name}", "ours": a, "rival": b, "ratio": a / b, "unit": unit}
                rows.append({**row, **shared})
        if distributed.rank() == 0:
            write_result(given.json, {"rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
