"""Write the tables of docs/classical.md from committed results: ``python benchmarks/classical_table.py [--check]``."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "classical.md"


def read(name):
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def spread(values, form="{:.3f}"):
    """Say the mean of several seeds and, where they differ, the lowest and highest."""
    mean, low, high = (form.format(v) for v in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def source(part):
    seeds = f", seeds {', '.join(map(str, part['seeds']))}" if "seeds" in part else ""
    machine = part["machine"]
    return f"`{part['command']}`{seeds}; commit {part['commit']}; {machine['cpu']}, {machine['num_cores']} cores."


def ngram_lines():
    result = read("ngram.json")
    models, data = result["models"], result["data"]
    orders = sorted({m["order"] for m in models})
    yield "| smoothing | " + " | ".join(f"order {order}" for order in orders) + " |"
    yield "|---|" + "---|" * len(orders)
    for smoothing in dict.fromkeys(m["smoothing"] for m in models):
        row = {m["order"]: m["perplexity"] for m in models if m["smoothing"] == smoothing}
        yield f"| `{smoothing}` | " + " | ".join(f"{row[order]:,.1f}" for order in orders) + " |"
    differences = [m["kenlm_error"] for m in models if m["kenlm_error"] is not None]
    yield ""
    yield (
        f"Held-out perplexity on the validation part of WikiText-2 ({data['num_held_out_words']:,} words, "
        f"{data['unknown_fraction']:.1%} of them unknown), after {data['num_training_words']:,} words of its "
        f"training part; vocabulary {data['vocab_size']:,}. Control, order 3, training words in a random order: "
        f"{result['control_perplexity']:,.1f}. Sums of probabilities are at most "
        f"{max(m['sum_error'] for m in models):.0e} from 1; scores at most {max(differences):.0e} from KenLM's (log10)."
    )
    yield ""
    yield source(result)


def plain_lines(part, what, value, form="{:.3f}"):
    result = read("classical.json").get(part)
    if result is None:
        yield "Not measured yet."
        return
    yield f"| {what} | {value} |"
    yield "|---|---|"
    for name, values in result["found"].items():
        yield f"| {name} | {spread(values, form)} |"
    yield ""
    yield source(result)


def words_lines():
    result = read("classical.json")["words"]
    found = dict(result["found"])
    num_words = found.pop("num_words")
    yield "| learner | analogies, planted | shuffled | categories, WikiText-2 | shuffled |"
    yield "|---|---|---|---|---|"
    for name, values in found.items():
        yield f"| {name} | " + " | ".join(spread(v, "{:.2f}") for v in values.values()) + " |"
    yield ""
    yield (
        f"Categories: share of 57 words (months, numbers, family, ...) whose nearest among them is of their kind; "
        f"{num_words:,} words of text, one seed."
    )
    yield ""
    yield source(result)


def series_lines():
    result = read("classical.json")["series"]
    yield "| series | LSTM, RMSE | linear, RMSE | last value, RMSE | LSTM's skill over the last value | best |"
    yield "|---|---|---|---|---|---|"
    for name, v in result["found"].items():
        # An LSTM wins when each of its seeds does: one that is better by luck is no winner.
        best = min((max(v["rmse"]), "LSTM"), (v["linear_rmse"], "linear"), (v["naive_rmse"], "last value"))[1]
        yield (
            f"| {name} | {spread(v['rmse'])} | {v['linear_rmse']:.3f} | {v['naive_rmse']:.3f} | "
            f"{spread(v['skill'], '{:.2f}')} | {best} |"
        )
    yield ""
    yield source(result)


TABLES = {
    "ngram": ngram_lines,
    "lag": lambda: plain_lines("lag", "model", "accuracy at lag 50 (chance 0.5)"),
    "reversal": lambda: plain_lines("reversal", "model", "exact match, held-out strings of 4 to 10 from 20 symbols"),
    "language": lambda: plain_lines("language", "model", "held-out bits a character, Tiny Shakespeare"),
    "words": words_lines,
    "digits": lambda: plain_lines("digits", "update rule", "test accuracy, 360 digits"),
    "series": series_lines,
}


def main():
    """Rewrite the tables, or with ``--check`` only say whether they are current."""
    text = made = PAGE.read_text(encoding="utf-8")
    for name, lines in TABLES.items():
        start, end = f"<!-- {name}: made by benchmarks/classical_table.py -->", f"<!-- end of {name} -->"
        body = "\n".join(lines())
        made, count = re.subn(
            f"{re.escape(start)}.*?{re.escape(end)}",
            lambda _, start=start, body=body, end=end: f"{start}\n\n{body}\n\n{end}",
            made,
            flags=re.DOTALL,
        )
        if count != 1:
            sys.exit(f"docs/classical.md has {count} places for the table {name}; expected one.")
    if "--check" in sys.argv:
        sys.exit(0 if made == text else "docs/classical.md is not current; run python benchmarks/classical_table.py")
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
