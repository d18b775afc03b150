"""A T5 trained from nothing on a few hundred pairs: a translation and a summary, beside baselines that copy.

    MODELWRIGHT_DATA=DIR python benchmarks/small_t5.py [--tasks sql summary] [--seeds 0 1 2] [--json FILE]

    sql      questions about geography into SQL (GeoQuery): 595 pairs to learn, 277 to test; exact matches and ROUGE-L
    summary  the conclusion of a medical abstract (PubMedQA, expert part): 900 to learn, 100 to test; ROUGE-L

No pretrained T5 is at hand, so both begin from random weights (2 + 2 layers) and a tokenizer of their own, through
`modelwright.train.write`. Baselines: the target of the nearest training source by TF-IDF (for both), and the first and
last sentence of the abstract (lead; for summaries). Controls: the model before training, and one trained on targets
that were shuffled among the sources. Runs of other seeds in the file are kept.
"""

import argparse
import gzip
import json
import random
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from modelwright.base.env import data_folder
from modelwright.base.files import write_jsonl
from modelwright.base.measured import write_result
from modelwright.data.examples import length_mask, pad
from modelwright.data.novelty import rouge_l
from modelwright.models.encoder_decoder import write_greedily
from modelwright.models.t5 import T5, T5Config
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.optim.schedule import ScheduleConfig
from modelwright.train.loop import LoopConfig
from modelwright.train.write import WriteConfig, run_write

PACKAGES = ("torch", "tokenizers", "scikit-learn")


@dataclass(frozen=True)
class Task:
    """How long texts are and how long is learned."""

    vocab_size: int
    max_seq_len: int
    max_target_len: int
    epochs: float
    hidden_size: int = 128


KEYS = {"sql": ("exact", "rouge_l"), "summary": ("rouge_l",)}
NAMES = {"sql": "questions to SQL", "summary": "conclusions of medical abstracts"}
TASKS = {"sql": Task(600, 48, 160, 30.0), "summary": Task(3000, 160, 56, 6.0)}


def sql_pairs(folder):
    """Return questions about geography and their SQL."""
    with open(folder / "sql" / "geography" / "questions.jsonl", encoding="utf-8") as handle:
        rows = [json.loads(line) for line in handle]
    parts = {"train": [], "validation": []}
    for row in rows:
        parts["validation" if row["split"] == "test" else "train"].append((row["question"], row["sql"]))
    return parts


def summary_pairs(folder):
    """Return abstracts without their conclusion, and the conclusion."""
    with gzip.open(folder / "text" / "pubmedqa_pqal.json.gz", "rt", encoding="utf-8") as handle:
        rows = [(" ".join(row["CONTEXTS"]), row["LONG_ANSWER"]) for row in json.load(handle).values()]
    random.Random(0).shuffle(rows)
    return {"train": rows[:900], "validation": rows[900:]}


def nearest(pairs):
    """Return for each held-out source the target of the training source that is nearest by TF-IDF."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    known = words.fit_transform([source for source, _ in pairs["train"]])
    found = (words.transform([source for source, _ in pairs["validation"]]) @ known.T).toarray().argmax(1)
    return [pairs["train"][i][1] for i in found]


def make_base(task, pairs, seed, folder):
    """Write a T5 with random weights and a byte-level tokenizer learned from the training part."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=task.vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text for pair in pairs["train"] for text in pair], trainer)
    config = T5Config(
        vocab_size=backend.get_vocab_size(),
        hidden_size=task.hidden_size,
        head_dim=32,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        act="gelu",
        is_gated=True,
        tie_embeddings=False,
    )
    save_model(init_weights(T5(config), seed), folder)
    backend.save(str(folder / "tokenizer.json"))
    return backend


def write(model, backend, task, sources):
    """Return what the model writes for each source, greedily."""
    texts = []
    ids = [[*e.ids[: task.max_seq_len - 1], 1] for e in backend.encode_batch(sources)]
    for start in range(0, len(ids), 50):
        part = ids[start : start + 50]
        encoded = model.encode(pad(part, 0), length_mask(part))
        begin = torch.zeros(len(part), 1, dtype=torch.long)
        found = write_greedily(model, encoded, begin, max_new_tokens=task.max_target_len, eos_token_id=1)
        texts += [backend.decode(row).strip() for row in found]
    return texts


def figures(texts, pairs):
    """Return how near what was written is to what was wanted."""
    wanted = [target for _, target in pairs["validation"]]
    return {
        "rouge_l": statistics.fmean(rouge_l(text, target) for text, target in zip(texts, wanted, strict=True)),
        "exact": statistics.fmean(text == target for text, target in zip(texts, wanted, strict=True)),
    }


