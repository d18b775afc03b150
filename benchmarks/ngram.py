"""N-gram models on WikiText-2: held-out perplexity of every smoothing and order, sums of probabilities, KenLM's scores.

    MODELWRIGHT_DATA=DIR python benchmarks/ngram.py [--orders 1 2 3 4 5] [--json FILE]

Trains on text/wikitext2/train_part.txt.gz, scores text/wikitext2/valid.txt.gz; a line is a sentence. Words seen once in
training are <unk> on both sides, so all models share a vocabulary. The control is trained on the same words in a random
order. KenLM (pip install kenlm) reads our ARPA files and scores them; without it those figures are null.
Writes ``benchmarks/results/ngram.json``.
"""

import argparse
import gzip
import json
import math
import os
import platform
import random
import subprocess
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from modelwright.base.device import describe_machine
from modelwright.models import SMOOTHINGS
from modelwright.models.ngram import NgramModel

ROOT = Path(__file__).parents[1]
MIN_COUNT = 2
NUM_CONTEXTS = 200
NUM_SCORED = 500  # sentences scored by KenLM too


def read_lines(name):
    folder = Path(os.environ.get("MODELWRIGHT_DATA", "")) / "text" / "wikitext2"
    if not folder.is_dir():
        print("Nothing is measured: set MODELWRIGHT_DATA to a folder with text/wikitext2.")
        raise SystemExit(0)
    with gzip.open(folder / name, "rt", encoding="utf-8") as handle:
        return [line for line in handle if line.strip()]


def shuffle_words(lines):
    """Return sentences of the same lengths whose words are drawn from all of them without replacement."""
    words = [word for line in lines for word in line.split()]
    random.Random(0).shuffle(words)
    drawn = iter(words)
    return [[next(drawn) for _ in line.split()] for line in lines]


def largest_sum_error(model, lines):
    """Largest distance of a distribution's sum from 1 over contexts seen, never seen, and of words drawn at random."""
    draw = random.Random(1)
    worst = 0.0
    for i in range(NUM_CONTEXTS):
        words = draw.choice(lines).split()
        start = draw.randrange(len(words))
        context = words[start : start + draw.randint(0, model.order)]
        if i % 2:
            context = draw.choices(model.vocabulary[2:], k=draw.randint(1, model.order))
        worst = max(worst, abs(float(model.distribution(context).sum()) - 1))
    return worst


def kenlm_error(model, lines):
    """Largest difference of a word's log10 probability between us and KenLM reading our file."""
    try:
        import kenlm
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.arpa"
        model.save_arpa(path)
        theirs = kenlm.Model(str(path))
    worst = 0.0
    for line in lines[:NUM_SCORED]:
        each = np.array([score for score, _, _ in theirs.full_scores(line)])
        worst = max(worst, float(np.abs(each - model.log_probs(line) / math.log(10)).max()))
    return worst


def measure(train, held_out, order, smoothing):
    start = time.perf_counter()
    model = NgramModel.train(train, order, smoothing, min_count=MIN_COUNT)
    seconds = time.perf_counter() - start
    return {
        "order": order,
        "smoothing": smoothing,
        "perplexity": model.perplexity(*held_out),
        "training_perplexity": model.perplexity(*train[:500]),
        "num_ngrams": model.num_ngrams,
        "train_seconds": round(seconds, 2),
        "sum_error": largest_sum_error(model, held_out),
        "kenlm_error": kenlm_error(model, held_out) if order in (3, 5) else None,
    }


def main():
    """Measure every smoothing and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orders", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "ngram.json")
    arguments = parser.parse_args()
    train, held_out = read_lines("train_part.txt.gz"), read_lines("valid.txt.gz")
    models = []
    for smoothing in SMOOTHINGS:
        for order in arguments.orders:
            models.append(measure(train, held_out, order, smoothing))
            print(json.dumps(models[-1]), flush=True)
    control = NgramModel.train(shuffle_words(train), 3, "modified_kneser_ney", min_count=MIN_COUNT)
    known = set(control.vocabulary)
    words = [word for line in held_out for word in line.split()]
    result = {
        "command": "MODELWRIGHT_DATA=DIR python benchmarks/ngram.py",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip(),
        "machine": asdict(describe_machine()),
        "versions": {"numpy": version("numpy"), "python": platform.python_version()},
        "data": {
            "num_training_sentences": len(train),
            "num_training_words": sum(len(line.split()) for line in train),
            "num_held_out_sentences": len(held_out),
            "num_held_out_words": len(words),
            "vocab_size": control.vocab_size,
            "unknown_fraction": sum(word not in known or word == "<unk>" for word in words) / len(words),
        },
        "models": models,
        "control_perplexity": control.perplexity(*held_out),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "models"}, indent=1))


if __name__ == "__main__":
    main()
