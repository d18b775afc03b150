"""Methods of few parameters on one task: how many numbers they train, what that takes, and what they learn.

    python benchmarks/peft_table.py --methods LoRA IA3 --seeds 0 1 2 --json PART.json    (written after each method)
    python benchmarks/peft_table.py --join PART.json PART.json --json benchmarks/results/peft_table.json
    python benchmarks/finetune_table.py                                                  (the table of docs/finetune.md)

The task: stories260K, a Llama of 260,000 parameters that was trained on children's stories, learns the English of
Shakespeare (both from ``MODELWRIGHT_DATA``). Score: bits per byte of plays that were never trained on, lower is better.
Controls: the model as it is (*frozen*), and training of all weights (*full*).

Each method's rate is the best of a ladder on a part of the plays that is used for nothing else, with one seed and a
third of the steps; a ladder whose best is its end goes on there; then every seed at that rate is scored on a third
part, each in a process of its own. Memory: bytes of weights, gradients and optimizer state by count, and the largest
resident size of the process above what it had after its imports. Time is the processor's, on one thread, so that other
work on the machine does not count. All methods have the same batches, so many updates, AdamW, float32.
"""

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from modelwright.base.device import peak_memory_bytes
from modelwright.base.env import data_folder
from modelwright.base.files import read_json
from modelwright.base.measured import write_result
from modelwright.data.load import RowLoader, repeat_rows
from modelwright.data.pack import Rows, stream_rows
from modelwright.models.llama2c import read_llama2c
from modelwright.nn.adalora import AdaLoraConfig
from modelwright.nn.adapters import AdapterMethod, can_merge
from modelwright.nn.bottleneck import BottleneckConfig
from modelwright.nn.ia3 import IA3Config
from modelwright.nn.lora import LoraConfig
from modelwright.nn.nf4 import NF4Linear
from modelwright.nn.virtual_tokens import PrefixConfig, PromptConfig
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.optim.schedule import ScheduleConfig
from modelwright.tokenizer.llama2c import read_llama2c_tokenizer
from modelwright.train.adapt import adapt, objective_for
from modelwright.train.loop import LoopConfig, Run, train
from modelwright.train.objective import CausalLanguageModeling

METHODS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "full": {},
    "LoRA": {"method": LoraConfig(rank=8, alpha=16.0)},
    "rsLoRA": {"method": LoraConfig(rank=8, alpha=16.0, use_rslora=True)},
    "LoRA+": {"method": LoraConfig(rank=8, alpha=16.0, rate_ratio=16.0)},
    "DoRA": {"method": LoraConfig(rank=8, alpha=16.0, use_dora=True)},
    "PiSSA": {"method": LoraConfig(rank=8, alpha=16.0, init="pissa")},
    "AdaLoRA": {"method": AdaLoraConfig(rank=12, target_rank=8)},
    "QLoRA": {"method": LoraConfig(rank=8, alpha=16.0), "load_in_4bit": True},
    "LoftQ": {"method": LoraConfig(rank=8, alpha=16.0, init="loftq"), "load_in_4bit": True},
    "IA3": {"method": IA3Config()},
    "bottleneck": {"method": BottleneckConfig(width=16)},
    "prefix": {"method": PrefixConfig(num_tokens=16)},
    "prompt": {"method": PromptConfig(num_tokens=16)},
}
RATES = (3e-3, 1e-2, 3e-2)
LOWEST, HIGHEST = 1e-4, 1.0
ROW_LEN, BATCH, STEPS = 256, 8, 120
TINY = {"rows": 24, "steps": 3}


