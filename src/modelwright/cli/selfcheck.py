"""``mw selfcheck``: does this recipe train what it says?"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from modelwright.base.progress import console
from modelwright.cli.recipe import read_training_recipe
from modelwright.train import CHECKS
from modelwright.train.selfcheck import Finding, self_check

MARKS = {True: "[green]yes[/green]", False: "[red]NO[/red]", None: "not checked"}


def selfcheck(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="The recipe that mw train would be given.")],
    only: Annotated[str, typer.Option(help=f"Checks to run, joined by commas: {', '.join(CHECKS)}.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Change what must not change the result of RECIPE (split of the batch, packing, a restart, ...), and compare.

    Runs at toy size on random tokens, in about a minute. Ends with code 1 when an invariance does not hold.
    """
    method, config = read_training_recipe(recipe, context.args)
    findings = self_check(method, config, only.split(",") if only else None)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console.print(_table(findings))
    if any(finding.holds is False for finding in findings):
        raise typer.Exit(1)


def _table(findings: list[Finding]) -> Table:
    table = Table("invariance", "holds", "largest difference", "bound", "", box=None, pad_edge=False)
    for finding in findings:
        seen = "" if finding.largest_difference is None else f"{finding.largest_difference:.1e}"
        table.add_row(finding.name, MARKS[finding.holds], seen, f"{finding.bound:.0e}", finding.note)
    return table
