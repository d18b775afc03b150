"""One report of a whole run: ``report.json`` for programs, ``report.md`` with plots for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelwright.base.errors import MissingExtraError
from modelwright.base.files import atomic_file, write_json
from modelwright.base.progress import human_bytes

Losses = Mapping[str, Sequence[tuple[int, float]]]
RUNNING_MEAN_STEPS = 20


def save_report(folder: Path, report: Mapping[str, Any], losses: Losses) -> None:
    """Write the report and its plots into ``folder``.

    Args:
        folder: Where ``report.json``, ``report.md`` and the PNG files go.
        report: As `mw quickstart` makes it.
        losses: For each training step of the life, (step, loss) pairs.
    """
    plots = _draw_all(folder, report, losses)
    write_json(folder / "report.json", dict(report))
    with atomic_file(folder / "report.md") as handle:
        handle.write(render_markdown(report, plots))


def render_markdown(report: Mapping[str, Any], plots: Sequence[str] = ()) -> str:
    """Return the report for people."""
    parts = ["# Report", ""]
    parts += _table(
        ("step", "seconds", "made"), [(s["name"], f"{s['seconds']:.1f}", s["artifact"]) for s in report["steps"]]
    )
    parts += [
        "",
        f"In all {report['total_seconds']:.0f} s, peak memory {human_bytes(report['peak_memory_bytes'])}.",
        "",
    ]
    parts += _data_part(report) + _training_part(report) + _compression_part(report) + _retrieval_part(report)
    parts += [line for name in plots for line in (f"![{name}]({name})", "")]
    return "\n".join(parts) + "\n"


def _data_part(report: Mapping[str, Any]) -> list[str]:
    funnel = report["prepare"]["funnel"]
    if not funnel:
        return []
    columns = tuple(funnel[0])
    parts = ["## Data", "", *_table(columns, [tuple(row[c] for c in columns) for row in funnel]), ""]
    failures = report["documents"]["failures"]
    if failures:
        parts += ["Not read:", "", *(f"- `{f['path']}`: {f['reason']}" for f in failures), ""]
    return parts


def _training_part(report: Mapping[str, Any]) -> list[str]:
    parts = ["## Training", ""]
    pretrain, finetune = report.get("pretrain"), report["finetune"]
    if pretrain:
        rows = [
            ("this model", f"{pretrain['bits_per_byte']:.4f}"),
            ("5-gram, interpolated Kneser-Ney", f"{pretrain['ngram5_bits_per_byte']:.4f}"),
            ("unigram", f"{pretrain['unigram_bits_per_byte']:.4f}"),
        ]
        verdict = "beats" if pretrain["bits_per_byte"] < pretrain["ngram5_bits_per_byte"] else "does **not** beat"
        parts += [
            f"{pretrain['parameters']:,} parameters, {pretrain['tokens']:,} tokens in {pretrain['seconds']:.0f} s: "
            f"{pretrain['tokens_per_second']:,.0f} tokens/s, {pretrain['mfu_fraction']:.1%} of the machine's measured "
            f"{pretrain['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s.",
            "",
            *_table(("held-out text", "bits per byte"), rows),
            "",
            f"The model {verdict} the 5-gram.",
            "",
        ]
    parts += [
        f"Fine-tuning on {finetune['num_conversations']:,} pairs: held-out loss "
        f"{finetune['validation_loss_before']:.3f} -> {finetune['validation_loss']:.3f} nats a token.",
        "",
    ]
    return parts


def _compression_part(report: Mapping[str, Any]) -> list[str]:
    rows = [
        (name, human_bytes(f["size_bytes"]), f"{f['perplexity_ratio']:.4f}", f"{f['kl_divergence']:.6f}")
        for name, f in report["compress"].items()
    ]
    original = next(iter(report["compress"].values()))["original_size_bytes"]
    rows.insert(0, ("before", human_bytes(original), "1", "0"))
    return ["## Compression", "", *_table(("weights", "size", "perplexity ratio", "KL divergence"), rows), ""]


def _retrieval_part(report: Mapping[str, Any]) -> list[str]:
    columns = ("recall_at_1", "recall_at_5", "recall_at_10", "mrr")
    rows = [(mode, *(f"{s[c]:.3f}" for c in columns)) for mode, s in report["retrieval"].items()]
    cited = report["citations"]
    count = next(iter(report["retrieval"].values()))["num_questions"]
    return [
        "## Retrieval",
        "",
        f"{count} questions about documents that no weight was trained on.",
        "",
        *_table(("search", *columns), rows),
        "",
        f"{cited['exact']} of {cited['checked']} citations are equal to the span they name.",
        "",
    ]


def _table(columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(map(str, columns))} |", f"|{'---|' * len(columns)}"]
    return lines + [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]


def _draw_all(folder: Path, report: Mapping[str, Any], losses: Losses) -> list[str]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "Drawing the plots of a report") from error
    made = []
    for name, values in losses.items():
        if values:
            made.append(_draw_loss(Figure, folder / f"loss-{name}.png", name, values, report))
    made.append(_draw_retrieval(Figure, folder / "retrieval.png", report["retrieval"]))
    return made


def _draw_loss(
    figure_class: Any, path: Path, name: str, losses: Sequence[tuple[int, float]], report: Mapping[str, Any]
) -> str:
    figure = figure_class(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps, values = [s for s, _ in losses], [v for _, v in losses]
    axes.plot(steps, values, color="#9db4d0", linewidth=0.8, label="each step")
    window = min(RUNNING_MEAN_STEPS, len(values))
    means = [
        sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
        for i in range(len(values))
    ]
    axes.plot(steps, means, color="#1f4e8c", linewidth=1.6, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=f"{name}: training loss")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _draw_retrieval(figure_class: Any, path: Path, retrieval: Mapping[str, Mapping[str, float]]) -> str:
    figure = figure_class(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    columns = ("recall_at_1", "recall_at_5", "recall_at_10", "mrr")
    colours = {"bm25": "#9db4d0", "dense": "#c9b26d", "fused": "#1f4e8c"}
    for place, (mode, scores) in enumerate(retrieval.items()):
        at = [i + (place - 1) * 0.27 for i in range(len(columns))]
        bars = axes.bar(at, [scores[c] for c in columns], width=0.25, label=mode, color=colours.get(mode))
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(columns)), ["recall@1", "recall@5", "recall@10", "MRR"])
    axes.set(ylim=(0, 1.1), title="retrieval on held-out questions")
    axes.legend(frameon=False, ncols=3, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> str:
    with atomic_file(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=120)
    return path.name
