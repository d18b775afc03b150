"""``mw pull``: fetch a published model from the hub."""

from pathlib import Path
from typing import Annotated

import typer

from modelwright.base.progress import console, human_bytes
from modelwright.models.hub import pull as pull_model


def pull(
    hub_id: Annotated[str, typer.Argument(help="owner/name on the hub.")],
    to: Annotated[Path | None, typer.Option(help="Folder to make; else runs/NAME.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; else the default branch.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Weight files to fetch, for instance '*Q8_0.gguf'; else all safetensors.")
    ] = None,
) -> None:
    """Fetch a model's safetensors, config and tokenizer; pickled weights and code are never fetched."""
    folder = to or Path("runs") / hub_id.rpartition("/")[2]
    figures = pull_model(hub_id, folder, revision=revision, only=only or ())
    console.print(
        f"[bold]{folder}[/bold]  {hub_id} at {figures['revision'][:12]}, {len(figures['files'])} files, "
        f"{human_bytes(figures['size_bytes'])}"
    )
    for name, entry in figures["files"].items():
        console.print(f"  {entry['sha256'][:12]}  {human_bytes(entry['size_bytes']):>9}  {name}")
