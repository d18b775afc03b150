"""What is left of an old task after a new one: plain training, elastic weights (EWC) and replay.

    MODELWRIGHT_DATA=DIR python benchmarks/forgetting.py [--seeds 0 1 2] [--folder DIR] [--json FILE]

A small decoder learns the characters of Tiny Shakespeare (the old task), then those of commercial contracts (CUAD; the
new one). Both are scored on held-out text, in bits a character, before and after. The ways to go on are: plain
training; EWC with two strengths; replay with a tenth and a quarter of old rows. Controls: EWC with the importances
permuted among the weights of each matrix (so that only their size is right), and replay of old rows whose characters
are shuffled. Every way has the same steps and sees as many rows. With --folder a killed run goes on where it was.

Source: Kirkpatrick et al. 2017, arXiv:1612.00796 (EWC); Rolnick et al. 2019, arXiv:1811.11682 (replay).
"""

import argparse
import copy
import gzip
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from modelwright.base.env import data_folder
from modelwright.base.measured import write_result
from modelwright.data.load import RowLoader, repeat_rows
from modelwright.data.pack import Rows
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.optim.schedule import ScheduleConfig
from modelwright.train.continual import ElasticWeights, fisher, replay_rows
from modelwright.train.finetune import mean_loss
from modelwright.train.loop import LoopConfig, train
from modelwright.train.objective import CausalLanguageModeling

ROW_LEN, BATCH_SIZE, NUM_HELD_OUT = 64, 16, 256
OLD_STEPS, NEW_STEPS = 1200, 300
LETTERS = "\n" + "".join(map(chr, range(32, 127)))  # what is none of these is left out
WEAK, STRONG = 1e4, 1e5


