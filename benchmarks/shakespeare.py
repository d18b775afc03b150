"""Characters of Tiny Shakespeare from scratch: the settings of nanoGPT's README, and what one CPU thread reaches.

    MODELWRIGHT_DATA=DIR python benchmarks/shakespeare.py cpu [--optimizers adamw muon] [--seeds 0 1 2] [--json FILE]
    MODELWRIGHT_DATA=DIR python benchmarks/shakespeare.py baby --steps N --folder DIR [--json FILE]

    cpu     4 layers of 128, rows of 64 characters, batches of 12, 2,000 steps: nanoGPT's setting for a CPU, whose own
            target is a validation loss of 1.88 (its README, "I only have a macbook"). AdamW as there, and Muon.
    baby    6 layers of 384, rows of 256: nanoGPT's setting for a GPU, 1.4697 after 5,000 batches of 64 rows (82 million
            characters). Here with its dropout of 0.2, Muon, batches of 16 rows and as many steps as are asked for; it
            goes on from its newest checkpoint in --folder, so that it can be run in parts.

The split is nanoGPT's: the last tenth is held out, and all of it is scored in rows one after the other. The
feed-forward is gated, and narrower, so that parameters are as many. Control: the model before training, and one
trained on characters whose followers are drawn from anywhere in the text.
Source of the targets: https://github.com/karpathy/nanoGPT, README.
"""

import argparse
import gzip
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from modelwright.base.env import data_folder
from modelwright.base.measured import write_result
from modelwright.data.load import Batch
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.optim.muon import MuonConfig
from modelwright.optim.schedule import ScheduleConfig
from modelwright.train.checkpoint import CheckpointConfig
from modelwright.train.dropout import dropout
from modelwright.train.loop import LoopConfig, train
from modelwright.train.objective import CausalLanguageModeling

TARGETS = {"cpu": 1.88, "baby": 1.4697}
SHAPES = {
    "cpu": {"hidden_size": 128, "intermediate_size": 344, "num_layers": 4, "num_heads": 4, "max_seq_len": 64},
    "baby": {"hidden_size": 384, "intermediate_size": 1024, "num_layers": 6, "num_heads": 6, "max_seq_len": 256},
}
ROWS = {"cpu": 12, "baby": 16}
DROPOUT = {"cpu": 0.0, "baby": 0.2}  # nanoGPT's


class Windows:
    """Batches of rows from anywhere in the text; the place is the number of batches taken."""

    def __init__(self, ids, row_len, batch_size, seed, is_shuffled=False):
        self.ids, self.row_len, self.batch_size, self.seed, self.is_shuffled = (
            ids,
            row_len,
            batch_size,
            seed,
            is_shuffled,
        )
        self.num = 0

    def next_batch(self):
        """Return the next batch."""
        random = np.random.default_rng([self.seed, self.num])
        self.num += 1
        starts = random.integers(0, len(self.ids) - self.row_len, self.batch_size)
        rows = self.ids[starts[:, None] + np.arange(self.row_len + 1)]
        labels = random.choice(self.ids, rows[:, 1:].shape) if self.is_shuffled else rows[:, 1:]
        return Batch(torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(np.ascontiguousarray(labels)))

    def state(self):
        """Return the place in the data."""
        return {"num": self.num}

    def load_state(self, state):
        """Go to a place."""
        self.num = state["num"]


def read_ids():
    folder = data_folder()
    if folder is None:
        raise SystemExit("Set MODELWRIGHT_DATA to the folder with text/tinyshakespeare.txt.gz.")
    text = gzip.decompress((folder / "text" / "tinyshakespeare.txt.gz").read_bytes()).decode()
    letters = sorted(set(text))
    table = {letter: i for i, letter in enumerate(letters)}
    ids = np.array([table[letter] for letter in text], dtype=np.int64)
    edge = int(len(ids) * 0.9)
    return ids[:edge], ids[edge:], len(letters)


@torch.inference_mode()
def held_out_loss(model, ids, row_len):
    model.eval()
    num = (len(ids) - 1) // row_len
    inputs = torch.from_numpy(ids[: num * row_len].reshape(num, row_len))
    labels = torch.from_numpy(ids[1 : num * row_len + 1].reshape(num, row_len))
    objective, total = CausalLanguageModeling(), 0.0
    for rows, answers in zip(inputs.split(64), labels.split(64), strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=row_len > 64):
            total += float(objective.loss(model, Batch(rows, answers)))
    return total / (num * row_len)


