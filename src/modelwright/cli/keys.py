"""``mw keys``: make an API key for ``mw serve --api-key-file``."""

from pathlib import Path
from typing import Annotated

import typer

from modelwright.base.progress import console
from modelwright.serve.keys import add_key


def keys(
    name: Annotated[str, typer.Argument(help="Whose key it is; shown in errors and counted under.")],
    file: Annotated[Path, typer.Option(help="Key file; made when it does not exist.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="inference (the default), metrics, admin; repeatable.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Requests begun in a minute at most.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Tokens of prompts and answers in a minute.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Requests at the same time at most.")] = None,
    token_budget: Annotated[int | None, typer.Option(help="Tokens in all, for the life of the file.")] = None,
) -> None:
    """Add a key to FILE and print it, this once: the file keeps its hash alone."""
    secret = add_key(
        file,
        name,
        scopes=scope or ["inference"],
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrent=max_concurrent,
        token_budget=token_budget,
    )
    typer.echo(secret)
    console.print(f"[dim]{name} was added to {file}. The key above is not shown again.[/dim]")
