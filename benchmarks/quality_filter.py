"""Does filtering pay? A model trained on the better half of a crawl against one trained on as many unfiltered tokens.

    MODELWRIGHT_DATA=FOLDER python benchmarks/quality_filter.py [--seeds 0 1 2] [--steps N] [--json FILE]
    python benchmarks/quality_filter.py --join PART.json PART.json --json FILE

The pool is what a crawl brings: web pages, film reviews, contracts, code answers, tables, declarations in a hundred
languages and lists of links, a few hundred of each, cut to 4,000 characters. A linear classifier of quality is trained
to tell chapters of eight books from the pool, in two folds, so that no document is scored by a classifier that saw it.
Three models of one shape, with the same steps and batches, are trained on as many tokens each: the better half by that
score, documents drawn at random, and, as a control, the worse half. The tokenizer is trained on the whole pool, so that
no side has one of its own. Measured: bits per byte on four other books, which nothing here has seen, and on web pages
that were left out of the pool. The second shows what the choice costs where the target is not books.

Source: Brown et al. 2020, appendix A (a classifier with good text as positives); Penedo et al. 2024 (FineWeb).
"""

import argparse
import csv
import gzip
import json
import random
import statistics
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from modelwright.base import env
from modelwright.base.measured import write_result
from modelwright.data.load import RowLoader
from modelwright.data.pack import stream_rows
from modelwright.data.quality import GOOD, train_quality
from modelwright.evaluate.perplexity import evaluate_text
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.train import train_bpe
from modelwright.train.loop import LoopConfig, train
from modelwright.train.objective import CausalLanguageModeling

DOCUMENT_CHARS, VOCAB_SIZE, ROW_LEN = 4000, 1024, 128
GOOD_BOOKS = (
    "jane_eyre_1260",
    "emma_158",
    "dracula_345",
    "great_expectations_1400",
    "peter_pan_16",
    "the_republic_1497",
    "treasure_island_120",
    "the_jungle_book_236",
)
OTHER_BOOKS = ("frankenstein_84", "the_time_machine_35", "moby_dick_or_the_whale_2701", "anne_of_green_gables_45")
ARMS = ("filtered", "unfiltered", "rejected")


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.open(file, "rt", encoding="utf-8")]


def cut_book(folder: Path, name: str, num: int) -> list[str]:
    """Return passages from the middle of a book, without its header and licence."""
    text = gzip.open(folder / "text" / "gutenberg" / f"{name}.txt.gz", "rt", encoding="utf-8").read()
    start, step = len(text) // 10, (len(text) * 8 // 10) // num
    return [text[start + i * step : start + i * step + min(step, DOCUMENT_CHARS)] for i in range(num)]


