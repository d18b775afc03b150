"""A trained model gets another tokenizer: bits per byte right after, and after brief tuning, by how its rows begin.

    python benchmarks/transplant.py --data FOLDER [--seeds 0 1 2] [--steps 400] [--json FILE]

A decoder (2 layers of 96, tied) learns WikiText-2 under a BPE of 2,048 pieces; it then gets a BPE of 4,096 learned
from books, so that many tokens are new. Rows of new tokens: TokenAdapt's mixture, the plain mean of the pieces, and as
controls the mean of all rows and rows drawn anew. Each is tuned for 50 steps on the same text; held-out text is scored
before and after. A model trained from nothing for those 50 steps under the new tokenizer is the last control.
FOLDER holds ``text/wikitext2`` and ``text/gutenberg``. `ratio` is ours (adapt) / rival; the mean over the seeds.
Seeds can be run one at a time: what the JSON file has of other seeds is kept.
"""

import argparse
import copy
import json
import os
import statistics
from pathlib import Path
from typing import Any

from tokenizer_texts import english, wikitext

from modelwright.base.measured import write_result
from modelwright.compress.transplant import transplant
from modelwright.evaluate.perplexity import evaluate_text
from modelwright.ops.fixed_compute import ComputeConfig, train_decoder
from modelwright.tokenizer.train import train_bpe

WAYS = ("adapt", "pieces", "mean", "random")
TUNED = (0, 50)
NAMES = {"pieces": "plain mean of the pieces", "mean": "mean of all rows", "random": "rows drawn anew"}


def study(folder: Path, seed: int, num_steps: int) -> dict[str, Any]:
    """Return bits per byte of one seed, by way and number of tuning steps."""
    text = wikitext(folder)
    training, held_out = [text[: len(text) * 9 // 10]], [text[len(text) * 9 // 10 :][:120_000]]
    old = train_bpe(training, 2048)
    new = train_bpe(english(folder)[1:6], 4096)
    config = ComputeConfig(hidden_size=96, num_layers=2)
    model = train_decoder(old, training, config, num_steps, seed)

    def score(one, tokenizer):
        return evaluate_text(one, tokenizer, held_out, max_seq_len=config.max_seq_len).bits_per_byte

    found: dict[str, Any] = {"before": score(model, old)}
    for way in WAYS:
        changed, overlap = transplant(model, old, new, way=way, seed=seed)
        found["shared"], found["composed"] = len(overlap.shared), len(overlap.spelled)
        bits = {}
        for steps in TUNED:
            one = copy.deepcopy(changed)
            bits[str(steps)] = score(train_decoder(new, training, config, steps, seed, one) if steps else one, new)
        found[way] = bits
    found["from nothing"] = {str(TUNED[-1]): score(train_decoder(new, training, config, TUNED[-1], seed), new)}
    return found


def rows_of(runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for steps in map(str, TUNED):
        ours = [run["adapt"][steps] for run in runs.values()]
        for way, name in [*NAMES.items(), ("from nothing", "trained from nothing for as many steps")]:
            rival = [run[way][steps] for run in runs.values() if steps in run[way]]
            if rival:
                a, b = statistics.mean(ours), statistics.mean(rival)
                rows.append(
                    {
                        "name": f"after transplant, {steps} tuning steps",
                        "ours": a,
                        "rival": b,
                        "rival_name": name,
                        "ratio": a / b,
                        "unit": "bits per byte",
                        "runs": {"ours": ours, "rival": rival},
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MODELWRIGHT_DATA"), help="Folder of the texts.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give --data FOLDER, or set MODELWRIGHT_DATA")
    for seed in arguments.seeds:
        found = study(arguments.data, seed, arguments.steps)
        print(seed, json.dumps(found))
        if arguments.json:
            kept = json.loads(arguments.json.read_text())["seeds"] if arguments.json.is_file() else {}
            runs = dict(sorted({**kept, str(seed): found}.items()))
            write_result(arguments.json, {"steps": arguments.steps, "seeds": runs, "rows": rows_of(runs)})


if __name__ == "__main__":
    main()
