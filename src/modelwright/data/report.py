"""The funnel of a pipeline's run: what each step took in, let through and removed, why, and how fast.

As JSON for programs and as one page for people: no script, nothing fetched, readable in light and dark. Every text
shown was redacted when it was removed and is cut here.
"""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modelwright.base.files import atomic_file
from modelwright.base.progress import human_bytes
from modelwright.data.work import Tally

MAX_SAMPLES = 5  # of each reason
MAX_REASONS = 25  # of each step; the rest is counted together
MAX_SAMPLE_CHARS = 400
_FIGURE = re.compile(r"\S*[\d/\\@]\S*")


def kind_of(reason: str) -> str:
    """Return a reason without its figures and names, so that like is counted with like.

    >>> kind_of("too short: 5 characters, at least 10"), kind_of("86% the same as docs/a.md")
    ('too short: … characters, at least …', '… the same as …')
    """
    return _FIGURE.sub(lambda found: "…" + (found[0][-1] if found[0][-1] in ",;:.)" else ""), reason)


@dataclass
class Reason:
    """Why documents went at one step: how many, and the first of them."""

    kind: str
    count: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)


class Funnel:
    """The account of a run, step by step in their order."""

    def __init__(self, names: Iterable[str]):
        self.tallies = {name: Tally() for name in names}
        self.reasons: dict[str, dict[str, Reason]] = {name: {} for name in self.tallies}
        self.seconds = 0.0  # of the run, by the clock; the seconds of a step are summed over workers

    def add(self, tallies: Mapping[str, Tally]) -> None:
        """Count what one piece gave."""
        for name, tally in tallies.items():
            self.tallies.setdefault(name, Tally()).add(tally)
            self.reasons.setdefault(name, {})

    def explain(self, removed: Iterable[Mapping[str, Any]], asides: Iterable[Mapping[str, str]]) -> None:
        """Count reasons and keep samples, from the rows of what was removed and of what was set aside."""
        for row in removed:
            sample = {"id": row["id"], "reason": row["reason"], "text": row["text"][:MAX_SAMPLE_CHARS]}
            self._note(row["step"], kind_of(row["reason"]), sample)
        for row in asides:
            sample = {"id": row["id"], "reason": row["reason"], "position": row["position"]}
            self._note(row["step"], f"set aside: {kind_of(row['reason'])}", sample)

    def _note(self, step: str, kind: str, sample: dict[str, str]) -> None:
        known = self.reasons.setdefault(step, {})
        if kind not in known and len(known) >= MAX_REASONS:
            kind = "other reasons"
        reason = known.setdefault(kind, Reason(kind))
        reason.count += 1
        if len(reason.samples) < MAX_SAMPLES:
            reason.samples.append(sample)

    @property
    def num_documents(self) -> int:
        """Documents that came out at the end."""
        return list(self._steps().values())[-1].documents_out

    @property
    def num_removed(self) -> int:
        """Documents that a step took out."""
        return sum(tally.documents_removed for tally in self.tallies.values())

    @property
    def num_aside(self) -> int:
        """Documents, lines and files that could not be used."""
        return sum(tally.documents_aside for tally in self.tallies.values())

    def _steps(self) -> dict[str, Tally]:
        return {name: tally for name, tally in self.tallies.items() if name != "worker"}

    def measured(self) -> dict[str, Any]:
        """Return the figures that a manifest keeps."""
        first = next(iter(self.tallies.values()))
        return {
            "num_read": first.documents_out,
            "num_removed": self.num_removed,
            "num_aside": self.num_aside,
            "seconds": round(self.seconds, 3),
            "documents_per_second": round(first.documents_out / max(self.seconds, 1e-9), 1),
            "bytes_per_second": round(first.bytes_out / max(self.seconds, 1e-9)),
        }

    def as_row(self) -> dict[str, Any]:
        """Return the whole account as plain values."""
        steps = []
        for name, tally in self.tallies.items():
            reasons = sorted(self.reasons[name].values(), key=lambda reason: (-reason.count, reason.kind))
            speed = round(tally.documents_in / tally.seconds, 1) if tally.seconds else None
            row = {"step": name, **asdict(tally), "seconds": round(tally.seconds, 4)}
            steps.append({**row, "documents_per_worker_second": speed, "reasons": [asdict(r) for r in reasons]})
        return {**self.measured(), "steps": steps}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Funnel":
        """Read an account back."""
        funnel = cls(step["step"] for step in row["steps"])
        funnel.seconds = row["seconds"]
        names = Tally.__dataclass_fields__
        for step in row["steps"]:
            funnel.tallies[step["step"]] = Tally(**{name: step[name] for name in names})
            funnel.reasons[step["step"]] = {reason["kind"]: Reason(**reason) for reason in step["reasons"]}
        return funnel