def read_pool(folder: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the pool as (kind, text), and web pages that are not in it."""
    rng = random.Random(0)
    pages = [row["text"] for row in read_lines(folder / "text" / "c4_sample.jsonl.gz")]
    rng.shuffle(pages)
    pool = [("web", text) for text in pages[:250]]
    with zipfile.ZipFile(folder / "text" / "nltk" / "movie_reviews.zip") as packed:
        names = sorted(name for name in packed.namelist() if name.endswith(".txt") and "README" not in name)
        pool += [("reviews", packed.read(name).decode("utf-8", "replace")) for name in rng.sample(names, 200)]
    with zipfile.ZipFile(folder / "text" / "nltk" / "udhr2.zip") as packed:
        names = sorted(name for name in packed.namelist() if name.endswith(".txt"))
        pool += [("languages", packed.read(name).decode("utf-8", "replace")) for name in rng.sample(names, 100)]
    contracts = read_lines(folder / "text" / "legal" / "cuad_contracts.jsonl.gz")
    pool += [("contracts", row["text"][8000:]) for row in rng.sample(contracts, 100)]
    code = json.load(gzip.open(folder / "instruct" / "gpteacher_codegen.json.gz"))
    answers = [row["response"] for row in rng.sample(code, 1000)]
    pool += [("code", "\n\n".join(answers[i : i + 5])) for i in range(0, 1000, 5)]
    with open(folder / "series" / "vix_daily.csv", newline="") as handle:
        rows = [",".join(row) for row in csv.reader(handle)]
    pool += [("tables", "\n".join(rows[i : i + 90])) for i in range(0, 90 * 80, 90)]
    lines = sorted({line.strip() for text in pages[:250] for line in text.split("\n") if 3 < len(line) < 60})
    pool += [("links", "\n".join(rng.sample(lines, 60))) for _ in range(100)]
    pool = [(kind, text[:DOCUMENT_CHARS]) for kind, text in pool]
    rng.shuffle(pool)
    return pool, [text[:DOCUMENT_CHARS] for text in pages[250:]]


def score_pool(good: Sequence[str], texts: Sequence[str]) -> tuple[list[float], list[float]]:
    """Return the score of each text by a classifier that did not see it, and both classifiers' figures (AUC)."""
    scores, areas = [0.0] * len(texts), []
    for fold in (0, 1):
        seen = [text for i, text in enumerate(texts) if i % 2 != fold]
        classifier, figures = train_quality(good, seen)
        areas.append(figures.auc)
        for i in range(fold, len(texts), 2):
            scores[i] = classifier.score(texts[i], GOOD)
    return scores, areas


def choose(order: Sequence[int], sizes: Sequence[int], num_tokens: int) -> list[int]:
    """Return the first documents of an order until they hold so many tokens."""
    chosen, total = [], 0
    for i in order:
        if total >= num_tokens:
            break
        chosen.append(i)
        total += sizes[i]
    return chosen


def learn(tokenizer: Tokenizer, texts: Sequence[str], num_steps: int, seed: int) -> Llama:
    ids = [np.array(found, dtype=np.int64) for found in tokenizer.encode_batch(texts)]
    config = LlamaConfig(tokenizer.vocab_size, 128, 352, 3, 4, max_seq_len=ROW_LEN, tie_embeddings=True)
    model = Llama(config)
    init_weights(model, seed)
    loop = LoopConfig(num_steps=num_steps, compile=False, precision="fp32", device="cpu", seed=seed)
    loader = RowLoader(lambda epoch: stream_rows(ids, ROW_LEN, tokenizer.eos_id, seed=seed * 1000 + epoch), 16)
    train(model, CausalLanguageModeling(), loader, loop)
    return model


def run_seeds(folder: Path, seeds: Sequence[int], num_steps: int) -> dict[str, object]:
    pool, web = read_pool(folder)
    kinds, texts = [kind for kind, _ in pool], [text for _, text in pool]
    scores, areas = score_pool([text for name in GOOD_BOOKS for text in cut_book(folder, name, 60)], texts)
    tokenizer = train_bpe(texts, VOCAB_SIZE)
    sizes = [len(ids) + 1 for ids in tokenizer.encode_batch(texts)]
    half = sum(sizes) // 2
    books = [text for name in OTHER_BOOKS for text in cut_book(folder, name, 10)]
    ranked = sorted(range(len(texts)), key=lambda i: -scores[i])
    runs: list[dict[str, object]] = []
    for seed in seeds:
        drawn = random.Random(f"unfiltered {seed}").sample(range(len(texts)), len(texts))
        for arm, order in zip(ARMS, (ranked, drawn, ranked[::-1]), strict=True):
            started = time.perf_counter()
            chosen = choose(order, sizes, half)
            model = learn(tokenizer, [texts[i] for i in chosen], num_steps, seed)
            run = {
                "seed": seed,
                "arm": arm,
                "tokens": sum(sizes[i] for i in chosen),
                "books": evaluate_text(model, tokenizer, books, max_seq_len=ROW_LEN).bits_per_byte,
                "web": evaluate_text(model, tokenizer, web, max_seq_len=ROW_LEN).bits_per_byte,
                "kinds": {kind: sum(kinds[i] == kind for i in chosen) for kind in dict.fromkeys(kinds)},
                "seconds": time.perf_counter() - started,
            }
            runs.append(run)
            print(f"seed {seed} {arm:10} books {run['books']:.3f}  web {run['web']:.3f}  {run['kinds']}", flush=True)
    return {"documents": len(texts), "tokens": sum(sizes), "auc": areas, "num_steps": num_steps, "runs": runs}


def compare(runs: Sequence[dict]) -> list[dict[str, object]]:
    """One row a measure and rival: mean over the seeds, and the spread (largest less smallest) of both."""
    rows = []
    for measure in ("books", "web"):
        found = {arm: [run[measure] for run in runs if run["arm"] == arm] for arm in ARMS}
        ours, spread = statistics.fmean(found["filtered"]), max(found["filtered"]) - min(found["filtered"])
        for rival in ARMS[1:]:
            other, other_spread = statistics.fmean(found[rival]), max(found[rival]) - min(found[rival])
            rows.append(
                {
                    "name": f"held-out {measure}, filtered half",
                    "ours": ours,
                    "rival": other,
                    "rival_name": f"{rival}, as many tokens",
                    "ratio": ours / other,
                    "unit": "bits per byte",
                    "runs": len(found[rival]),
                    "spread": spread,
                    "rival_spread": other_spread,
                    "is_beyond_spread": abs(ours - other) > max(spread, other_spread),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--join", type=Path, nargs="+", help="join the runs of parts instead of running")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.join:
        parts = [json.loads(part.read_text()) for part in arguments.join]
        for key in ("documents", "tokens", "num_steps"):
            if len({part[key] for part in parts}) > 1:
                parser.error(f"the parts differ in {key}: {', '.join(str(part[key]) for part in parts)}")
        figures = {**{k: parts[0][k] for k in ("documents", "tokens", "auc", "num_steps")}}
        figures["runs"] = [run for part in parts for run in part["runs"]]
    else:
        folder = env.data_folder()
        if folder is None:
            parser.error("MODELWRIGHT_DATA is not set to the folder of public data")
        figures = run_seeds(folder, arguments.seeds, arguments.steps)
    rows = compare(figures["runs"])
    for row in rows:
        print(
            f"{row['name']:30} {row['ours']:.3f} (spread {row['spread']:.3f})  {row['rival_name']:26} "
            f"{row['rival']:.3f} (spread {row['rival_spread']:.3f})  beyond the spread: {row['is_beyond_spread']}"
        )
    if arguments.json:
        write_result(arguments.json, {**figures, "threads": 1, "comparisons": rows})


if __name__ == "__main__":
    main()
