"""A whole pipeline on web pages: documents a second, one worker beside two, processes beside Ray Data.

    python benchmarks/data_pipeline.py --data FOLDER [--copies 12] [--ray] [--json FILE]

FOLDER holds ``text/c4_sample.jsonl.gz`` (300 pages of C4). The chain is that of recipes/data/web.yaml. For more than
300 documents each further copy has the words of every line shuffled, the last one left in its place, so that no copy
is removed as a duplicate and every filter still has its work. Seconds are those of the whole run, reading and sealing
included; the start of Ray is not, as a cluster stands already. `ratio` is ours / rival: of two workers to one, and of
the output's bytes, which must be equal for every row. Medians of the rounds. Run it on an idle machine.
"""

import argparse
import gzip
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import yaml

from modelwright.base.artifact import read_manifest
from modelwright.base.measured import write_result
from modelwright.data.plan import read_pipeline
from modelwright.data.run import RunParams, run_pipeline

RECIPE = Path(__file__).parents[1] / "recipes" / "data" / "web.yaml"


def write_copies(sample: Path, out: Path, copies: int) -> int:
    """Write the sample ``copies`` times, the first as it is; return the number of documents."""
    rows = [json.loads(line) for line in gzip.decompress(sample.read_bytes()).splitlines()]
    with open(out, "w", encoding="utf-8") as handle:
        for copy in range(copies):
            rng = random.Random(copy)
            for index, row in enumerate(rows):
                text = row["text"] if copy == 0 else "\n".join(shuffled(line, rng) for line in row["text"].split("\n"))
                handle.write(json.dumps({"id": f"{copy}-{index}", "text": text}, ensure_ascii=False) + "\n")
    return copies * len(rows)


def shuffled(line: str, rng: random.Random) -> str:
    *words, last = line.split(" ")
    rng.shuffle(words)
    return " ".join([*words, last])


def run(source: Path, out: Path, workers: int, engine: str) -> tuple[float, str, dict[str, Any]]:
    """Return the seconds of one run, the hash of what it made, and its funnel."""
    values = {**yaml.safe_load(RECIPE.read_text()), "source": str(source), "out": str(out), "shard": {"documents": 100}}
    result = run_pipeline(read_pipeline(values), RunParams(engine=engine, num_workers=workers))
    return result.funnel.seconds, read_manifest(out).hash, result.funnel.as_row()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray", action="store_true", help="measure Ray Data too")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    engines = ["local", *(["ray"] if arguments.ray else [])]
    seconds: dict[tuple[str, int], list[float]] = {}
    hashes, funnel = set(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_documents = write_copies(arguments.data / "text/c4_sample.jsonl.gz", folder / "in.jsonl", arguments.copies)
        for engine in engines:
            if engine == "ray":
                import ray

                ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
                run(folder / "in.jsonl", folder / "warm", 2, "ray")
            for round_ in range(arguments.rounds):
                for workers in (1, 2):
                    found = run(folder / "in.jsonl", folder / f"{engine}-{workers}-{round_}", workers, engine)
                    seconds.setdefault((engine, workers), []).append(found[0])
                    hashes.add(found[1])
                    funnel = found[2]
    assert len(hashes) == 1, "the bytes differ between engines or numbers of workers"
    rows = []
    for engine in engines:
        one, two = (statistics.median(seconds[engine, workers]) for workers in (1, 2))
        rows.append(
            {
                "name": f"{engine}: documents a second with two workers beside one",
                "ours": round(num_documents / two, 1),
                "rival": round(num_documents / one, 1),
                "rival_name": "one worker",
                "ratio": round(one / two, 3),
                "unit": "documents/s",
                "runs": {"two": seconds[engine, 2], "one": seconds[engine, 1]},
            }
        )
    steps = [{k: v for k, v in step.items() if k != "reasons"} for step in funnel["steps"]]
    for row in rows:
        print(f"{row['name']}: {row['ours']:,.0f} / {row['rival']:,.0f} = {row['ratio']:.2f}")
    for step in steps:
        counts = f"{step['documents_in']:>7,} in {step['documents_removed']:>6,} removed"
        print(f"  {step['step']:<20} {counts} {step['seconds']:>8.2f} s")
    if arguments.json:
        figures = {"documents": num_documents, "rows": rows, "steps": steps, "sha256": hashes.pop()}
        write_result(arguments.json, figures, ("numpy", "ray", "pyarrow"))


if __name__ == "__main__":
    main()
