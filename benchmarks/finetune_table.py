"""Write the tables of docs/finetune.md from committed results: ``python benchmarks/finetune_table.py [--check]``."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "finetune.md"


def read(name):
    """Return a result, or None where it was not measured yet."""
    file = ROOT / "benchmarks" / "results" / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def source(result):
    """Say how a result was made, and where."""
    machine = result["machine"]
    return f"`{result['command']}`; commit {result['commit']}; {machine['cpu']}, {machine['num_cores']} cores."


def peft_lines():
    """Yield the table of methods."""
    result = read("peft_table.json")
    if result is None:
        yield "Not measured yet."
        return
    yield "| method | rate | trained | weights, KB | gradients, moments, KB | peak, MB | ms a step | bits a byte |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in sorted(result["rows"], key=lambda row: row["ours"]):
        weights = f"{row['trained_parameters']:,} | {row['weight_bytes'] / 1e3:,.0f}"
        if row["name"] == "frozen":
            yield f"| frozen | | {weights} | | | | {row['ours']:.3f} |"
            continue
        took = f"{row['above_baseline_bytes'] / 1e6:,.0f} | {row['seconds_a_step'] * 1e3:,.0f}"
        score = f"{row['ours']:.3f} ± {row['spread'] or 0:.3f}"
        yield f"| {row['name']} | {row['rate']:g} | {weights} | {row['state_bytes'] / 1e3:,.0f} | {took} | {score} |"
    yield ""
    yield source(result)


def comparison_lines(file):
    """Yield the rows of ours beside a rival."""
    result = read(file)
    if result is None:
        yield "Not measured yet."
        return
    yield "| | ours | beside | | ratio | runs |"
    yield "|---|---|---|---|---|---|"
    for row in result["rows"]:
        ours, rival = (show(row[key], row["unit"]) for key in ("ours", "rival"))
        yield f"| {row['name']} | {ours} | {row['rival_name']} | {rival} | {row['ratio']:.2f} | {row['runs']} |"
    curves = result.get("curves")
    if curves:
        yield ""
        yield (
            f"Mean loss curves are {curves['between_means']:.3f} nats apart, averaged over the steps; two rounds of "
            f"one side are {curves['between_rounds_of_one_side']:.3f} apart."
        )
    yield ""
    yield source(result)


def show(value, unit):
    """Return a figure with its unit, short."""
    if unit == "bytes":
        return f"{value / 1e9:.2f} GB"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3f}"


PARTS = {
    "peft": peft_lines,
    "sft": lambda: comparison_lines("sft.json"),
    "qlora": lambda: comparison_lines("qlora_memory.json"),
}


def main():
    """Write each table between its marks, or say whether the page is current."""
    text = page = PAGE.read_text(encoding="utf-8")
    for name, lines in PARTS.items():
        start, end = f"<!-- {name}: made by benchmarks/finetune_table.py -->\n", f"<!-- end of {name} -->"
        if page.count(start) != 1 or end not in page:
            sys.exit(f"{PAGE.name} has no marks of {name}.")
        before, _, rest = page.partition(start)
        page = before + start + "\n".join(lines()) + "\n" + end + rest.partition(end)[2]
    if "--check" in sys.argv:
        sys.exit(0 if page == text else "docs/finetune.md is not current; run python benchmarks/finetune_table.py")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
