"""Write the table of docs/models.md from committed results: ``python benchmarks/models_table.py [--check]``."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- families: made by", "<!-- end of families -->"
CHECKS = ("outputs", "padding", "packing", "steps", "gradients", "export")


def shown(value):
    """Return an error as a table has it."""
    return "" if value is None else "0" if value == 0 else f"{value:.0e}"


def source(text):
    """Return the papers with a link for each that is on arXiv."""
    bare = text.removeprefix("arXiv ")
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", bare)


def table(result):
    """Return the lines between the two marks."""
    versions = result["versions"]
    lines = [
        f"Largest absolute difference from `transformers` {versions['transformers']}, float32 on a CPU, same random "
        f"weights, 150 positions; of gradients, the largest relative one of a parameter. `{result['command']}`, commit "
        f"{result['commit']}, torch {versions['torch']}.",
        "",
        "| family | file | source | outputs | padded | packed | step by step | gradients | exported |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        errors = [shown(case[name]) for name in CHECKS]
        cells = [case["name"], f"`{case['file']}.py`", source(case["source"]), *errors]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main():
    """Rewrite the table, or with ``--check`` only say whether it is current."""
    page = ROOT / "docs" / "models.md"
    text = page.read_text(encoding="utf-8")
    result = json.loads((ROOT / "benchmarks" / "results" / "parity.json").read_text(encoding="utf-8"))
    before, _, rest = text.partition(START)
    mark, _, rest = rest.partition("\n")
    _, _, after = rest.partition(END)
    made = f"{before}{START}{mark}\n" + "\n".join(table(result)) + f"\n{END}{after}"
    if "--check" in sys.argv:
        sys.exit(made != text and "docs/models.md is not what benchmarks/results/parity.json gives; run this script")
    page.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
