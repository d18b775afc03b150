"""Write the results table of README.md from committed results: ``python benchmarks/readme_table.py [--check]``."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- results: made by", "<!-- end of results -->"


def rows(result):
    """Return (what, value, target) for each number that the quickstart promises."""
    report, training, serving = result["report"], result["training"], result["serving"]
    pretrain, retrieval, compress = report["pretrain"], report["retrieval"], report["compress"]
    fused = retrieval["fused"]
    yield "first run, to the three answers", f"{result['first_run_seconds']:.0f} s", "420 s at most"
    yield "second run, everything done", f"{result['second_run_seconds']:.1f} s", "under 15 s"
    yield "peak memory", f"{result['peak_memory_bytes'] / 1e9:.2f} GB", "4 GB at most"
    yield "training step, share of this machine's bf16 matrix rate", f"{training['mfu_fraction']:.1%}", "45 % at least"
    speed = f"{training['tokens_per_second']:,.0f} against {training['transformers_tokens_per_second']:,.0f} tokens/s"
    yield (
        "training against `transformers` (compiled, bf16)",
        f"{training['ratio_median']:.2f}x ({speed})",
        "1.0x at least",
    )
    yield (
        "held-out bits per byte",
        f"{pretrain['bits_per_byte']:.3f}",
        f"below the 5-gram's {pretrain['ngram5_bits_per_byte']:.3f} (unigram {pretrain['unigram_bits_per_byte']:.3f})",
    )
    for bits, limit in (("int8", 1.01), ("int4", 1.05)):
        yield f"{bits} perplexity ratio", f"{compress[bits]['perplexity_ratio']:.4f}", f"{limit} at most"
    yield (
        f"recall@5, fused, {fused['num_questions']} questions",
        f"{fused['recall_at_5']:.3f}",
        f"0.9 at least, and BM25 {retrieval['bm25']['recall_at_5']:.3f}, dense {retrieval['dense']['recall_at_5']:.3f}",
    )
    cited = report["citations"]
    yield "citations equal to their span", f"{cited['exact']} of {cited['checked']}", "all"
    first = f"{serving['first_token_cached_median_seconds'] * 1000:.0f} ms"
    yield "first token, cached prefix", first, "under 300 ms"
    same = f"{serving['answered_and_stream_equals_whole']} of {serving['requests']}"
    yield "requests of 8 clients answered, stream equal to whole", same, "all"


def table(result):
    """Return the lines between the two marks."""
    machine, versions = result["machine"], result["versions"]
    lines = [
        f"{machine['cpu']}, {machine['num_cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, no GPU; Python "
        f"{versions['python']}, torch {versions['torch']}; commit {result['commit']}; `{result['command']}`.",
        "",
        "| what | measured | wanted |",
        "|---|---|---|",
    ]
    return lines + [f"| {what} | {value} | {target} |" for what, value, target in rows(result)]


def main():
    """Rewrite the table, or with ``--check`` only say whether it is current."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    head, _, after = rest.partition(END)
    result = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text(encoding="utf-8"))
    mark = head.splitlines()[0]
    made = before + START + mark + "\n\n" + "\n".join(table(result)) + "\n\n" + END + after
    if "--check" in sys.argv:
        sys.exit(0 if made == text else "README.md is not current; run python benchmarks/readme_table.py")
    readme.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
