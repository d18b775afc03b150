"""What the classical models learn, each beside a baseline and a control that must fail, with several seeds.

    MODELWRIGHT_DATA=DIR python benchmarks/classical.py [--parts lag reversal ...] [--seeds 0 1 2] [--json FILE]

    lag         the first of 51 symbols is asked for at the end: gated cells against a plain RNN
    reversal    strings written backwards: attention against none, and against shuffled targets
    language    characters of Tiny Shakespeare: recurrent and feed-forward models against n-grams
    words       analogies in a planted text, categories in WikiText-2: word2vec and GloVe against shuffled text
    digits      scikit-learn's handwritten digits by the NumPy network, every update rule, against shuffled labels
    series      an LSTM against the last value and a linear model: a season, a random walk, daily prices, volatility

Parts that are not run keep the figures that the file already has. Writes ``benchmarks/results/classical.json``.
"""

import argparse
import csv
import gzip
import json
import os
import platform
import random
import re
import subprocess
import time
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from modelwright.base.device import describe_machine
from modelwright.models import NUMPY_OPTIMIZERS
from modelwright.models.feedforward import FeedForwardConfig, FeedForwardLM
from modelwright.models.fit import fit_steps
from modelwright.models.glove import GloveConfig, train_glove
from modelwright.models.multilayer import Multilayer, MultilayerConfig, fit
from modelwright.models.ngram import NgramModel
from modelwright.models.recurrent import RecurrentClassifier, RecurrentConfig, RecurrentLM
from modelwright.models.seq2seq import ATTENTIONS, Seq2Seq, Seq2SeqConfig
from modelwright.models.series import SeriesConfig, fit_regressor, walk_forward
from modelwright.models.word2vec import Word2VecConfig, train_word2vec
from modelwright.nn.init import init_weights
from modelwright.train.forecast import fit_linear

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("MODELWRIGHT_DATA", ""))
LAG, LAG_STEPS = 50, 300
NUM_SYMBOLS, SHORTEST, LONGEST, REVERSAL_STEPS = 20, 4, 10, 500
WINDOW = 64  # characters a row in the language part
CATEGORIES = {
    "months": "january february march april june july august september october november december",
    "numbers": "two three four five six seven eight nine ten",
    "family": "mother father brother sister son daughter wife husband",
    "colours": "red blue green white black brown yellow",
    "directions": "north south east west",
    "body": "hand head eye face arm foot",
    "pronouns": "he she they we it you",
    "time": "day night week month year hour",
}


# lag


def recall_rows(num_rows, generator):
    ids = torch.randint(2, 8, (num_rows, LAG + 1), generator=generator)
    ids[:, 0] = torch.randint(0, 2, (num_rows,), generator=generator)
    return ids, ids[:, 0].clone()


def recall_accuracy(seed, cell, memory_len=None, learning_rate=1e-2, is_orthogonal=False):
    model = RecurrentClassifier(RecurrentConfig(8, 32, cell=cell, num_labels=2, memory_len=memory_len))
    init_weights(model, seed, std=0.5)
    if is_orthogonal:
        torch.manual_seed(seed)
        nn.init.orthogonal_(model.layers[0].cell.hidden_weight)
    generator = torch.Generator().manual_seed(seed)

    def loss_at(step):
        ids, labels = recall_rows(64, generator)
        return F.cross_entropy(model(ids).logits, labels)

    fit_steps(model, loss_at, LAG_STEPS, learning_rate=learning_rate)
    ids, labels = recall_rows(1000, torch.Generator().manual_seed(10**6))
    with torch.no_grad():
        return float((model(ids).logits.argmax(-1) == labels).float().mean())


def lag(seeds):
    runs = {
        "LSTM, memory_len 60": {"cell": "lstm", "memory_len": 60},
        "GRU, memory_len 60": {"cell": "gru", "memory_len": 60},
        "LSTM, forget bias 1": {"cell": "lstm"},
        "RNN": {"cell": "rnn"},
        "RNN, rate 0.001": {"cell": "rnn", "learning_rate": 1e-3},
        "RNN, orthogonal": {"cell": "rnn", "is_orthogonal": True, "learning_rate": 3e-3},
    }
    return {name: [recall_accuracy(seed, **settings) for seed in seeds] for name, settings in runs.items()}


# reversal


def strings(source, num):
    return [
        tuple(3 + source.randrange(NUM_SYMBOLS) for _ in range(source.randint(SHORTEST, LONGEST))) for _ in range(num)
    ]


def reversal_accuracy(seed, attention, is_shuffled=False):
    model = Seq2Seq(Seq2SeqConfig(3 + NUM_SYMBOLS, 32, 64, attention=attention))
    init_weights(model, seed, std=0.1)
    held_out = sorted(set(strings(random.Random(10**6), 500)))
    left_out = set(held_out)
    source = random.Random(seed)

    def loss_at(step):
        sources = [s for s in strings(source, 64) if s not in left_out]
        targets = [s[::-1] for s in sources]
        if is_shuffled:
            source.shuffle(targets)
        return model.loss(model.make_pairs(sources, targets))

    fit_steps(model, loss_at, REVERSAL_STEPS, learning_rate=6e-3)
    written = model.greedy(held_out, LONGEST + 3)
    return float(np.mean([tuple(w) == s[::-1] for w, s in zip(written, held_out, strict=True)]))


