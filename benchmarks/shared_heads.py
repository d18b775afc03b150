"""Fewer key/value heads: what pooling costs, and what a short up-training brings back, by how the heads are pooled.

    python benchmarks/shared_heads.py [--seeds N] [--json FILE]

A character model (2 layers of 64, 8 heads) learns the source of a module of the standard library for 400 steps; its
heads are shared among 2, by the mean of each group, its first head, or heads drawn anew; each is trained for another 40
steps. Held-out loss in nats a character; the mean over the seeds. About 20 s a seed on one core.
"""

import argparse
import inspect
import json
import platform
import statistics
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

from modelwright.base.device import describe_machine
from modelwright.compress.gqa import share_heads
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights

LENGTH, ROWS, STEPS, MORE_STEPS, KV_HEADS = 64, 16, 400, 40, 2
TEXT = inspect.getsource(argparse)
LETTERS = sorted(set(TEXT))
IDS = torch.tensor([LETTERS.index(letter) for letter in TEXT])
CUT = len(IDS) * 9 // 10


def batch(ids: torch.Tensor, generator: torch.Generator, rows: int) -> torch.Tensor:
    starts = torch.randint(0, len(ids) - LENGTH - 1, (rows,), generator=generator)
    return torch.stack([ids[i : i + LENGTH + 1] for i in starts.tolist()])


def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())


def train(model: torch.nn.Module, steps: int, peak: float, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=peak, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        loss = loss_of(model, batch(IDS[:CUT], generator, ROWS))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def score(model: torch.nn.Module) -> float:
    return float(loss_of(model, batch(IDS[CUT:], torch.Generator().manual_seed(99), 128)))


def drawn_anew(heads: torch.Tensor) -> torch.Tensor:
    return heads.std() * torch.randn(heads[:, 0].shape, generator=torch.Generator().manual_seed(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    config = LlamaConfig(
        vocab_size=len(LETTERS), hidden_size=64, intermediate_size=128, num_layers=2, num_heads=8, max_seq_len=LENGTH
    )
    losses: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        model = train(init_weights(Llama(config), seed), STEPS, 4e-3, seed)
        losses.setdefault("before", []).append(score(model))
        for name, pool in (("mean", "mean"), ("first", "first"), ("random", drawn_anew)):
            shared = share_heads(model, KV_HEADS, pool)
            losses.setdefault(f"{name}, pooled", []).append(score(shared))
            losses.setdefault(f"{name}, up-trained", []).append(score(train(shared, MORE_STEPS, 2e-3, seed + 100)))
    rows = [
        {"name": n, "loss": round(statistics.mean(v), 4), "all": [round(x, 4) for x in v]} for n, v in losses.items()
    ]
    for row in rows:
        print(f"{row['name']:<22} {row['loss']:.4f}")
    if args.json:
        result = {
            "command": "python " + " ".join(["benchmarks/shared_heads.py", *sys.argv[1:]]),
            "machine": asdict(describe_machine()),
            "versions": {"torch": version("torch"), "python": platform.python_version()},
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
