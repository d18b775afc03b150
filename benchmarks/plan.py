"""What a plan says of a run's memory beside what the run then takes.

    python benchmarks/plan.py [--only NAME,NAME] [--json FILE]

Each row plans a recipe in one fresh process and trains it in another: the runner of `mw train`, six steps, on texts of
random words. What is compared is the largest resident size by the last step (`peak_memory_bytes`) with the plan's
total, both with interpreter and libraries. Processes have the heap that `mw train` gives itself
(`modelwright.base.heap`). Layouts of two processes are launched by torchrun over gloo; the larger one is measured. The
ratio is the plan over the measurement: 1 is right, below 1 promises too much.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from modelwright.base import distributed, heap
from modelwright.base.artifact import new_artifact
from modelwright.base.device import peak_memory_bytes
from modelwright.base.files import write_json, write_jsonl
from modelwright.base.measured import circumstances, write_result
from modelwright.base.registry import lookup
from modelwright.cli.recipe import read_training_recipe
from modelwright.models.bert import ARCHITECTURES, BertConfig
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.sentence import SentenceEncoder, save_sentence_encoder
from modelwright.models.weights import save_model
from modelwright.nn.init import init_weights
from modelwright.ops.make import make_tokenizer
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.train import METHODS
from modelwright.train.plan import plan_run

RECIPES = Path(__file__).parents[1] / "recipes"
NUM_STEPS = 6
SHAPE = ["--shape.hidden_size=512", "--shape.num_layers=8", "--shape.num_heads=8", "--shape.intermediate_size=1408"]
PRETRAIN = ["--minutes=none", "--max_seq_len=256", *SHAPE, "--loop.micro_batch_size=8", "--loop.checkpoint.every=none"]
FINETUNE = ["--minutes=none", "--max_seq_len=512", "--loop.micro_batch_size=4", "--loop.grad_accum_steps=1"]
FINETUNE += ["--loop.checkpoint.every=none", "--loop.compile=false"]
ENCODER = ["--max_seq_len=256", "--loop.micro_batch_size=16", "--loop.checkpoint.every=none", "--loop.compile=false"]
ADAMW = ["--loop.optimizer.name=adamw"]
BOTTLENECK = ["--peft=bottleneck"]
SERIES = ["--model.window=120", "--model.hidden_size=512", "--loop.micro_batch_size=256", "--loop.precision=fp32"]
SERIES += ["--loop.checkpoint.every=none", "--loop.compile=false"]
UNSHARDED = ["--loop.parallel.shard=1", "--loop.parallel.zero=3"]
SMALL = "pretrain/small"
CASES: dict[str, tuple[str, list[str]]] = {
    "all weights, fp32, AdamW": (SMALL, [*PRETRAIN, *ADAMW, "--loop.precision=fp32"]),
    "all weights, bf16, AdamW": (SMALL, [*PRETRAIN, *ADAMW, "--loop.precision=bf16"]),
    "all weights, bf16, Muon, 2 micro-batches": (
        SMALL,
        [*PRETRAIN, "--loop.precision=bf16", "--loop.grad_accum_steps=2"],
    ),
    "blocks computed again, bf16": (
        SMALL,
        [*PRETRAIN, *ADAMW, "--loop.precision=bf16", "--loop.recompute.name=layers"],
    ),
    "vocabulary of 32,000 in pieces, bf16": (
        SMALL,
        [*PRETRAIN, *ADAMW, "--loop.precision=bf16", "--tokenizer=WORK/tokenizer-32000"],
    ),
    "a checkpoint every step, bf16": (
        SMALL,
        [*PRETRAIN, *ADAMW, "--loop.precision=bf16", "--loop.checkpoint.every=1"],
    ),
    "LoRA, bf16": ("finetune/quickstart", [*FINETUNE, "--loop.precision=bf16"]),
    "LoRA, fp32": ("finetune/quickstart", [*FINETUNE, "--loop.precision=fp32"]),
    "fine-tuning of all weights, bf16": ("finetune/all_weights", [*FINETUNE, "--loop.precision=bf16"]),
    "QLoRA, NF4": ("finetune/qlora-8b", [*FINETUNE, "--loop.precision=bf16"]),
    "DoRA, bf16": ("finetune/quickstart", [*FINETUNE, "--loop.precision=bf16", "--lora.use_dora=true"]),
    "bottleneck adapters, fp32": ("finetune/quickstart", [*FINETUNE, "--loop.precision=fp32", *BOTTLENECK]),
    "classification of texts, bf16": ("classify/finance", [*ENCODER, "--loop.precision=bf16"]),
    "masked language model, fp32": ("masked/domain", [*ENCODER, "--loop.precision=fp32"]),
    "LSTM on a series, fp32": ("forecast/stock", SERIES),
    "2 processes, DDP": ("pretrain/zero2", [*PRETRAIN, *UNSHARDED]),
    "2 processes, FSDP2 (ZeRO 3)": ("pretrain/zero2", [*PRETRAIN, "--loop.parallel.zero=3"]),
    "2 processes, ZeRO 2": ("pretrain/zero2", PRETRAIN),
    "2 processes, tensor": ("pretrain/zero2", [*PRETRAIN, *UNSHARDED, "--loop.parallel.tensor=2"]),
    "2 processes, pipeline": (
        "pretrain/zero2",
        [*PRETRAIN, *UNSHARDED, "--loop.parallel.pipeline=2", "--loop.micro_batch_size=2", "--loop.grad_accum_steps=4"],
    ),
}


def arguments(name: str, work: Path) -> tuple[Path, list[str]]:
    """Return the recipe of a case and what is changed of it."""
    recipe, changes = CASES[name]
    slug = "".join(letter if letter.isalnum() else "-" for letter in name)
    given = [f"--loop.num_steps={NUM_STEPS}", f"--out={work / 'out' / slug}"]
    if recipe.startswith("finetune"):
        given += [f"--data={work / 'pairs'}", f"--base={work / 'base'}"]
    elif recipe.startswith("forecast"):
        given += [f"--data={work / 'prices.csv'}", "--column=Close"]
    elif not recipe.startswith("pretrain"):
        given += [f"--data={work / ('data' if 'masked' in recipe else 'labelled')}", f"--base={work / 'encoder'}"]
    else:
        given += [f"--data={work / 'data'}", f"--tokenizer={work / 'tokenizer-8000'}", "--loop.compile=false"]
    changes = [change.replace("WORK", str(work)) for change in changes]
    if "2 processes, DDP" in name:
        changes.append("--loop.parallel.data=2")
    return RECIPES / f"{recipe}.yaml", [*given, *changes]


def make_world(work: Path) -> None:
    """Write texts, conversations, labels, prices, tokenizers and two models to start from."""
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(random.choice(letters, random.integers(3, 10))) for _ in range(20_000)]
    texts = [" ".join(random.choice(words, 400)) for _ in range(120)]
    make_encoder(work / "encoder", words)
    (work / "labelled").mkdir()
    for part, num in (("train", 120), ("validation", 16)):
        labelled = [{"text": texts[i], "label": ("negative", "neutral", "positive")[i % 3]} for i in range(num)]
        write_jsonl(work / "labelled" / f"{part}.jsonl", labelled)
    prices = 100 + random.normal(size=4000).cumsum()
    (work / "prices.csv").write_text("Date,Close\n" + "".join(f"{i},{price:.4f}\n" for i, price in enumerate(prices)))
    with new_artifact(work / "data", "dataset") as (folder, _):
        write_jsonl(folder / "train.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(texts)])
        write_jsonl(folder / "validation.jsonl", [{"id": "v", "text": texts[0]}])
    with new_artifact(work / "pairs", "dataset") as (folder, _):
        for part, num in (("train", 100), ("validation", 16)):
            rows = [
                {"messages": [{"role": role, "content": texts[i][at : at + 400]} for role, at in TURNS]}
                for i in range(num)
            ]
            write_jsonl(folder / f"{part}.jsonl", rows)
    for size in (8000, 32_000):
        make_tokenizer(work / "data", work / f"tokenizer-{size}", vocab_size=size)
    shape = LlamaConfig(8000, 512, 1408, 8, 8, max_seq_len=1024, tie_embeddings=True)
    tokenizer = load_tokenizer(work / "tokenizer-8000")
    with new_artifact(work / "base", "model") as (folder, _):
        save_model(init_weights(Llama(shape), 0), folder)
        tokenizer.save(folder)


def make_encoder(folder: Path, words: list[str]) -> None:
    """Write a BERT of 8 layers of 512 with a tokenizer that knows whole words."""
    tokens = ["[PAD]", "[MASK]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(words)][:8000]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(tokens[:5])
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3))
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    shape = BertConfig(len(tokens), 512, 2048, 8, 8)
    save_sentence_encoder(SentenceEncoder(init_weights(ARCHITECTURES["BertModel"](shape), 0)), folder)


TURNS = (("user", 0), ("assistant", 400))


def measure(name: str, work: Path) -> None:
    """Train a case and print its largest size after each step."""
    method, config = read_training_recipe(*arguments(name, work))

    def look(run, report) -> None:
        print("PEAK", peak_memory_bytes(), flush=True)

    with distributed.join():
        lookup(METHODS, method, "method")(config, hooks=[look])


def call(command: list[str], name: str, work: Path) -> str:
    """Run this file in a process of its own and return what it printed."""
    env = heap.joining_environment(os.environ) | {"GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*command, "--case", name, "--work", str(work)], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    return done.stdout


def compare(name: str, work: Path) -> dict[str, Any]:
    """Plan and measure a case."""
    planned = json.loads(call([sys.executable, __file__, "--plan"], name, work).rpartition("PLAN ")[2])
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if name.startswith("2 processes") else []
    printed = call([sys.executable, *launch, __file__, "--measure"], name, work)
    measured = max(int(line.split()[1]) for line in printed.splitlines() if line.startswith("PEAK"))
    ours = planned["total_bytes"]
    print(f"{name}: planned {ours / 1e6:,.0f} MB, measured {measured / 1e6:,.0f} MB, {ours / measured:.3f}", flush=True)
    parts = {key: planned[key] for key in planned if key.endswith("_bytes")} | planned["peak"]
    return {
        "name": name,
        "ours": ours / 1e6,
        "rival": measured / 1e6,
        "rival_name": "measured",
        "ratio": ours / measured,
        "unit": "MB",
        "runs": 1,
        "parts": parts,
    }


def in_order(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each case, in the order of the cases."""
    found = {row["name"]: row for row in rows}
    return [found[name] for name in CASES if name in found]


