"""Write the tables of docs/tokenizer.md from committed results: ``python benchmarks/tokenizer_table.py [--check]``."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tokenizer.md"
PARTS = {"speed": ("tokenizer.json", None), "transplant": ("transplant.json", None)}
PARTS |= {lab: ("tokenizer_labs.json", lab) for lab in ("legal", "medical")}


def spread(values):
    """Say the lowest and highest of several runs."""
    return f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""


def lines_of(name):
    file, section = PARTS[name]
    path = ROOT / "benchmarks" / "results" / file
    whole = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    result = whole.get(section) if section else whole
    if not result or not result.get("rows"):
        yield "Not measured yet."
        return
    yield "| what | unit | ours | beside | | ours / it |"
    yield "|---|---|---|---|---|---|"
    for row in result["rows"]:
        runs = row["runs"]
        ours = f"{row['ours']:.3f}{spread(runs.get('ours', []))}"
        rival = f"{row['rival']:.3f}{spread(runs.get('rival', []))}"
        yield f"| {row['name']} | {row['unit']} | {ours} | {row['rival_name']} | {rival} | {row['ratio']:.2f} |"
    machine = result["machine"]
    yield ""
    yield f"`{result['command']}`; commit {result['commit']}; {machine['cpu']}, {machine['num_cores']} cores."


def main():
    text = PAGE.read_text(encoding="utf-8")
    for name in PARTS:
        marks = (f"<!-- {name}: made by benchmarks/tokenizer_table.py -->", f"<!-- end of {name} -->")
        body = "\n".join(lines_of(name))
        pattern = re.escape(marks[0]) + r"\n.*?" + re.escape(marks[1])
        if not re.search(pattern, text, re.DOTALL):
            raise SystemExit(f"{PAGE} has no place for {name}")
        text = re.sub(pattern, lambda _, b=body, m=marks: f"{m[0]}\n\n{b}\n\n{m[1]}", text, flags=re.DOTALL)
    if "--check" in sys.argv:
        raise SystemExit(text != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