def run_one(name, pairs, seed, is_shuffled, folder):
    """Train one seed and return its figures."""
    task = TASKS[name]
    taught = pairs["train"]
    if is_shuffled:
        targets = [target for _, target in taught]
        random.Random(seed).shuffle(targets)
        taught = [(source, target) for (source, _), target in zip(taught, targets, strict=True)]
    for part, rows in (("train", taught), ("validation", pairs["validation"])):
        write_jsonl(folder / f"{part}.jsonl", [{"source": source, "target": target} for source, target in rows])
    backend = make_base(task, pairs, seed, folder)
    found = {}
    if not is_shuffled:
        few = pairs["validation"][:50]
        texts = write(load_model(folder).eval(), backend, task, [source for source, _ in few])
        found["untrained"] = figures(texts, {"validation": few})
    steps = round(task.epochs * len(taught) / 16)
    loop = LoopConfig(
        num_steps=steps,
        micro_batch_size=16,
        compile=False,
        precision="fp32",
        device="cpu",
        seed=seed,
        optimizer=OptimizerConfig("adamw", adamw=AdamWConfig(2e-3, (0.9, 0.98), 0.01)),
        schedule=ScheduleConfig("linear", steps // 20),
    )
    config = WriteConfig(
        folder,
        folder,
        folder.with_name(folder.name + "-out"),
        max_seq_len=task.max_seq_len,
        max_target_len=task.max_target_len,
        loop=loop,
    )
    started = time.perf_counter()
    result = run_write(config)
    seconds = time.perf_counter() - started
    model = load_model(result.out).eval()
    texts = write(model, backend, task, [source for source, _ in pairs["validation"]])
    found["shuffled" if is_shuffled else "trained"] = {
        **figures(texts, pairs),
        "validation_loss": result.figures["validation_loss"],
        "validation_loss_before": result.figures["validation_loss_before"],
        "seconds": seconds,
        "examples": texts[:2],
    }
    return found


def baselines(name, pairs):
    """Return the figures of what needs no training."""
    found = {"target of the nearest source (TF-IDF)": figures(nearest(pairs), pairs)}
    if name == "summary":
        cut = [re.split(r"(?<=[.!?])\s+", source) for source, _ in pairs["validation"]]
        found["first sentence"] = figures([sentences[0] for sentences in cut], pairs)
        found["last sentence"] = figures([sentences[-1] for sentences in cut], pairs)
    return found


def summarise(tasks):
    """Return a row for each figure of a task beside each rival and control."""
    rows = []
    for name, task in tasks.items():
        runs = [run for run in task["runs"].values() if "trained" in run]
        for key in KEYS[name] if runs else ():
            ours = [run["trained"][key] for run in runs]
            rivals = {rival: [values[key]] for rival, values in task["baselines"].items()}
            rivals["control: before training"] = [run["untrained"][key] for run in runs]
            rivals["control: shuffled targets"] = [r["shuffled"][key] for r in task["runs"].values() if "shuffled" in r]
            for rival, values in rivals.items():
                if not values:
                    continue
                mean = statistics.mean(values)
                rows.append(
                    {
                        "name": f"{NAMES[name]}, T5 from nothing",
                        "ours": statistics.mean(ours),
                        "rival": mean,
                        "rival_name": rival,
                        "ratio": statistics.mean(ours) / mean if mean else None,
                        "unit": {"exact": "exact matches", "rouge_l": "ROUGE-L"}[key],
                        "runs": {"ours": ours, "rival": values},
                    }
                )
    return rows


def main():
    """Make the runs that are missing and write all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--control", action="store_true", help="train on shuffled targets instead")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    data = data_folder()
    if data is None:
        raise SystemExit("Set MODELWRIGHT_DATA to the folder with sql/geography and text/pubmedqa_pqal.json.gz.")
    tasks = json.loads(given.json.read_text())["tasks"] if given.json and given.json.is_file() else {}
    for name in given.tasks:
        pairs = {"sql": sql_pairs, "summary": summary_pairs}[name](data)
        task = tasks.setdefault(name, {"baselines": baselines(name, pairs), "runs": {}})
        print(name, task["baselines"], flush=True)
        for seed in given.seeds:
            run = task["runs"].setdefault(str(seed), {})
            if ("shuffled" if given.control else "trained") in run:
                continue
            with tempfile.TemporaryDirectory() as folder:
                work = Path(folder) / "t5"
                work.mkdir()
                run.update(run_one(name, pairs, seed, given.control, work))
            print(name, seed, run, flush=True)
            keep(given.json, tasks)
    keep(given.json, tasks)


def keep(path, tasks):
    if path:
        write_result(path, {"tasks": tasks, "rows": summarise(tasks)}, PACKAGES)


if __name__ == "__main__":
    main()