def rows_of(text, num, offset=0):
    """Return rows of characters, one after the other, from a place on."""
    table = {char: i for i, char in enumerate(LETTERS)}
    ids = np.array([table[char] for char in text if char in table])
    ids = ids[offset : offset + num * ROW_LEN + 1]
    num = min(num, (len(ids) - 1) // ROW_LEN)
    return Rows(ids[: num * ROW_LEN].reshape(num, -1), ids[1 : num * ROW_LEN + 1].reshape(num, -1))


def read_tasks(folder):
    """Return rows to learn from and held-out rows of the old and the new task."""
    with gzip.open(folder / "text" / "tinyshakespeare.txt.gz", "rt", encoding="utf-8") as handle:
        plays = handle.read()
    with gzip.open(folder / "text" / "legal" / "cuad_contracts.jsonl.gz", "rt", encoding="utf-8") as handle:
        texts = [json.loads(line)["text"] for line in handle]
    cut = int(0.9 * len(plays))
    return {
        "old": (rows_of(plays[:cut], 15_000), rows_of(plays[cut:], NUM_HELD_OUT)),
        "new": (
            rows_of("\n".join(texts[:120]), 15_000, 100_000),
            rows_of("\n".join(texts[120:]), NUM_HELD_OUT, 50_000),
        ),
    }


def loop(num_steps, rate, seed):
    return LoopConfig(
        num_steps=num_steps,
        micro_batch_size=BATCH_SIZE,
        compile=False,
        precision="fp32",
        device="cpu",
        seed=seed,
        optimizer=OptimizerConfig("adamw", adamw=AdamWConfig(rate, weight_decay=0.0)),
        schedule=ScheduleConfig("linear", num_steps // 20),
    )


def learn(model, rows, num_steps, rate, seed, objective=None):
    loader = RowLoader(repeat_rows(rows, seed), BATCH_SIZE)
    train(model, objective or CausalLanguageModeling(), loader, loop(num_steps, rate, seed))
    return model


def bits(model, rows):
    return mean_loss(model, rows, NUM_HELD_OUT) / math.log(2)


def permuted(anchors, seed):
    """Return anchors whose importances stand at other weights of the same tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (old, weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight))
        for name, (old, weight) in anchors.items()
    }


def shuffled(rows, seed):
    ids = np.random.default_rng(seed).permuted(np.concatenate([rows.input_ids, rows.labels[:, -1:]], axis=1), axis=1)
    return Rows(ids[:, :-1], ids[:, 1:])


def run_seed(tasks, seed, found, folder, keep):
    """Add to what was found of a seed the ways that are missing, and keep it after each."""
    (old, old_held_out), (new, new_held_out) = tasks["old"], tasks["new"]
    config = LlamaConfig(len(LETTERS), 96, 256, 2, 4, max_seq_len=ROW_LEN)
    base = init_weights(Llama(config), seed)
    file = folder / f"old-{seed}.safetensors" if folder else None
    if file is not None and file.is_file():
        base.load_state_dict(load_file(file))
    else:
        learn(base, old, OLD_STEPS, 3e-3, seed)
        if file is not None:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(base.state_dict(), file)
    anchors = fisher(base, old, max_rows=256)
    plain = CausalLanguageModeling
    ways = {
        "plain": (new, plain()),
        f"EWC, strength {WEAK:.0e}": (new, ElasticWeights(plain(), anchors, WEAK)),
        f"EWC, strength {STRONG:.0e}": (new, ElasticWeights(plain(), anchors, STRONG)),
        "EWC, importances permuted (control)": (new, ElasticWeights(plain(), permuted(anchors, seed), STRONG)),
        "replay of a tenth": (replay_rows(new, old, 0.1, seed), plain()),
        "replay of a quarter": (replay_rows(new, old, 0.25, seed), plain()),
        "replay of a quarter, characters shuffled (control)": (
            replay_rows(new, shuffled(old, seed), 0.25, seed),
            plain(),
        ),
    }
    found["before"] = {"old": bits(base, old_held_out), "new": bits(base, new_held_out)}
    print(seed, "before", found["before"], flush=True)
    for name, (rows, objective) in ways.items():
        if name in found:
            continue
        started = time.perf_counter()
        model = learn(copy.deepcopy(base), rows, NEW_STEPS, 1e-3, seed + 1, objective)
        found[name] = {"old": bits(model, old_held_out), "new": bits(model, new_held_out)}
        found[name]["seconds"] = time.perf_counter() - started
        print(seed, name, found[name], flush=True)
        keep()


def summarise(runs):
    """Two rows a way beside plain training: bits a character of the old task that were lost, and bits of the new."""
    rows = []
    runs = [run for run in runs.values() if "plain" in run]
    for name in [name for name in runs[0] if name not in ("before", "plain")] if runs else []:
        done = [run for run in runs if name in run]
        for title, part, unit in (
            ("lost of the old task", "old", "bits a character lost"),
            ("the new task", "new", "bits a character"),
        ):
            ours, rival = (
                [run[way][part] - (part == "old") * run["before"]["old"] for run in done] for way in (name, "plain")
            )
            means = statistics.mean(ours), statistics.mean(rival)
            rows.append(
                {
                    "name": f"{title}: {name}",
                    "ours": means[0],
                    "rival": means[1],
                    "rival_name": "plain training",
                    "ratio": means[0] / means[1],
                    "unit": unit,
                    "runs": {"ours": ours, "rival": rival},
                }
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="where the models of the old task go, to run in parts")
    parser.add_argument("--json", type=Path, help="runs in it are kept, and are not made again")
    given = parser.parse_args()
    folder = data_folder()
    if folder is None:
        raise SystemExit("Set MODELWRIGHT_DATA to the folder with text/tinyshakespeare.txt.gz.")
    torch.set_num_threads(1)
    tasks = read_tasks(folder)
    runs = json.loads(given.json.read_text())["runs"] if given.json and given.json.is_file() else {}
    settings = {"old_steps": OLD_STEPS, "new_steps": NEW_STEPS, "batch_size": BATCH_SIZE, "row_len": ROW_LEN}

    def keep():
        if given.json:
            write_result(given.json, {"settings": settings, "runs": runs, "rows": summarise(runs)})

    for seed in given.seeds:
        run_seed(tasks, seed, runs.setdefault(str(seed), {}), given.folder, keep)
    keep()


if __name__ == "__main__":
    main()
