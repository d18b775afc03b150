"""All figures on data and tokenizers: run the scripts that measure them, and join what they wrote into one table.

    python benchmarks/data.py --list
    python benchmarks/data.py tokenizer duplicates --data FOLDER [--out benchmarks/results] [-- --rounds 1]
    python benchmarks/data.py --join [--check]

Each name is a script beside this one; it is run as a process of its own with ``--json OUT/NAME.json``, and what stands
behind ``--`` is given to it as well. ``--join`` reads the files of benchmarks/results that are there and writes
benchmarks/results/data.json: their rows (name, ours, rival, rival_name, ratio, unit, runs) with the script that each
comes from, its command, commit and machine, and which scripts have no figures yet. Of the many points of a curve beside
its theory only the farthest is a row. ``--check`` writes nothing; exit status 1 says that data.json is not current.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
JOINED = "data.json"
# What measures what, and whether the script reads the folder of texts by --data.
SCRIPTS = {
    "tokenizer": True,
    "tokenizer_labs": True,
    "duplicates": True,
    "data_pipeline": True,
    "pii": True,
    "language": True,
    "quality_filter": False,
    "curriculum": False,
}
ALLOWED_POINTS = 0.02  # how far a curve may lie from its theory
FIELDS = ("name", "ours", "rival", "rival_name", "ratio", "unit", "runs")

Row = dict[str, Any]


def run(name: str, data: Path | None, out: Path, more: list[str]) -> int:
    """Run one script as a process and return its exit status."""
    given = ["--data", str(data)] if data is not None and SCRIPTS[name] else []
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / f"{name}.py"), *given, "--json", str(out / f"{name}.json"), *more]
    print(f"== {name}", flush=True)
    return subprocess.run(command, check=False).returncode


def parts_of(result: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the results of a file: itself, or its sections where it was written in several runs."""
    sections = [part for part in result.values() if isinstance(part, Mapping) and "rows" in part and "command" in part]
    yield from sections or [result]


def condensed(rows: list[Row]) -> Iterator[Row]:
    """Yield the rows, but of the points of each curve beside its theory the farthest alone."""
    curves: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["rival_name"] == "theory":
            curves[", ".join(row["name"].split(", ")[:2])].append(row)
        else:
            yield row
    for name, points in curves.items():
        farthest = max(abs(point["ours"] - point["rival"]) for point in points)
        yield {
            "name": f"{name}: farthest from theory of {len(points)} points",
            "ours": farthest,
            "rival": ALLOWED_POINTS,
            "rival_name": "two points, as allowed",
            "ratio": farthest / ALLOWED_POINTS,
            "unit": "share of pairs",
            "runs": len(points),
        }


def join(results: Path) -> dict[str, Any]:
    """Return one result of the files that are there."""
    rows: list[Row] = []
    told: list[dict[str, Any]] = []
    missing = [name for name in SCRIPTS if not (results / f"{name}.json").is_file()]
    for name in SCRIPTS:
        if name in missing:
            continue
        for part in parts_of(json.loads((results / f"{name}.json").read_text(encoding="utf-8"))):
            told.append({"script": name, **{key: part[key] for key in ("command", "commit", "machine")}})
            found = condensed(part.get("rows") or part["comparisons"])
            rows += [{**{field: row[field] for field in FIELDS}, "script": name} for row in found]
    machines = [part["machine"] for part in told]
    differing = sorted({part["script"] for part in told if part["machine"] != machines[0]})
    return {
        "machine": machines[0],
        "other_machines": differing,  # scripts measured on another one
        "command": "python benchmarks/data.py --join",
        "commit": ", ".join(dict.fromkeys(f"{part['script']} {part['commit']}" for part in told)),
        "not_measured": missing,
        "parts": told,
        "rows": rows,
    }


def main() -> int:
    """Run scripts, or join their results."""
    argv = sys.argv[1:]
    at = argv.index("--") if "--" in argv else len(argv)
    argv, more = argv[:at], argv[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCRIPTS)}")
    parser.add_argument("--data", type=Path, help="Folder of the texts.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="Folder that NAME.json goes to.")
    parser.add_argument("--list", action="store_true", help="Say which scripts there are and which have figures.")
    parser.add_argument("--join", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.names) - set(SCRIPTS))
    if unknown:
        parser.error(f"{unknown[0]!r} is no script of data and tokenizers; known: {', '.join(SCRIPTS)}")
    if arguments.list:
        for name in SCRIPTS:
            print(f"{name:<16} {'has figures' if (RESULTS / f'{name}.json').is_file() else 'not measured'}")
        return 0
    if arguments.join:
        return write_joined(is_check=arguments.check)
    if not arguments.names:
        parser.error("name at least one script, or give --join or --list")
    return max(run(name, arguments.data, arguments.out, more) for name in arguments.names)


def write_joined(*, is_check: bool) -> int:
    """Write data.json, or say whether it is current."""
    joined = join(RESULTS)
    made = json.dumps(joined, indent=2, ensure_ascii=False) + "\n"
    file = RESULTS / JOINED
    is_current = file.is_file() and file.read_text(encoding="utf-8") == made
    if not is_check:
        file.write_text(made, encoding="utf-8")
    missing = ", ".join(joined["not_measured"]) or "none"
    print(f"{len(joined['rows'])} rows of {len(joined['parts'])} results; not measured: {missing}")
    if is_check and not is_current:
        print("benchmarks/results/data.json is not current. Run: python benchmarks/data.py --join")
    return int(is_check and not is_current)


if __name__ == "__main__":
    raise SystemExit(main())