def reversal(seeds):
    found = {name: [reversal_accuracy(seed, name) for seed in seeds] for name in ATTENTIONS}
    found["no attention"] = [reversal_accuracy(seed, None) for seed in seeds]
    found["bahdanau, shuffled targets"] = [reversal_accuracy(seed, "bahdanau", is_shuffled=True) for seed in seeds]
    return found


# language


def language(seeds):
    with gzip.open(DATA / "text" / "tinyshakespeare.txt.gz", "rt", encoding="utf-8") as handle:
        text = handle.read()
    symbols = sorted(set(text))
    ids = np.array([symbols.index(c) for c in text])
    train, held_out = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
    found = {}
    for order in (1, 3, 5, 7):
        model = NgramModel.train([train], order, vocab_size=len(symbols))
        found[f"{order}-gram, modified Kneser-Ney"] = [float(np.log2(model.perplexity(held_out)))]
    size = len(symbols)
    made = {
        "feed-forward, order 8": lambda: FeedForwardLM(FeedForwardConfig(size, 8, 24, 256)),
        "RNN": lambda: RecurrentLM(RecurrentConfig(size, 192, cell="rnn")),
        "GRU": lambda: RecurrentLM(RecurrentConfig(size, 192, cell="gru")),
        "LSTM": lambda: RecurrentLM(RecurrentConfig(size, 192, cell="lstm")),
    }
    for name, make in made.items():
        found[name] = [character_bits(make(), seed, train, held_out) for seed in seeds]
    return found


