"""Write the table of docs/objectives.md from committed results: ``python benchmarks/quality_table.py [--check]``."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "objectives.md"
NAMES = ("sentiment", "finance_embedding", "forgetting", "small_t5")
START, END = "<!-- quality: made by benchmarks/quality_table.py -->", "<!-- end of quality -->"


def number(value, spread=None):
    """Say a mean and, where runs differ, the lowest and highest."""
    if spread is None or f"{spread[0]:.3f}" == f"{spread[1]:.3f}":
        return f"{value:.3f}"
    return f"{value:.3f} ({spread[0]:.3f} to {spread[1]:.3f})"


def lines():
    yield "| what | ours | beside | unit | runs |"
    yield "|---|---|---|---|---|"
    sources = []
    for name in NAMES:
        file = ROOT / "benchmarks" / "results" / f"{name}.json"
        if not file.is_file():
            continue
        result = json.loads(file.read_text(encoding="utf-8"))
        for row in result["rows"]:
            rival = f"{number(row['rival'], row.get('rival_spread'))}, {row['rival_name']}"
            ours = number(row["ours"], row.get("spread"))
            yield f"| {row['name']} | {ours} | {rival} | {row['unit']} | {row['runs']} |"
        machine = result["machine"]
        sources.append(
            f"`benchmarks/{name}.py`: commit {result['commit']}, {machine['cpu']}, {machine['num_cores']} cores"
        )
    yield ""
    yield "; ".join(sources) + "."


def main():
    """Rewrite the table, or with ``--check`` only say whether it is current."""
    text = PAGE.read_text(encoding="utf-8")
    body = "\n".join([START, "", *lines(), "", END])
    made, count = re.subn(f"{re.escape(START)}.*?{re.escape(END)}", lambda _: body, text, flags=re.DOTALL)
    if count != 1:
        sys.exit(f"docs/objectives.md has {count} places for the table; expected one.")
    if "--check" in sys.argv:
        sys.exit(0 if made == text else "docs/objectives.md is not current; run python benchmarks/quality_table.py")
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
