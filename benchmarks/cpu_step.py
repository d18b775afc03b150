"""Where a compiled step on a CPU spends its time: each phase, each thread, work and waiting apart.

    python benchmarks/cpu_step.py --folder runs/serve [--threads 1 2] [--users 1 8] [--json FILE]

FOLDER is the one that serve.py makes (0.5B parameters); weights are rounded to 4 bits and the output matrix to 8. The
kernels are compiled a second time with -DMW_TIMES, which reads the time stamp counter at every meeting of the threads.
"native" is the call, "rest" what Python does between two calls (schedule, tables, drawing). Medians of the steps.
"""

import argparse
import ctypes
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from modelwright.base.measured import write_result
from modelwright.base.types import SamplingParams
from modelwright.engine.engine import Engine, EngineConfig
from modelwright.models.weights import load_model
from modelwright.nn.kernels import build

PHASES = ("start", "norm", "qkv", "place", "attend", "mix", "out", "mlp norm", "gate", "down", "head")
MAX_THREADS = 64


class Timed:
    """The library, with a clock around the step."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)

    def mw_step(self, model: Any, step: Any) -> None:
        """Do the step and note how long it took."""
        start = time.perf_counter()
        self.library.mw_step(model, step)
        self.seconds.append(time.perf_counter() - start)

    def take_times(self) -> list[list[tuple[int, int]]]:
        """Return ticks of work and of waiting of each thread and phase since the last call."""
        ticks = (ctypes.c_uint64 * (MAX_THREADS * len(PHASES) * 2))()
        num_phases = self.library.mw_take_times(ticks, MAX_THREADS)
        assert num_phases == len(PHASES), "PHASES and cpu_step.cpp differ"
        pairs = [(ticks[i], ticks[i + 1]) for i in range(0, len(ticks), 2)]
        return [pairs[i : i + num_phases] for i in range(0, len(pairs), num_phases)]


def measure(engine: Engine, timed: Timed, num_users: int, num_threads: int, num_tokens: int) -> dict[str, Any]:
    """Decode for some users with some threads and print where the time went."""
    torch.set_num_threads(num_threads)
    engine.pool.forget_all()
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    requests = [engine.add(range(100 * i + 10, 100 * i + 42), params) for i in range(num_users)]
    while not all(request.output_ids for request in requests):
        engine.step()
    timed.take_times()
    timed.seconds.clear()
    whole, begun = [], time.perf_counter()
    while engine.has_work:
        start = time.perf_counter()
        engine.step()
        whole.append(time.perf_counter() - start)
    passed = time.perf_counter() - begun
    threads = timed.take_times()[:num_threads]
    # The counter's rate is not asked for: thread 0 is in some phase as long as the calls last.
    per_tick = sum(timed.seconds) / max(1, sum(map(sum, threads[0])))
    figures = {
        "users": num_users,
        "threads": num_threads,
        "tokens_per_second": num_users * len(whole) / passed,
        "native_ms": 1e3 * statistics.median(timed.seconds),
        "rest_ms": 1e3 * statistics.median(w - n for w, n in zip(whole, timed.seconds, strict=True)),
        "phases_ms": [
            {
                name: [1e3 * per_tick * ticks / len(whole) for ticks in pair]
                for name, pair in zip(PHASES, t, strict=True)
            }
            for t in threads
        ],
    }
    print(
        f"{num_users} users, {num_threads} threads: {figures['tokens_per_second']:.0f} tokens/s, "
        f"native {figures['native_ms']:.2f} ms, rest {figures['rest_ms']:.2f} ms"
    )
    for index, phases in enumerate(figures["phases_ms"]):
        print(f"  thread {index}: " + ", ".join(f"{k} {a:.2f}+{b:.2f}" for k, (a, b) in phases.items() if a + b > 0))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="made by serve.py")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--users", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    config = EngineConfig(quantize="int4", kernels="native", kv_cache_bytes=512 << 20, max_running=max(given.users))
    engine = Engine(load_model(given.folder / "bf16"), config=config)
    engine.runner.library = timed = Timed(build.load(build.compiled("-DMW_TIMES")))
    rows = [measure(engine, timed, users, n, given.tokens) for users in given.users for n in given.threads]
    if given.json:
        write_result(given.json, {"rows": rows})


if __name__ == "__main__":
    main()
