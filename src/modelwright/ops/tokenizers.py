"""Tokenizers beside each other: fertility, compression and bits per byte, by language or domain; as rows and a plot.

Figures of the cut alone take seconds. Bits per byte train a small decoder under each tokenizer with the same FLOPs
(`fixed_compute`), which takes as long as the FLOPs that are given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modelwright.base.errors import ConfigError, DataError, MissingExtraError
from modelwright.base.files import atomic_file
from modelwright.ops.fixed_compute import ComputeConfig, score_tokenizer
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.compare import measure
from modelwright.tokenizer.formats import load_tokenizer

Row = dict[str, Any]
PLOTTED = {
    "bytes_per_token": "bytes per token (more is better)",
    "fertility": "tokens per word (fewer is better)",
    "bits_per_byte": "bits per byte at the same FLOPs (fewer is better)",
}


def name_tokenizers(paths: Sequence[Path]) -> dict[str, Tokenizer]:
    """Load tokenizers by the shortest name that tells them apart: the last part of their paths, or the whole."""
    last = [path.resolve().name for path in paths]
    names = [name if last.count(name) == 1 else str(path) for name, path in zip(last, paths, strict=True)]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise ConfigError(f"{doubled} is given twice. Give each tokenizer once.")
    return {name: load_tokenizer(path) for name, path in zip(names, paths, strict=True)}


def compare_tokenizers(
    tokenizers: Mapping[str, Tokenizer],
    texts: Mapping[str, Sequence[str]],
    *,
    training: Sequence[str] = (),
    compute: ComputeConfig | None = None,
    seed: int = 0,
) -> list[Row]:
    """Return one row for each tokenizer and text.

    Args:
        tokenizers: By name.
        texts: By language or domain; what is measured.
        training: What the decoders are trained on; empty: bits per byte are None.
        compute: The decoders, and for how long.
        seed: Of the decoders.

    Raises:
        DataError: A text is empty.
        ConfigError: The FLOPs do not suffice for a few steps.
    """
    rows: list[Row] = []
    for name, one in tokenizers.items():
        bits: Mapping[str, float] = {}
        if training:
            bits = score_tokenizer(one, training, texts, compute, seed).bits_per_byte
        for on, some in texts.items():
            figures = {**asdict(measure(one, some)), "bits_per_byte": bits.get(on)}
            rows.append({"tokenizer": name, "vocab_size": one.vocab_size, "on": on, **figures})
    return rows


def plot_comparison(rows: Sequence[Row], out: Path) -> None:
    """Draw the rows as bars, one panel a figure and one group a language or domain, into a PNG.

    Raises:
        DataError: There is no row.
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "Drawing a comparison") from error
    if not rows:
        raise DataError("There is nothing to draw: no tokenizer was compared.")
    names = list(dict.fromkeys(row["tokenizer"] for row in rows))
    places = list(dict.fromkeys(row["on"] for row in rows))
    shown = [key for key in PLOTTED if all(row.get(key) is not None for row in rows)]
    figure = Figure(figsize=(max(6.0, 1.2 + 0.35 * len(names) * len(places) + len(places)), 3.1 * len(shown)))
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    width = 0.8 / len(names)
    for key, panel in zip(shown, panels, strict=True):
        for index, name in enumerate(names):
            values = [next(row[key] for row in rows if (row["tokenizer"], row["on"]) == (name, p)) for p in places]
            at = [place + (index - (len(names) - 1) / 2) * width for place in range(len(places))]
            bars = panel.bar(at, values, width * 0.92, label=name)
            panel.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
        panel.set_xticks(range(len(places)), places)
        panel.set_title(PLOTTED[key], fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(y=0.15)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", ncols=min(4, len(names)), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / (3.1 * len(shown))))
    with atomic_file(out, "wb") as handle:
        figure.savefig(handle, format="png", dpi=130)
