"""Write the tables of docs/ from the rows of committed results: ``python benchmarks/rows_table.py [--check]``.

A page says where a table goes: ``<!-- rows of serve.json -->`` up to ``<!-- end of rows -->``; a second word names a
section of the file, ``<!-- rows of tokenizer_labs.json legal -->``. What stands between is replaced; ``--check``
changes nothing, and exit status 1 says that a page is not current.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"<!-- rows of (\S+)(?: (\S+))? -->\n.*?<!-- end of rows -->", re.DOTALL)


def shown(value):
    """Return a number with the digits that a reader compares."""
    if value is None:
        return ""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.3f}" if size >= 1e-3 or not value else f"{value:.1e}"


def spread(row, side):
    """Return lowest and highest of several runs of one side, in brackets."""
    runs = row.get("runs", {})
    if side == "ours" and isinstance(row.get("spread"), list):
        runs = row["spread"]
    values = runs.get(side, []) if isinstance(runs, dict) else runs if side == "ours" and isinstance(runs, list) else []
    values = [v for v in values if isinstance(v, int | float)] if isinstance(values, list) else []
    return f" ({shown(min(values))} to {shown(max(values))})" if len(values) > 1 else ""


def lines_of(file, section):
    """Yield the table of one file's rows, or that there is none yet."""
    path = ROOT / "benchmarks" / "results" / file
    whole = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    result = whole.get(section, {}) if section else whole
    if not result.get("rows"):
        yield "Not measured yet."
        return
    yield "| what | unit | ours | beside | | ours / it |"
    yield "|---|---|---|---|---|---|"
    for row in result["rows"]:
        ours, rival = (f"{shown(row[side])}{spread(row, side)}" for side in ("ours", "rival"))
        ratio = "" if row.get("ratio") is None else f"{row['ratio']:.2f}"
        yield f"| {row['name']} | {row['unit']} | {ours} | {row['rival_name']} | {rival} | {ratio} |"
    machine = result["machine"]
    command, commit = result["command"], result["commit"]
    yield ""
    yield f"`{command}`; commit {commit}; {machine['cpu']}, {machine['num_cores']} cores."


def main():
    old = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")

        def table(found):
            mark = f"<!-- rows of {' '.join(part for part in found.groups() if part)} -->"
            return "\n".join([mark, "", *lines_of(*found.groups()), "", "<!-- end of rows -->"])

        made = PLACE.sub(table, text)
        if made != text:
            old.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv:
                page.write_text(made, encoding="utf-8")
    print("current" if not old else f"{'not current' if '--check' in sys.argv else 'written'}: {', '.join(old)}")
    raise SystemExit(bool(old) and "--check" in sys.argv)


if __name__ == "__main__":
    main()