def character_bits(model, seed, train, held_out, num_steps=600):
    init_weights(model, seed, std=0.1)
    generator = torch.Generator().manual_seed(seed)
    train = torch.from_numpy(train)

    def loss_at(step):
        starts = torch.randint(len(train) - WINDOW - 1, (48,), generator=generator)
        rows = train[starts[:, None] + torch.arange(WINDOW + 1)]
        return F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())

    fit_steps(model, loss_at, num_steps, learning_rate=5e-3)
    # The held-out text as 16 streams, each read in one go through the decode state.
    length = len(held_out) // 16
    rows = torch.from_numpy(held_out[: 16 * length].reshape(16, length))
    state, total = model.new_state(16, length), 0.0
    with torch.no_grad():
        for part in rows[:, :-1].split(512, 1):
            start = state.length
            logits = model(part, positions=state.positions(part.shape[1]), state=state).logits
            wanted = rows[:, start + 1 : start + 1 + part.shape[1]]
            total += float(F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
    return total / np.log(2) / (16 * (length - 1))


# words


def planted(seed, is_shuffled, num_things=6):
    draw = random.Random(seed)
    sentences = []
    for _ in range(2000):
        thing, role = draw.randrange(num_things), draw.randrange(2)
        words = [f"name{thing}{role}", *(f"thing{thing}{draw.randrange(3)}" for _ in range(2))]
        words += [f"role{role}{draw.randrange(3)}" for _ in range(2)]
        noise = [f"thing{draw.randrange(num_things)}{draw.randrange(3)}", f"role{draw.randrange(2)}{draw.randrange(3)}"]
        draw.shuffle(words)
        sentences.append([draw.choice(noise) if draw.random() < 0.2 else word for word in words])
    return shuffled(sentences, seed) if is_shuffled else sentences


def shuffled(sentences, seed):
    words = [word for sentence in sentences for word in sentence]
    random.Random(seed).shuffle(words)
    drawn = iter(words)
    return [[next(drawn) for _ in sentence] for sentence in sentences]


def analogies(vectors, num_things=6):
    pairs = [(i, j) for i in range(num_things) for j in range(num_things) if i != j]
    return float(
        np.mean([vectors.analogy(f"name{j}0", f"name{j}1", f"name{i}0", 1)[0][0] == f"name{i}1" for i, j in pairs])
    )


def categories(vectors):
    """Share of the listed words whose nearest listed word is of the same category."""
    of = {word: name for name, words in CATEGORIES.items() for word in words.split() if word in vectors}
    nearest = {a: max((b for b in of if b != a), key=lambda b, a=a: vectors.similarity(a, b)) for a in of}
    return float(np.mean([of[nearest[word]] == of[word] for word in of]))


def wikitext():
    found = []
    for name in ("train_part.txt.gz", "valid.txt.gz"):
        with gzip.open(DATA / "text" / "wikitext2" / name, "rt", encoding="utf-8") as handle:
            found += [re.findall(r"[a-z]+", line.lower()) for line in handle]
    return [words for words in found if len(words) > 3]


def words(seeds):
    small = {"size": 24, "window": 4, "min_count": 1, "batch_size": 64}
    large = {"size": 64, "min_count": 5}
    learners = {
        "skipgram": lambda text, seed, is_small: train_word2vec(
            text,
            Word2VecConfig(learning_rate=0.05, subsample=None, seed=seed, **small)
            if is_small
            else Word2VecConfig(num_epochs=3, learning_rate=0.05, batch_size=512, seed=seed, **large),
        ),
        "cbow": lambda text, seed, is_small: train_word2vec(
            text,
            Word2VecConfig("cbow", learning_rate=0.05, subsample=None, seed=seed, **small)
            if is_small
            else Word2VecConfig("cbow", num_epochs=3, learning_rate=0.05, batch_size=512, seed=seed, **large),
        ),
        "glove": lambda text, seed, is_small: train_glove(
            text,
            GloveConfig(x_max=50, num_epochs=40, seed=seed, **{**small, "size": 16})
            if is_small
            else GloveConfig(x_max=10, num_epochs=10, seed=seed, **large),
        ),
    }
    text = wikitext()
    found = {"num_words": sum(map(len, text))}
    for name, learn in learners.items():
        found[name] = {
            "analogies": [analogies(learn(planted(seed, False), seed, True)) for seed in seeds],
            "analogies, shuffled": [analogies(learn(planted(seed, True), seed, True)) for seed in seeds],
            # One seed: a run on the real text takes a minute.
            "categories": [categories(learn(text, 0, False))],
            "categories, shuffled": [categories(learn(shuffled(text, 0), 0, False))],
        }
    return found


# digits


def digits(seeds):
    from sklearn.datasets import load_digits

    data = load_digits()

    def accuracy(seed, optimizer, is_shuffled=False):
        draw = np.random.default_rng(seed)
        order = draw.permutation(len(data.target))
        x, y = data.data[order] / 16, data.target[order]
        cut = int(0.8 * len(y))
        labels = draw.permutation(y[:cut]) if is_shuffled else y[:cut]
        model = Multilayer(MultilayerConfig((64, 64, 10)), seed)
        fit(model, x[:cut], labels, optimizer, num_epochs=30, seed=seed)
        return float(np.mean(model.predict(x[cut:]).argmax(1) == y[cut:]))

    found = {name: [accuracy(seed, name) for seed in seeds] for name in NUMPY_OPTIMIZERS}
    found["adam, shuffled labels"] = [accuracy(seed, "adam", is_shuffled=True) for seed in seeds]
    return found


# series


def read_column(name, column):
    with open(DATA / "series" / name, encoding="utf-8") as handle:
        return np.array([float(row[column]) for row in csv.DictReader(handle)])


def fit_line(inputs, targets):
    """Fit the least-squares line from the changes in a window to the next one: a rival for `fit_regressor`."""
    weights = fit_linear(np.diff(inputs), targets - inputs[:, -1])
    return lambda seen: seen[:, -1] + np.column_stack([np.diff(seen), np.ones(len(seen))]) @ weights


def series(seeds):
    time_of = np.arange(600)
    draw = np.random.default_rng(0)
    rows = {
        "a season with trend and noise": 50
        + 0.05 * time_of
        + 3 * np.sin(2 * np.pi * time_of / 12)
        + draw.normal(0, 0.3, 600),
        "a random walk (control)": 50 + draw.normal(0, 1, 600).cumsum(),
        "Apple, daily close": read_column("aapl_daily.csv", "AAPL.Close"),
        "VIX, daily close, last 2,000 days": read_column("vix_daily.csv", "CLOSE")[-2000:],
    }
    found = {}
    for name, values in rows.items():
        runs = []
        for seed in seeds:
            fitted = partial(fit_regressor, config=SeriesConfig(window=24, hidden_size=16), seed=seed, num_steps=200)
            runs.append(walk_forward(values, fitted, window=24, num_folds=5))
        found[name] = {
            "rmse": [run.rmse for run in runs],
            "naive_rmse": runs[0].naive_rmse,
            "linear_rmse": walk_forward(values, fit_line, window=24, num_folds=5).rmse,
            "skill": [run.skill for run in runs],
        }
    return found


PARTS = {
    "lag": lag,
    "reversal": reversal,
    "language": language,
    "words": words,
    "digits": digits,
    "series": series,
}


def main():
    """Run the parts and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "classical.json")
    arguments = parser.parse_args()
    if not DATA.joinpath("text").is_dir():
        print("Nothing is measured: set MODELWRIGHT_DATA to the folder of the public data.")
        return
    result = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json.exists() else {}
    for part in arguments.parts:
        start = time.perf_counter()
        found = PARTS[part](arguments.seeds)
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
        result[part] = {
            "command": f"MODELWRIGHT_DATA=DIR python benchmarks/classical.py --parts {part}",
            "commit": commit.stdout.strip(),
            "machine": asdict(describe_machine()),
            "versions": {"torch": torch.__version__, "numpy": version("numpy"), "python": platform.python_version()},
            "seeds": arguments.seeds,
            "seconds": round(time.perf_counter() - start, 1),
            "found": found,
        }
        print(part, json.dumps(result[part]["found"], indent=1), f"{result[part]['seconds']} s", flush=True)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
