"""Does choosing by content need selection? Selective copying, Mamba against the same model with constant dt, B and C.

    python benchmarks/selective_copying.py [--seeds 0 1 2] [--steps N] [--places N] [--json FILE]
    python benchmarks/selective_copying.py --docs benchmarks/results/selective_copying.json

A row holds a few symbols at random places among blanks, then as many markers; at the markers the symbols are asked
for in their order. A convolution, however long, sees only distances, and these differ from row to row: which inputs
to remember must depend on the inputs. Both models have two layers and the same optimizer, steps and data; rows for
scoring come from another generator than rows for training. Score: symbols right, and rows with all symbols right.

Source of the task and of the comparison: Gu and Dao 2023, "Mamba", section 4.1.1 and table 1 (there 4096 positions,
16 symbols, 400,000 steps: selective 99.8 %, time-invariant inside the same block 56.4 %).
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from modelwright.base.device import describe_machine
from modelwright.models.mamba import Mamba, MambaConfig
from modelwright.nn.init import init_weights
from modelwright.nn.ssm import TimeInvariantMixer

ROOT = Path(__file__).parents[1]
BLANK, MARKER, FIRST_SYMBOL = 0, 1, 2
KINDS = {"selective": True, "time-invariant": False}
START, END = "<!-- study: made by benchmarks/selective_copying.py -->", "<!-- end of study -->"


@dataclass(frozen=True)
class Task:
    """How hard the rows are, and how long is learned."""

    num_places: int = 64  # where symbols and blanks stand
    num_symbols: int = 6  # to copy
    num_kinds: int = 6  # of symbols
    hidden_size: int = 48
    state_size: int = 8
    batch_size: int = 32
    num_steps: int = 1800
    learning_rate: float = 4e-3


def make_rows(task: Task, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return inputs (count, num_places + num_symbols) and the symbols to copy (count, num_symbols)."""
    symbols = torch.randint(task.num_kinds, (count, task.num_symbols), generator=generator) + FIRST_SYMBOL
    places = torch.rand(count, task.num_places, generator=generator).argsort(1)[:, : task.num_symbols].sort(1).values
    rows = torch.full((count, task.num_places + task.num_symbols), BLANK)
    rows.scatter_(1, places, symbols)
    rows[:, task.num_places :] = MARKER
    return rows, symbols


def make_model(task: Task, is_selective: bool, seed: int) -> Mamba:
    """Build the model, or its time-invariant control."""
    config = MambaConfig(
        vocab_size=FIRST_SYMBOL + task.num_kinds,
        hidden_size=task.hidden_size,
        num_layers=2,
        state_size=task.state_size,
        tie_embeddings=False,
    )
    model = Mamba(config)
    if not is_selective:
        for i, layer in enumerate(model.layers):
            layer.mixer = TimeInvariantMixer(task.hidden_size, config.inner_size, task.state_size, layer_index=i)
    # Wider than a language model's first weights: on the rows of the test (24 places), 400 steps give 0.92 of the
    # symbols with 0.1 and 0.50 with 0.02.
    init_weights(model, seed, std=0.1)
    return model


def train(task: Task, is_selective: bool, seed: int) -> Mamba:
    """Train on fresh rows with AdamW; the rate rises over 50 steps and falls along a cosine to a tenth."""
    model = make_model(task, is_selective, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    for step in range(task.num_steps):
        rate = min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / task.num_steps))
        optimizer.param_groups[0]["lr"] = task.learning_rate * rate
        rows, symbols = make_rows(task, task.batch_size, generator)
        logits = model(rows).logits[:, task.num_places :]  # (B, num_symbols, V)
        loss = F.cross_entropy(logits.flatten(0, 1), symbols.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@torch.no_grad()
def score(model: Mamba, task: Task, count: int = 512) -> tuple[float, float]:
    """Return the fraction of symbols right and of rows all right, on rows that training has not seen."""
    rows, symbols = make_rows(task, count, torch.Generator().manual_seed(77))
    right = model(rows).logits[:, task.num_places :].argmax(-1) == symbols
    return right.float().mean().item(), right.all(1).float().mean().item()


def study(task: Task, seeds: list[int]) -> dict:
    """Train both models with every seed; return scores, means and spread."""
    result: dict = {"task": asdict(task), "chance": 1 / task.num_kinds, "seeds": seeds}
    for name, is_selective in KINDS.items():
        runs = []
        for seed in seeds:
            start = time.perf_counter()
            model = train(task, is_selective, seed)
            symbols, rows = score(model, task)
            parameters = model.num_parameters()
            runs.append({"seed": seed, "symbols": symbols, "rows": rows, "seconds": time.perf_counter() - start})
            print(f"{name}, seed {seed}: symbols {symbols:.4f}, rows {rows:.4f}", file=sys.stderr, flush=True)
        scores = [run["symbols"] for run in runs]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        result[name] = {"mean": statistics.mean(scores), "spread": spread, "parameters": parameters, "runs": runs}
    return result


def table(result: dict) -> str:
    """Return the Markdown table of docs/state_space.md."""
    task = result["task"]
    lines = [
        f"{task['num_symbols']} symbols of {task['num_kinds']} kinds among {task['num_places']} places, "
        f"{task['num_steps']} steps of {task['batch_size']} rows, seeds {', '.join(map(str, result['seeds']))}; "
        f"chance {result['chance']:.3f}; commit {result['commit']}; `{result['command']}`.",
        "",
        "| model | parameters | symbols right, mean +- standard deviation | rows all right, mean |",
        "|---|---|---|---|",
    ]
    for name in KINDS:
        r = result[name]
        rows = statistics.mean(run["rows"] for run in r["runs"])
        lines.append(f"| {name} | {r['parameters']:,} | {r['mean']:.3f} +- {r['spread']:.3f} | {rows:.3f} |")
    return "\n".join(lines)


def write_docs(result: dict) -> None:
    """Put the table between its marks."""
    page = ROOT / "docs" / "state_space.md"
    head, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{START}\n{table(result)}\n{END}{tail}", encoding="utf-8")


def main() -> None:
    """Run the study and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Task.num_steps)
    parser.add_argument("--places", type=int, default=Task.num_places)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument(
        "--docs", type=Path, help="train nothing: write the table of docs/state_space.md from this file"
    )
    args = parser.parse_args()
    if args.docs:
        write_docs(json.loads(args.docs.read_text(encoding="utf-8")))
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {
        "command": " ".join(["python benchmarks/selective_copying.py", *sys.argv[1:]]),
        "commit": commit.strip(),
        "machine": asdict(describe_machine()),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        **study(replace(Task(), num_steps=args.steps, num_places=args.places), args.seeds),
    }
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
