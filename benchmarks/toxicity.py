"""Toxicity: the classifier against a lexicon learned from the same texts and against shuffled labels, three seeds.

    python benchmarks/toxicity.py --data FOLDER [--json FILE]

FOLDER/safety/hate_speech_tweets.csv.gz: 24,783 tweets (Davidson et al., 2017), toxic when most annotators said hate
speech or offensive; a fifth held out. The tweets were collected by a lexicon, which makes the lexicon a strong rival.
Transfer: the same classifier on RealToxicityPrompts' most provoking prompts against sentences of C4 of like length.
"""

import argparse
import csv
import gzip
import json
import random
import re
import statistics
from dataclasses import asdict
from pathlib import Path

from modelwright.base import env
from modelwright.base.measured import write_result
from modelwright.data.classify import LogisticConfig
from modelwright.data.quality import area_under_curve
from modelwright.data.toxicity import TOXIC, train_toxicity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=env.data_folder())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with gzip.open(options.data / "safety/hate_speech_tweets.csv.gz", "rt", encoding="utf-8") as file:
        tweets = list(csv.DictReader(file))
    texts, labels = [row["tweet"] for row in tweets], [row["class"] != "2" for row in tweets]
    prompts = [json.loads(line)["prompt"] for line in open(options.data / "safety/real_toxicity_prompts.jsonl")]
    pages = [json.loads(line)["text"] for line in gzip.open(options.data / "text/c4_sample.jsonl.gz", "rt")]
    sentences = [s for page in pages for s in re.split(r"(?<=[.!?])\s", page) if 40 < len(s) < 160]
    sentences = random.Random(0).sample(sentences, len(prompts))
    runs, transfers = [], []
    for seed in range(3):
        classifier, figures = train_toxicity(texts, labels, config=LogisticConfig(num_epochs=3, seed=seed))
        scores = classifier.probabilities([*prompts, *sentences])[:, classifier.labels.index(TOXIC)].tolist()
        transfers.append(area_under_curve(scores, [True] * len(prompts) + [False] * len(sentences)))
        runs.append(asdict(figures))
        print(runs[-1], transfers[-1])

    def row(name: str, ours: str, rival: str, unit: str) -> dict[str, object]:
        mine, theirs = ([run[key] for run in runs] for key in (ours, rival))
        means = statistics.mean(mine), statistics.mean(theirs)
        return {
            "name": name,
            "ours": round(means[0], 4),
            "rival": round(means[1], 4),
            "rival_name": "lexicon of 100 words learned from the same texts",
            "ratio": round(means[0] / means[1], 4),
            "unit": unit,
            "runs": [round(value, 4) for value in mine],
            "rival_runs": [round(value, 4) for value in theirs],
        }

    rows = [row("tweets, AUC", "auc", "lexicon_auc", "AUC"), row("tweets, F1", "f1", "lexicon_f1", "F1")]
    print(rows)
    if options.json:
        extra = {"shuffled_auc": [run["shuffled_auc"] for run in runs], "transfer_auc": transfers}
        write_result(options.json, {"rows": rows, **extra}, ("numpy",))


if __name__ == "__main__":
    main()
