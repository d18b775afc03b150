"""Does the law that small runs follow say what a larger one will end with? Books, characters, minutes of one thread.

    python benchmarks/scaling.py [--work DIR] [--seed N] [--json FILE] [--plot FILE]

Needs MODELWRIGHT_DATA (its Gutenberg books in English; two of them are held out). A ladder of four sizes and four
amounts of data is trained, the law of Hoffmann et al. 2022 fitted to it (approach 3), and its prediction compared with
a run of more than twice the parameters on twice the data. Rival: the loss of the best rung, which is what one would
expect of the larger run without a law. A killed study goes on where it was.
"""

import argparse
import gzip
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from modelwright.base import env
from modelwright.base.artifact import new_artifact
from modelwright.base.files import write_jsonl
from modelwright.base.measured import write_result
from modelwright.ops.make import make_tokenizer
from modelwright.train.checkpoint import CheckpointConfig
from modelwright.train.loop import LoopConfig
from modelwright.train.scaling import LadderConfig, ScalingConfig, plot_scaling, run_scaling

HELD_OUT = ("dracula_345", "the_secret_garden_113")
VOCAB_SIZE = 384  # 256 bytes, the marks of roles, and a few merges


def make_data(folder: Path) -> Path:
    """Write the books as a data set; return its folder."""
    root = env.read("MODELWRIGHT_DATA")
    if not root:
        raise SystemExit("Set MODELWRIGHT_DATA to the folder that holds text/gutenberg.")
    parts: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for file in sorted(Path(root, "text", "gutenberg").glob("*.txt.gz")):
        if file.name[:3] in ("de_", "fr_", "es_", "el_"):
            continue
        name = file.name.removesuffix(".txt.gz")
        text = gzip.decompress(file.read_bytes()).decode("utf-8", "replace")
        pieces = [text[at : at + 4000] for at in range(0, len(text), 4000)]
        part = parts["validation" if name in HELD_OUT else "train"]
        part += [{"id": f"{name}-{index}", "text": piece} for index, piece in enumerate(pieces)]
    if not (folder / "manifest.json").is_file():
        with new_artifact(folder, "dataset") as (made, _):
            for name, rows in parts.items():
                write_jsonl(made / f"{name}.jsonl", rows)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/scaling-benchmark"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    data = make_data(given.work / "data")
    tokenizer = given.work / "tokenizer"
    if not tokenizer.is_dir():
        make_tokenizer(data, tokenizer, vocab_size=VOCAB_SIZE)
    loop = LoopConfig(
        micro_batch_size=16,
        precision="fp32",
        compile=False,
        seed=given.seed,
        checkpoint=CheckpointConfig(every=50),
    )
    config = ScalingConfig(data, tokenizer, given.work / f"report-{given.seed}", 128, LadderConfig(), loop)
    result = run_scaling(config)
    figures, last = result.figures, result.held_out
    ours, rival = abs(figures["prediction_error_fraction"]), abs(figures["best_rung_error_fraction"])
    rows = [
        {
            "name": "relative error of the predicted loss",
            "ours": ours,
            "rival": rival,
            "rival_name": "the best rung's own loss",
            "ratio": rival / ours,
            "unit": "fraction, less is better",
            "runs": 1,
        }
    ]
    print(f"predicted {figures['predicted_loss']:.4f} {figures['predicted_interval_90']}, measured {last.loss:.4f}")
    for name, one in figures["law"].items():
        print(f"  {name:<14} {one['value']:.4g}  90 %: {one['interval_90'][0]:.4g} to {one['interval_90'][1]:.4g}")
    if given.json:
        rungs = [asdict(rung) for rung in result.rungs]
        ladder = {"threads": torch.get_num_threads(), "seed": given.seed, "ladder": asdict(config.ladder)}
        write_result(given.json, {"rows": rows, **ladder, "figures": figures, "rungs": rungs})
    if given.plot:
        given.plot.parent.mkdir(parents=True, exist_ok=True)
        plot_scaling(result, given.plot)
    shutil.rmtree(given.work / f"report-{given.seed}", ignore_errors=True)


if __name__ == "__main__":
    main()
