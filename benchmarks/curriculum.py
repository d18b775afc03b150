"""Does it help to learn sums from few digits to many? The arithmetic curriculum against random order.

    python benchmarks/curriculum.py [--seeds 0 1 2] [--steps N] [--kinds random sorted ...] [--json FILE]
    python benchmarks/curriculum.py --join PART.json PART.json --json FILE

Every run learns from the same sums of two numbers of 1 to 3 digits, in 256,000 examples, and only their order differs:
random; easy to hard (*sorted*, *stages*, stages with a fifth of review, *competence*); and hard to easy as the control
(*reverse*). The answer is written with its last digit first, as Lee et al. do, so that a carry is known when it is
needed, and numbers are filled with zeros so that digits of one rank stand in one place. Scored on sums that no run has
seen: whole answers right under greedy decoding, for each number of digits.

Source: Bengio et al. 2009; Platanios et al. 2019 (competence); Lee et al. 2023, arXiv:2307.03381 (digits reversed).
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from modelwright.base.measured import write_result
from modelwright.data.curriculum import CurriculumConfig, order_by
from modelwright.data.feed import Epochs, Feed, HeldRows
from modelwright.data.pack import IGNORED, Rows
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.optim.schedule import ScheduleConfig
from modelwright.train.loop import LoopConfig, Run, train
from modelwright.train.objective import CausalLanguageModeling, StepReport
from modelwright.train.watchdog import WatchdogConfig

LETTERS = "0123456789+=$ "  # "$" ends an answer, " " fills the row
PAD = LETTERS.index(" ")
KINDS = {
    "random": CurriculumConfig("random"),
    "sorted": CurriculumConfig("sorted"),
    "stages": CurriculumConfig("stages", num_stages=3),
    "stages with review": CurriculumConfig("stages", num_stages=3, review_fraction=0.2),
    "competence": CurriculumConfig("competence", first_competence=0.2),
    "reverse": CurriculumConfig("reverse"),
}


@dataclass(frozen=True)
class Task:
    """How hard the sums are, and how long is learned."""

    max_digits: int = 3
    hidden_size: int = 64
    num_layers: int = 2
    batch_size: int = 64
    num_steps: int = 4000
    learning_rate: float = 2e-3
    num_scored: int = 200  # held-out sums of each number of digits


def is_held_out(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A tenth of all pairs, told by the pair itself; sums of single digits are too few and are all learned."""
    return ((a * 31 + b * 17) % 10 == 3) & (np.maximum(a, b) > 9)


def draw_sums(task: Task, num: int, seed: int, held_out: bool, digits: int | None = None) -> tuple[np.ndarray, ...]:
    """Return numbers of digits (num,), first and second numbers."""
    rng = np.random.default_rng([seed, int(held_out), digits or 0])
    found: list[np.ndarray] = []
    while sum(part.shape[1] for part in found) < num:
        sizes = np.full(4 * num, digits) if digits else rng.integers(1, task.max_digits + 1, 4 * num)
        lowest = np.where(sizes == 1, 0, 10 ** (sizes - 1))
        a, b = (rng.integers(lowest, 10**sizes) for _ in range(2))
        keep = is_held_out(a, b) == held_out
        found.append(np.stack([sizes[keep], a[keep], b[keep]]))
    return tuple(np.concatenate(found, axis=1)[:, :num])


def make_rows(task: Task, a: np.ndarray, b: np.ndarray) -> Rows:
    """Rows of "012+045=7500$", learned from the sign = on."""
    width = task.max_digits
    row_len = 3 * width + 4
    inputs = np.full((len(a), row_len), PAD, np.int64)
    labels = np.full((len(a), row_len), IGNORED, np.int64)
    for row, (one, other) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        asked = f"{one:0{width}}+{other:0{width}}="
        ids = [LETTERS.index(char) for char in f"{asked}{f'{one + other:0{width + 1}}'[::-1]}$"]
        inputs[row, : len(ids) - 1] = ids[:-1]
        labels[row, len(asked) - 1 : len(ids) - 1] = ids[len(asked) :]
    return Rows(inputs, labels)


