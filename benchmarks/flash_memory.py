"""How does attention's memory grow with the sequence? The tiled one against the plain one, forward and backward.

    python benchmarks/flash_memory.py [--lengths 1024 2048 ... 16384] [--json FILE]
    python benchmarks/flash_memory.py --docs benchmarks/results/flash_memory.json

Each case runs in a process of its own: one head of 64, causal, float32. The process makes the inputs, does one small
pass to load the libraries, has the kernel forget its peak (/proc/self/clear_refs), does one pass forward and backward,
and reports by how much the peak of its resident memory (VmHWM) rose. The exponent is the slope of log memory over log
length, from the second half of the lengths: 1 is linear, 2 quadratic. Plain attention stops where it would need more
than a third of the machine's memory. Time is reported, not judged.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from modelwright.base.device import describe_machine
from modelwright.nn.attention import attend_plain
from modelwright.nn.flash import flash_attend

ROOT = Path(__file__).parents[1]
KINDS = {"flash": flash_attend, "plain": attend_plain}
LENGTHS = (1024, 2048, 4096, 8192, 16384)
START, END = "<!-- memory: made by benchmarks/flash_memory.py -->", "<!-- end of memory -->"


def peak_bytes() -> int:
    """Return the highest resident memory of this process since it was last forgotten."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024


def measure(kind: str, length: int) -> dict[str, float]:
    """Return the rise of the peak and the time of one pass, in this process."""

    def one_pass(size: int) -> float:
        q, k, v = (torch.randn(1, size, 1, 64, requires_grad=True) for _ in range(3))
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        start = time.perf_counter()
        KINDS[kind](q, k, v, scale=0.125, is_causal=True).sum().backward()
        return time.perf_counter() - start

    one_pass(256)
    before = peak_bytes()
    seconds = one_pass(length)
    return {"length": length, "bytes": peak_bytes() - before, "seconds": seconds}


def exponent(rows: list[dict[str, float]]) -> float:
    """Return the slope of log memory over log length between the middle and the last length."""
    low, high = rows[len(rows) // 2], rows[-1]
    return math.log(high["bytes"] / low["bytes"]) / math.log(high["length"] / low["length"])


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table of docs/attention.md."""
    kinds = {kind: {r["length"]: r for r in result[kind]["rows"]} for kind in KINDS}
    lines = [
        f"One head of 64, float32, causal, forward and backward, {result['threads']} thread(s); commit "
        f"{result['commit']}; `{result['command']}`.",
        "",
        "| length | tiled: MB | seconds | plain: MB | seconds |",
        "|---|---|---|---|---|",
    ]
    for length in result["lengths"]:
        cells = []
        for rows in kinds.values():
            row = rows.get(length)
            cells.append(f"{row['bytes'] / 1e6:,.0f} | {row['seconds']:.2f}" if row else "not run | ")
        lines.append(f"| {length:,} | {' | '.join(cells)} |")
    lines.append(f"| exponent | {result['flash']['exponent']:.2f} | | {result['plain']['exponent']:.2f} | |")
    return "\n".join(lines)


def write_docs(result: dict[str, Any]) -> None:
    """Put the table between its marks."""
    page = ROOT / "docs" / "attention.md"
    head, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{START}\n{table(result)}\n{END}{tail}", encoding="utf-8")


def run_all(lengths: list[int]) -> dict[str, Any]:
    """Measure every case in a process of its own."""
    memory = describe_machine().memory_bytes
    result: dict[str, Any] = {"lengths": lengths}
    for kind in KINDS:
        rows = []
        for length in lengths:
            if kind == "plain" and 5 * 4 * length**2 > memory / 3:  # five square tensors at the peak
                continue
            command = [sys.executable, __file__, "--one", kind, str(length)]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(kind, rows[-1], file=sys.stderr, flush=True)
        result[kind] = {"rows": rows, "exponent": exponent(rows)}
    return result


def main() -> None:
    """Measure and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument(
        "--docs", type=Path, help="measure nothing: write the table of docs/attention.md from this file"
    )
    parser.add_argument("--one", nargs=2, metavar=("KIND", "LENGTH"), help="measure one case in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]))))
        return
    if args.docs:
        write_docs(json.loads(args.docs.read_text(encoding="utf-8")))
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {
        "command": " ".join(["python benchmarks/flash_memory.py", *sys.argv[1:]]),
        "commit": commit.strip(),
        "machine": asdict(describe_machine()),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        **run_all(args.lengths),
    }
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
