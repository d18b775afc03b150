"""The costs of a ledger as one page that needs nothing else: a bar a day and a table."""

import html

from modelwright.serve.ledger import Ledger

_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>What the gateway spent</title><style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% } td, th { padding: .3rem .6rem; text-align: right }
th { border-bottom: 2px solid } td { border-bottom: 1px solid #8884 }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left }
svg { width: 100%; height: auto } rect { fill: #3b78c3 } text { fill: currentColor; font-size: 12px }
.wide { overflow-x: auto }
</style>
"""


def render(ledger: Ledger) -> str:
    """Return the page."""
    total, days = ledger.dollars(), ledger.by_day()
    rows = []
    for s in ledger.table():
        counts = (s.num_calls, s.num_failed, s.num_cached, s.prompt_tokens, s.completion_tokens)
        dollars = f"{s.dollars:,.4f}" + (f" (+ {s.num_unpriced} unpriced)" if s.num_unpriced else "")
        named = (html.escape(s.tenant), html.escape(s.endpoint))
        rows.append((*named, *(f"{n:,}" for n in counts), f"{s.seconds:,.1f}", dollars))
    names = ("Tenant", "Endpoint", "Calls", "Failed", "Cached", "Tokens in", "Tokens out", "Seconds", "Dollars")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    told = f"{total:,.4f} dollars in {sum(day[2] for day in days):,} calls."
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return (
        f'{_HEAD}<main><h1>What the gateway spent</h1><p>{told}</p>{_bars(days)}<div class="wide">{table}</div></main>'
    )


def _bars(days: list[tuple[str, float, int]]) -> str:
    """Return a bar for each of the last 60 days that had a call."""
    shown = days[-60:]
    most = max((dollars for _, dollars, _ in shown), default=0.0)
    if not most:
        return ""
    step = 900 / len(shown)
    bars = []
    for i, (day, dollars, calls) in enumerate(shown):
        height = 160 * dollars / most
        told = f"<title>{day}: {dollars:.4f} dollars, {calls} calls</title>"
        width = min(step * 0.8, 60)
        bars.append(
            f'<rect x="{i * step:.1f}" y="{170 - height:.1f}" width="{width:.1f}" height="{height:.1f}">{told}</rect>'
        )
    ends = f'<text x="0" y="188">{shown[0][0]}</text><text x="900" y="188" text-anchor="end">{shown[-1][0]}</text>'
    label = f"Dollars a day, at most {most:.4f}"
    return f'<svg viewBox="0 0 900 195" role="img" aria-label="{label}">{"".join(bars)}{ends}</svg><p>{label}.</p>'
