"""Does the load-balancing loss keep experts in use? A small Mixtral that begins with two favourites, with and without.

    python benchmarks/moe_balance.py [--seeds 0 1 2 3 4] [--steps N] [--json FILE]

The run is made to collapse: all embeddings share a direction, and two rows of each router lie along it, so that at
first nearly every token takes the same two of eight experts. Training alone gives the others nothing to learn from and
no reason to be chosen; the loss has to bring them back. Each step is one of the training loop's own. Score: coefficient
of variation of the experts' loads over rows that training has not seen, the worst layer of all (0: even, 1.73: two
experts have everything).

Source: Shazeer et al. 2017, arXiv 1701.06538, section 4 and appendix A (there, as here, measured by CV).
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from modelwright.base.device import describe_machine
from modelwright.data.load import RowLoader
from modelwright.data.pack import Rows
from modelwright.models.mixtral import Mixtral, MixtralConfig
from modelwright.nn.init import init_weights
from modelwright.nn.moe import MoeOptions, load_variation
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.train.loop import LoopConfig, train
from modelwright.train.objective import CausalLanguageModeling

ROOT = Path(__file__).parents[1]
VOCAB_SIZE = 64


@dataclass(frozen=True)
class Task:
    """The model, and how long it learns."""

    hidden_size: int = 32
    num_layers: int = 2
    num_experts: int = 8
    top_k: int = 2
    row_len: int = 32
    batch_size: int = 16
    num_steps: int = 150
    learning_rate: float = 3e-3
    coefficient: float = 0.05  # of the load-balancing loss; the control has 0
    favour: float = 4.0  # how far the first logits of the two favourites stand above the others


def make_rows(task: Task, count: int, seed: int) -> Rows:
    """Return rows that count upwards by a stride of their own, modulo the vocabulary."""
    random = np.random.default_rng(seed)
    start, stride = random.integers(0, VOCAB_SIZE, (count, 1)), random.integers(1, 8, (count, 1))
    stream = (start + stride * np.arange(task.row_len + 1)) % VOCAB_SIZE
    return Rows(stream[:, :-1].astype(np.int64), stream[:, 1:].astype(np.int64))


def make_model(task: Task, coefficient: float, seed: int) -> Mixtral:
    """Build the model with its two favourite experts."""
    options = MoeOptions(task.num_experts, task.top_k, 2 * task.hidden_size, balance_coefficient=coefficient)
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=task.hidden_size,
        num_layers=task.num_layers,
        num_heads=4,
        experts=options,
        max_seq_len=task.row_len,
        rope_theta=10000.0,
    )
    model = init_weights(Mixtral(config), seed, std=0.05)
    shared = torch.ones(task.hidden_size)
    with torch.no_grad():
        model.embed.weight += 0.2 * shared
        for layer in model.layers:
            layer.mlp.router.weight[: task.top_k] += task.favour / task.hidden_size * shared
    return model


def run(task: Task, coefficient: float, seed: int) -> dict[str, float]:
    """Train, and score before and after."""
    model = make_model(task, coefficient, seed)
    before = score(model, task)
    loop = LoopConfig(
        num_steps=task.num_steps,
        micro_batch_size=task.batch_size,
        precision="fp32",
        compile=False,
        device="cpu",
        seed=seed,
        optimizer=OptimizerConfig(name="adamw", adamw=AdamWConfig(learning_rate=task.learning_rate)),
    )
    loader = RowLoader(lambda epoch: make_rows(task, 512, seed * 1000 + epoch), task.batch_size)
    start = time.perf_counter()
    losses = train(model, CausalLanguageModeling(), loader, loop).losses
    after = score(model, task)
    return {
        "seed": seed,
        "variation_before": before["variation"],
        "variation": after["variation"],
        "loss_first": losses[0][1],
        "loss": after["loss"],
        "seconds": time.perf_counter() - start,
    }


@torch.no_grad()
def score(model: Mixtral, task: Task) -> dict[str, float]:
    """Return the worst layer's variation of loads, and the loss, on rows that training has not seen."""
    rows = make_rows(task, 128, 999_999)
    model.eval()
    out = model(torch.from_numpy(rows.input_ids))
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), torch.from_numpy(rows.labels).flatten())
    model.train()
    return {"variation": max(load_variation(routing.loads) for routing in out.routings), "loss": float(loss)}


def study(task: Task, seeds: list[int]) -> dict:
    """Train with and without the loss for every seed."""
    result: dict = {"task": asdict(task), "seeds": seeds}
    for name, coefficient in (("with the loss", task.coefficient), ("without", 0.0)):
        runs = []
        for seed in seeds:
            runs.append(run(task, coefficient, seed))
            print(name, runs[-1], file=sys.stderr, flush=True)
        variations = [r["variation"] for r in runs]
        result[name] = {
            "mean": statistics.mean(variations),
            "lowest": min(variations),
            "highest": max(variations),
            "runs": runs,
        }
    return result


def main() -> None:
    """Run the study and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=Task.num_steps)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {
        "command": " ".join(["python benchmarks/moe_balance.py", *sys.argv[1:]]),
        "commit": commit.strip(),
        "machine": asdict(describe_machine()),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        **study(replace(Task(), num_steps=args.steps), args.seeds),
    }
    for name in ("with the loss", "without"):
        r = result[name]
        print(f"{name}: variation {r['mean']:.2f}, from {r['lowest']:.2f} to {r['highest']:.2f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
