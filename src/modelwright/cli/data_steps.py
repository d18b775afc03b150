"""``mw data clean|dedup|scrub|decontaminate``: one step, to a file of JSON lines with id and text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from modelwright.base.config import build
from modelwright.base.progress import console
from modelwright.cli.data_run import EXIT_SET_ASIDE, Strict, Workers, show_asides
from modelwright.data.plan import build_steps
from modelwright.data.run import RunParams
from modelwright.data.scrub import Scrub, scrub_jsonl
from modelwright.data.single import aside_file, run_on_lines

Source = Annotated[Path, typer.Argument(help="JSON lines with id and text.", metavar="IN")]
Out = Annotated[Path, typer.Argument(help="The file to write, with the fields that IN has.", metavar="OUT")]
Removed = Annotated[Path | None, typer.Option(help="Write what was removed here: id, reason, redacted text.")]


def _run(source: Path, out: Path, steps: Sequence[Any], params: RunParams, removed: Path | None = None) -> None:
    result = run_on_lines(source, out, build_steps(steps), params, removed)
    figures = result.funnel.measured()
    show_asides(result.asides, aside_file(out))
    changed = sum(tally.documents_changed for tally in result.funnel.tallies.values())
    console.print(
        f"[bold]{out}[/bold]  {result.funnel.num_documents:,} documents of {figures['num_read']:,}: "
        f"{figures['num_removed']:,} removed, {changed:,} changed, {figures['num_aside']:,} set aside"
    )
    if result.asides:
        raise typer.Exit(EXIT_SET_ASIDE)


def clean(source: Source, out: Out, workers: Workers = None, strict: Strict = False) -> None:
    """Mend the text: Unicode, line ends, control and invisible characters, wrong decoding."""
    _run(source, out, ["clean"], RunParams(num_workers=workers, is_strict=strict))


def dedup(
    source: Source,
    out: Out,
    threshold: Annotated[float, typer.Option(help="Jaccard similarity of word 5-grams; 1: exact copies alone.")] = 0.8,
    removed: Removed = None,
    workers: Workers = None,
    strict: Strict = False,
) -> None:
    """Remove exact copies and near-copies of earlier documents; the first in order stays."""
    near = [{"step": "near_duplicates", "threshold": threshold}] if threshold < 1 else []
    _run(source, out, ["exact_duplicates", *near], RunParams(num_workers=workers, is_strict=strict), removed)


def scrub(
    source: Source,
    out: Out,
    report: Annotated[Path | None, typer.Option(help="Write spans here: start, end, type; never a value.")] = None,
    mode: Annotated[
        str, typer.Option(help="mask: the kind in brackets; pseudonym: equal stand-ins for equal values; remove.")
    ] = "mask",
    kinds: Annotated[str | None, typer.Option(help="Such as email,phone,person; none given: all of them.")] = None,
    secret_file: Annotated[
        str, typer.Option(help="File whose first line is the secret of pseudonyms; else MODELWRIGHT_SECRET.")
    ] = "",
    strict: Strict = False,
) -> None:
    """Replace personal data and secrets in every text field: by their kind, by stand-ins, or by nothing."""
    wanted = {"kinds": kinds} if kinds is not None else {}
    settings = build(Scrub, {"mode": mode, "secret_file": secret_file, **wanted})
    result = scrub_jsonl(source, out, report, settings, is_strict=strict)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in result.counts.most_common()) or "nothing found"
    console.print(f"[bold]{out}[/bold]  {result.num_documents:,} documents: {counts}")
    rows = [
        {"id": "", "position": f"{source.name}, line {number}", "step": "scrub", "reason": reason}
        for number, reason in result.failures
    ]
    show_asides(rows, report or out)
    if rows:
        raise typer.Exit(EXIT_SET_ASIDE)


def decontaminate(
    source: Source,
    out: Out,
    against: Annotated[list[Path], typer.Option(help="Evaluation set: a file or folder; may be given again.")],
    removed: Removed = None,
    workers: Workers = None,
    strict: Strict = False,
) -> None:
    """Remove what also stands in evaluation sets, by shared runs of words."""
    step = {"step": "decontaminate", "against": [str(path) for path in against]}
    _run(source, out, [step], RunParams(num_workers=workers, is_strict=strict), removed)