def add_row(file: Path, row: dict[str, Any]) -> None:
    """Write a row beside those of other cases that were measured with the same commit."""
    old = json.loads(file.read_text()) if file.is_file() else {}
    kept = old["rows"] if old.get("commit") == circumstances()["commit"] else []
    write_result(file, {"threads": torch.get_num_threads(), "rows": in_order([*kept, row])})


def join(file: Path, parts: list[Path]) -> None:
    """Write the rows of several files as one; they must be of one commit and machine."""
    found = [json.loads(part.read_text()) for part in parts]
    for key in ("commit", "machine", "versions", "threads"):
        if any(one[key] != found[0][key] for one in found):
            raise SystemExit(f"{key} differs: {', '.join(str(one[key]) for one in found)}")
    first = found[0] | {"command": "python benchmarks/plan.py --json plan.json"}
    write_json(file, first | {"rows": in_order(row for one in found for row in one["rows"])})


def main() -> None:
    """Compare all cases, or be one of their processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help="parts of names of cases, joined by semicolons")
    parser.add_argument("--work", type=Path, help="keep texts, tokenizers and model here")
    parser.add_argument("--join", type=Path, nargs="+", help="write into --json the rows of these files, of one commit")
    parser.add_argument("--plan", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plan:
        print("PLAN", json.dumps(plan_run(read_training_recipe(*arguments(given.case, given.work))[1]).to_dict()))
        return
    if given.measure:
        measure(given.case, given.work)
        return
    if given.join:
        join(given.json, given.join)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        if not (work / "base").is_dir():
            make_world(work)
        names = [n for n in CASES if not given.only or any(part in n for part in given.only.split(";"))]
        for name in names:
            row = compare(name, work)
            if given.json:
                add_row(given.json, row)


if __name__ == "__main__":
    main()
