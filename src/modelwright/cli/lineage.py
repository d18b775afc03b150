"""``mw lineage``: from an artifact back to the documents it was made from."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.tree import Tree

from modelwright.base.artifact import Ancestor, verify
from modelwright.base.artifact import lineage as walk
from modelwright.base.errors import CheckpointError
from modelwright.base.progress import console

STYLES = {"same": "green", "changed": "yellow", "missing": "red"}


def lineage(
    path: Annotated[Path, typer.Argument(help="A folder that mw made.")],
    check: Annotated[bool, typer.Option(help="Hash every file again, and end with code 1 if one was changed.")] = False,
) -> None:
    """Print what an artifact was made from, back to the documents, and whether it still is the same."""
    ancestors = walk(path)
    nodes: list[Tree] = []
    for ancestor in ancestors:
        label = _label(ancestor)
        node = nodes[ancestor.depth - 1].add(label) if ancestor.depth else Tree(label)
        nodes[ancestor.depth :] = [node]
    console.print(nodes[0])
    if check:
        for ancestor in ancestors:
            if ancestor.state == "missing":
                raise CheckpointError(f"{ancestor.path} is missing. Put it back, or make {path} again.")
            verify(ancestor.path)
        console.print("every file is what was sealed")


def _label(ancestor: Ancestor) -> str:
    state = f"[{STYLES[ancestor.state]}]{ancestor.state}[/]"
    made = f"[dim]{ancestor.hash[:12]} {ancestor.manifest.created if ancestor.manifest else ''}[/dim]"
    path = Path(os.path.relpath(ancestor.path)) if ancestor.path.is_relative_to(Path.cwd()) else ancestor.path
    return f"[bold]{ancestor.kind}[/bold] {path}  {state}  {made}"