@torch.inference_mode()
def score(model: Llama, task: Task) -> list[float]:
    """Return the share of held-out sums with every letter of the answer right, by number of digits.

    Greedy decoding writes the right answer exactly when each letter is the likeliest one after the right ones before.
    """
    model.eval()
    shares = []
    for digits in range(1, task.max_digits + 1):
        if digits == 1:
            a, b = (grid.ravel() for grid in np.meshgrid(np.arange(10), np.arange(10)))
        else:
            _, a, b = draw_sums(task, task.num_scored, 99, held_out=True, digits=digits)
        rows = make_rows(task, a, b)
        guesses = model(torch.from_numpy(rows.input_ids)).logits.argmax(-1).numpy()
        shares.append(float(((guesses == rows.labels) | (rows.labels == IGNORED)).all(axis=1).mean()))
    model.train()
    return shares


def learn(task: Task, kind: str, seed: int) -> dict[str, object]:
    """Train one model in one order and score it on the way and at the end."""
    digits, a, b = draw_sums(task, task.num_steps * task.batch_size, seed, held_out=False)
    rows = make_rows(task, a, b)
    order = order_by(digits.astype(float), KINDS[kind], seed)
    config = LlamaConfig(
        len(LETTERS), task.hidden_size, 4 * task.hidden_size, task.num_layers, 4, max_seq_len=rows.input_ids.shape[1]
    )
    model = Llama(config)
    init_weights(model, seed)
    loop = LoopConfig(
        num_steps=task.num_steps,
        compile=False,
        precision="fp32",
        device="cpu",
        seed=seed,
        optimizer=OptimizerConfig("adamw", adamw=AdamWConfig(task.learning_rate, weight_decay=0.01)),
        schedule=ScheduleConfig("wsd", warmup_steps=50, decay_fraction=0.2),
        watchdog=WatchdogConfig(spike_deviations=None),  # a harder part of the curriculum looks like a spike
    )
    course: list[tuple[int, float]] = []

    def watch(run: Run, report: StepReport) -> None:
        if report.step % (task.num_steps // 5) == 0:
            course.append((report.step, statistics.fmean(score(model, task))))

    started = time.perf_counter()
    feed = Feed([HeldRows(rows)], Epochs(order), task.batch_size)
    train(model, CausalLanguageModeling(), feed, loop, hooks=[watch])
    by_digits = score(model, task)
    return {
        "seed": seed,
        "exact": statistics.fmean(by_digits),
        "exact_by_digits": by_digits,
        "course": course,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - started,
    }


def compare(runs: dict[str, list[dict]]) -> list[dict[str, object]]:
    """One row an order against random order, with mean and spread (largest less smallest) over the seeds."""

    def figures(kind: str) -> tuple[float, float]:
        exact = [run["exact"] for run in runs[kind]]
        return statistics.fmean(exact), max(exact) - min(exact)

    base, base_spread = figures("random")
    rows = []
    for kind in runs:
        if kind != "random":
            mean, spread = figures(kind)
            rows.append(
                {
                    "name": f"sums right, {kind} order",
                    "ours": mean,
                    "rival": base,
                    "rival_name": "random order",
                    "ratio": mean / base if base else None,
                    "unit": "share of held-out sums",
                    "runs": len(runs[kind]),
                    "spread": spread,
                    "rival_spread": base_spread,
                    # One run has no spread, so nothing can be said.
                    "is_beyond_spread": abs(mean - base) > max(spread, base_spread) if len(runs[kind]) > 2 else None,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Task.num_steps)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--join", type=Path, nargs="+", help="join the runs of parts instead of running")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = Task(num_steps=arguments.steps)
    runs: dict[str, list[dict]] = {}
    for part in arguments.join or ():
        found = json.loads(part.read_text())
        task = Task(**found["task"])
        for kind, made in found["runs"].items():
            runs.setdefault(kind, []).extend(made)
    if not arguments.join:
        for kind in arguments.kinds:
            for seed in arguments.seeds:
                runs.setdefault(kind, []).append(learn(task, kind, seed))
                last = runs[kind][-1]
                shown = " ".join(f"{share:.2f}" for share in last["exact_by_digits"])
                print(f"{kind:20} seed {seed}  right {last['exact']:.3f}  by digits {shown}  {last['seconds']:.0f} s")
    rows = compare(runs) if "random" in runs else []
    for row in rows:
        print(
            f"{row['name']:36} {row['ours']:.3f} (spread {row['spread']:.3f})  random {row['rival']:.3f} "
            f"(spread {row['rival_spread']:.3f})  beyond the spread: {row['is_beyond_spread']}"
        )
    if arguments.json:
        write_result(arguments.json, {"task": asdict(task), "threads": 1, "runs": runs, "comparisons": rows})


if __name__ == "__main__":
    main()