def load() -> tuple[Any, dict[str, Rows], dict[str, int]]:
    """Return the model, rows of the three parts, and the bytes of text that each row set stands for."""
    root = data_folder()
    if root is None:
        sys.exit(
            "MODELWRIGHT_DATA is not set: the benchmark needs weights/stories260K and text/tinyshakespeare.txt.gz."
        )
    model = read_llama2c(root / "weights/stories260K/stories260K.bin", dtype=torch.float32)
    tokenizer = read_llama2c_tokenizer(root / "weights/stories260K/tok512.bin")
    text = gzip.decompress((root / "text/tinyshakespeare.txt.gz").read_bytes()).decode()
    bounds = {"train": (0.0, 0.8), "tune": (0.8, 0.9), "test": (0.9, 1.0)}
    rows, sizes = {}, {}
    for part, (low, high) in bounds.items():
        speeches = text[int(low * len(text)) : int(high * len(text))].split("\n\n")
        ids = [np.array(tokenizer.encode(speech), dtype=np.int64) for speech in speeches if speech.strip()]
        rows[part] = stream_rows(ids, ROW_LEN, tokenizer.bos_id or 1, 0)
        sizes[part] = len("\n\n".join(speeches).encode())
    return model, rows, sizes


def learn(name: str, rate: float, seed: int, num_steps: int, part: str, tiny: bool) -> dict[str, Any]:
    """Train one method once and score it on a part."""
    model, rows, sizes = load()
    if tiny:
        rows = {key: Rows(one.input_ids[: TINY["rows"]], one.labels[: TINY["rows"]]) for key, one in rows.items()}
    baseline = peak_memory_bytes()
    torch.manual_seed(seed)
    method: AdapterMethod | None = METHODS[name].get("method")
    if method is not None:
        adapt(model, method, load_in_4bit=METHODS[name].get("load_in_4bit", False))
    loop = LoopConfig(
        num_steps=num_steps,
        micro_batch_size=BATCH,
        precision="fp32",
        compile=False,
        seed=seed,
        optimizer=OptimizerConfig("adamw", adamw=AdamWConfig(rate, (0.9, 0.999), 0.0)),
        schedule=ScheduleConfig("cosine", warmup_steps=num_steps // 20),
    )
    start, run = time.process_time(), None
    if name != "frozen":
        run = train(model, objective_for(model), RowLoader(repeat_rows(rows["train"], seed), BATCH), loop, name=name)
    seconds = time.process_time() - start
    nats, count = mean_loss(model, rows[part])
    total = sum(len(one) * ROW_LEN for key, one in rows.items() if key == part)
    return {
        "bits_per_byte": nats / np.log(2) * (total / sizes[part]) if not tiny else nats,
        "trained_parameters": 0 if run is None else sum(p.numel() for p in model.parameters() if p.requires_grad),
        "state_bytes": 0 if run is None else state_bytes(run),
        "weight_bytes": weight_bytes(model),
        "above_baseline_bytes": peak_memory_bytes() - baseline,
        "seconds_a_step": seconds / num_steps,
        "can_merge": bool(method is None or can_merge(model)),
        "num_scored": count,
    }


@torch.inference_mode()
def mean_loss(model: nn.Module, rows: Rows) -> tuple[float, int]:
    """Return nats a token over all rows, and how many tokens there were."""
    loader, objective, total, count = RowLoader(lambda _: rows, BATCH), CausalLanguageModeling(), 0.0, 0
    model.eval()
    for _ in range(len(rows) // BATCH):
        batch = loader.next_batch()
        total += float(objective.loss(model, batch))
        count += objective.count_trained(batch)
    return total / count, count


def state_bytes(run: Run) -> int:
    """Return the bytes of gradients and of the optimizer's state."""
    gradients = sum(p.numel() * p.element_size() for p in run.model.parameters() if p.requires_grad)
    kept = [t for rule in run.optimizer.optimizers.values() for s in rule.state.values() for t in s.values()]
    return gradients + sum(t.numel() * t.element_size() for t in kept if isinstance(t, torch.Tensor))


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights, packed ones as they are packed."""
    packed = sum(m.num_bytes() for m in model.modules() if isinstance(m, NF4Linear))
    return packed + sum({id(p): p.numel() * p.element_size() for p in model.parameters()}.values())


def one(name: str, rate: float, seed: int, num_steps: int, part: str, tiny: bool) -> dict[str, Any]:
    """Do one run in a process of its own."""
    words = ["--work", name, "--rate", rate, "--seeds", seed, "--steps", num_steps, "--part", part]
    command = [sys.executable, __file__, *map(str, words), *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.rpartition("FIGURES ")[2])
    print(f"  {name}, rate {rate}, seed {seed}: {found['bits_per_byte']:.4f} bits a byte", flush=True)
    return {"name": name, "rate": rate, "seed": seed, **found}


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a method, beside training of all weights."""
    by_name = {name: [run for run in runs if run["name"] == name] for name in METHODS}
    full = [run["bits_per_byte"] for run in by_name["full"]]
    rows = []
    for name, own in by_name.items():
        if not own:
            continue
        scores = [run["bits_per_byte"] for run in own]
        row = {
            "name": name,
            "ours": statistics.mean(scores),
            "rival": statistics.mean(full) if full else None,
            "rival_name": "all weights trained",
            "ratio": statistics.mean(scores) / statistics.mean(full) if full else None,
            "unit": "bits a byte",
            "runs": len(own),
            "spread": statistics.stdev(scores) if len(scores) > 1 else None,
        }
        for key in ("rate", "trained_parameters", "weight_bytes", "state_bytes", "can_merge"):
            row[key] = own[0][key]
        for key in ("above_baseline_bytes", "seconds_a_step"):
            row[key] = statistics.median(run[key] for run in own)
        rows.append(row)
    return rows


def find_rate(name: str, num_steps: int, tiny: bool) -> dict[str, Any]:
    """Return the rate of the ladder that scores best on the part for it, and all scores."""
    if name == "frozen":
        return {"best": 0.0, "scores": {}}
    scores: dict[float, float] = {}
    wanted = list(RATES)
    while wanted:
        scores |= {rate: float(learn(name, rate, 0, num_steps, "tune", tiny)["bits_per_byte"]) for rate in wanted}
        best, ends = min(scores, key=lambda rate: scores[rate]), (min(scores), max(scores))
        wanted = [float(f"{end * factor:.1g}") for end, factor in zip(ends, (0.3, 10 / 3), strict=True) if best == end]
        wanted = [rate for rate in wanted if LOWEST <= rate <= HIGHEST]
    print(f"  {name}: {scores}", flush=True)
    return {"best": min(scores, key=lambda rate: scores[rate]), "scores": scores}


def write(path: Path | None, num_steps: int, rates: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """Write what there is, as a result."""
    if path is not None:
        made = {"num_steps": num_steps, "rows": summarize(runs), "rates": rates, "all_runs": runs}
        write_result(path, made)


def main() -> None:
    """Tune, measure, or join; or be one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--join", type=Path, nargs="+", help="results of parts, to be made one")
    parser.add_argument("--tiny", action="store_true", help="a few steps on a few rows, to see that all works")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--part", default="test", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    num_steps = TINY["steps"] if arguments.tiny else arguments.steps
    torch.set_num_threads(1)
    if arguments.work:
        made = learn(arguments.work, arguments.rate, arguments.seeds[0], num_steps, arguments.part, arguments.tiny)
        print("FIGURES " + json.dumps(made))
        return
    rates: dict[str, Any] = {}
    runs: list[dict[str, Any]] = []
    for part in map(read_json, arguments.join or []):
        kept = [run for run in runs if run["name"] not in part["rates"]]  # a later part has measured it again
        rates, runs, num_steps = rates | part["rates"], kept + part["all_runs"], part["num_steps"]
    for name in arguments.methods if not arguments.join else []:
        rates[name] = find_rate(name, max(1, num_steps // 3), arguments.tiny)
        seeds = arguments.seeds[: 1 if name == "frozen" else None]
        runs += [one(name, rates[name]["best"], seed, num_steps, "test", arguments.tiny) for seed in seeds]
        write(arguments.json, num_steps, rates, runs)
    write(arguments.json, num_steps, rates, runs)
    for row in summarize(runs):
        print(f"{row['name']}: {row['trained_parameters']:,} trained, {row['ours']:.4f} bits a byte")


if __name__ == "__main__":
    main()