def write_page(path: Path, funnel: Funnel, settings: Mapping[str, Any], asides: Sequence[Mapping[str, str]]) -> None:
    """Write the account as one self-contained page."""
    figures = funnel.measured()
    first, last = next(iter(funnel.tallies.values())), list(funnel._steps().values())[-1]
    parts = [
        _HEAD,
        f"<h1>What became of {first.documents_in:,} documents</h1>",
        "<p class=lead>"
        f"<b>{funnel.num_documents:,}</b> documents ({human_bytes(last.bytes_out)}) are left of "
        f"{first.documents_out:,} ({human_bytes(first.bytes_out)}) read. "
        f"{figures['num_removed']:,} were removed, each with its reason; "
        f"{figures['num_aside']:,} could not be used and were set aside. "
        f"{figures['documents_per_second']:,.0f} documents a second over {figures['seconds']:,.1f} s.</p>",
        _table(funnel, first.documents_in or 1),
        "<h2>Why documents went</h2>",
        *(_reasons(name, list(reasons.values())) for name, reasons in funnel.reasons.items() if reasons),
    ]
    if not any(funnel.reasons.values()):
        parts.append("<p>Every document came through.</p>")
    parts += [_sources(settings["source"]), _settings(settings["steps"]), "</main></body></html>\n"]
    with atomic_file(path) as handle:
        handle.write("\n".join(parts))


def _table(funnel: Funnel, most: int) -> str:
    rows = []
    for name, tally in funnel.tallies.items():
        kept, gone = (100 * n / most for n in (tally.documents_out, tally.documents_in - tally.documents_out))
        speed = f"{tally.documents_in / tally.seconds:,.0f}" if tally.seconds else "–"
        cells = (
            f"{tally.documents_in:,}",
            f"{tally.documents_removed:,}",
            f"{tally.documents_aside:,}",
            f"{tally.documents_changed:,}",
            f"{tally.documents_out:,}",
            human_bytes(tally.bytes_in),
            human_bytes(tally.bytes_out),
            speed,
        )
        bar = f'<div class=bar><i style="width:{kept:.2f}%"></i><s style="width:{max(gone, 0):.2f}%"></s></div>'
        rows.append(
            f"<tr><th scope=row>{_escape(name)}</th><td class=wide>{bar}</td>"
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    heads = ("in", "removed", "set aside", "changed", "out", "size in", "size out", "a second and worker")
    return (
        "<div class=scroll><table><caption>Documents through each step: the dark part goes on, the red part went"
        "</caption><thead><tr><th scope=col>step</th><th scope=col></th>"
        + "".join(f"<th scope=col>{head}</th>" for head in heads)
        + f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _reasons(name: str, reasons: Sequence[Reason]) -> str:
    parts = [f"<h3>{_escape(name)}</h3>"]
    for reason in sorted(reasons, key=lambda reason: (-reason.count, reason.kind)):
        samples = "".join(_sample(sample) for sample in reason.samples)
        parts.append(
            f"<details><summary><b>{reason.count:,}</b> {_escape(reason.kind)}</summary><ul>{samples}</ul></details>"
        )
    return "\n".join(parts)


def _sample(sample: Mapping[str, str]) -> str:
    where = sample.get("id") or sample.get("position", "")
    position = sample.get("position", "")
    place = f" ({_escape(position)})" if position and position != where else ""
    text = f"<blockquote>{_escape(sample['text'])}</blockquote>" if sample.get("text") else ""
    return f"<li><code>{_escape(where)}</code>{place}: {_escape(sample['reason'])}{text}</li>"


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{_escape(source['path'])}</th><td>{_escape(source['licence'] or 'not stated')}</td>"
        f"<td>{source['num_files']:,}</td><td>{human_bytes(source['num_bytes'])}</td>"
        f"<td><code>{source['hash'][:16]}</code></td></tr>"
        for source in sources
    )
    heads = "".join(f"<th scope=col>{head}</th>" for head in ("source", "licence", "files", "size", "SHA-256"))
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<h2>Sources</h2><div class=scroll>{table}</div>"


def _settings(steps: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for step in steps:
        settings = ", ".join(f"{name}: {value}" for name, value in step.items() if name != "step")
        lines.append(f"<li><b>{_escape(step['step'])}</b> {_escape(settings)}</li>")
    return f"<h2>Steps and their settings</h2><ol>{''.join(lines)}</ol>"


def _escape(value: object) -> str:
    return html.escape(str(value))


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Funnel</title>
<style>
:root { color-scheme: light dark; --ink: #1c2330; --paper: #fff; --soft: #5a6475; --line: #dde2ea; --kept: #2b5c8a;
  --gone: #c0392b; --panel: #f5f7fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --paper: #14181f; --soft: #a3adbd; --line: #2c3440;
  --kept: #6aa5dc; --gone: #e0685c; --panel: #1c222c; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; } h2 { margin: 2.5rem 0 .5rem; font-size: 1.25rem; }
h3 { margin: 1.2rem 0 .3rem; }
.lead { font-size: 1.05rem; color: var(--soft); max-width: 70ch; } .lead b { color: var(--ink); font-size: 1.3rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: .3rem 0; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th[scope=row], thead th:first-child { text-align: left; } thead th { color: var(--soft); font-weight: 600; }
td.wide { width: 26%; min-width: 9rem; } .bar { display: flex; height: .95rem; background: var(--panel); }
.bar i { background: var(--kept); } .bar s { background: var(--gone); }
details { background: var(--panel); border-radius: 6px; padding: .35rem .8rem; margin: .35rem 0; }
summary { cursor: pointer; } blockquote { margin: .2rem 0 .8rem; padding-left: .8rem;
  border-left: 3px solid var(--line); color: var(--soft); white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-size: .9em; overflow-wrap: anywhere; }
</style></head><body><main>"""