def make_loop(setting, steps, seed, optimizer, every=None):
    rules = {
        # Rate, warm-up and the second beta are nanoGPT's for this text.
        "adamw": OptimizerConfig(name="adamw", adamw=AdamWConfig(learning_rate=1e-3, betas=(0.9, 0.99))),
        "muon": OptimizerConfig(name="muon", muon=MuonConfig()),
    }
    schedule = ScheduleConfig("cosine", 100) if optimizer == "adamw" else ScheduleConfig("wsd", 10, 0.6)
    return LoopConfig(
        num_steps=steps,
        micro_batch_size=ROWS[setting],
        precision="fp32" if setting == "cpu" else "bf16",
        compile=False,
        seed=seed,
        optimizer=rules[optimizer],
        schedule=schedule,
        checkpoint=CheckpointConfig(every=every),
    )


def run_one(setting, steps, seed, optimizer, folder=None, is_shuffled=False):
    train_ids, held_out, vocab_size = read_ids()
    shape = LlamaConfig(vocab_size=vocab_size, tie_embeddings=True, **SHAPES[setting])
    model = init_weights(Llama(shape), seed)
    before = held_out_loss(model, held_out[:20_000], shape.max_seq_len)
    loop = make_loop(setting, steps, seed, optimizer, every=100 if folder else None)
    loader = Windows(train_ids, shape.max_seq_len, loop.micro_batch_size, seed, is_shuffled)
    started = time.perf_counter()
    with dropout(model, DROPOUT[setting]):
        run = train(model, CausalLanguageModeling(), loader, loop, folder=folder, name=f"{setting} {optimizer} {seed}")
    seconds = time.perf_counter() - started
    return {
        "optimizer": optimizer,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": run.step,
        "characters": run.step * loop.micro_batch_size * shape.max_seq_len,
        "loss_before": before,
        "train_loss": statistics.mean(loss for _, loss in run.losses[-50:]),
        "validation_loss": held_out_loss(model, held_out, shape.max_seq_len),
        "seconds": seconds,
        "is_shuffled": is_shuffled,
    }


def summarise(setting, runs):
    rows = []
    for optimizer in dict.fromkeys(run["optimizer"] for run in runs):
        losses = [r["validation_loss"] for r in runs if r["optimizer"] == optimizer and not r["is_shuffled"]]
        if losses:
            rows.append(
                {
                    "name": f"{setting} setting, {optimizer}",
                    "ours": statistics.mean(losses),
                    "spread": [min(losses), max(losses)],
                    "rival": TARGETS[setting],
                    "rival_name": "nanoGPT's README (quoted, not run here)",
                    "ratio": statistics.mean(losses) / TARGETS[setting],
                    "unit": "nats a character, held out; lower is better",
                    "runs": len(losses),
                }
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=sorted(SHAPES))
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--control", action="store_true", help="also train on followers from anywhere in the text")
    parser.add_argument("--folder", type=Path, help="where checkpoints go, to run in parts")
    parser.add_argument("--json", type=Path, help="runs of other settings and seeds in it are kept")
    given = parser.parse_args()
    optimizers = ["muon"] if given.setting == "baby" else given.optimizers
    kept = json.loads(given.json.read_text())["settings"] if given.json and given.json.is_file() else {}
    runs = kept.get(given.setting, {}).get("runs", [])
    jobs = [(seed, optimizer, False) for seed in given.seeds for optimizer in optimizers]
    jobs += [(given.seeds[0], optimizers[0], True)] if given.control else []
    for seed, optimizer, is_shuffled in jobs:
        found = run_one(given.setting, given.steps, seed, optimizer, given.folder, is_shuffled)
        print(json.dumps(found), flush=True)
        same = ("optimizer", "seed", "is_shuffled", "steps")
        runs = [run for run in runs if any(run[name] != found[name] for name in same)] + [found]
        if given.json:
            kept[given.setting] = {"target": TARGETS[given.setting], "runs": runs}
            rows = [row for name, entry in kept.items() for row in summarise(name, entry["runs"])]
            write_result(given.json, {"settings": kept, "rows": rows})


if __name__ == "__main__":
    main()
