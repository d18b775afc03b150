"""``mw inspect``: what a model on disk is, from its headers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from modelwright.base.progress import console, human_bytes, human_count
from modelwright.models.summary import Summary, summarize


def inspect(
    model: Annotated[Path, typer.Argument(help="Model folder, .gguf file or llama2.c .bin file.")],
    tensors: Annotated[bool, typer.Option(help="List every tensor.")] = False,
    values: Annotated[
        bool, typer.Option(help="Read the weights too, and name those that hold NaN or infinity.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, the tensors included.")] = False,
) -> None:
    """Print parameters by part, dtypes, memory, and what the cache costs at each context length."""
    summary = summarize(model, check_values=values)
    if as_json:
        print(json.dumps(asdict(summary) | {"memory_bytes": summary.memory_bytes}, indent=2))
        return
    stored = ", ".join(f"{name} {human_bytes(size)}" for name, size in summary.dtypes.items())
    active = (
        "" if summary.active_parameters == summary.parameters else f" ({human_count(summary.active_parameters)} active)"
    )
    console.print(f"[bold]{summary.path}[/bold]  {summary.architecture} ({summary.family})")
    console.print(f"{human_count(summary.parameters)} parameters{active}, stored as {stored}")
    console.print(_parts(summary))
    for second, first in summary.tied.items():
        console.print(f"[dim]{second} is {first}[/dim]")
    sizes = ", ".join(f"{human_bytes(size)} {name}" for name, size in summary.memory_bytes.items())
    console.print(f"\nweights in memory: {sizes}")
    if summary.cache:
        console.print(f"\ncache of one sequence, {summary.cache_dtype}; longest context {summary.context_len or 'any'}")
        console.print(_cache(summary))
    if tensors:
        console.print()
        console.print(_tensors(summary))
    if values:
        bad = [f"{t.name} ({t.num_bad:,} of its numbers)" for t in summary.bad_tensors]
        console.print(f"\nNaN or infinity: {', '.join(bad) or 'in no tensor'}")


def _parts(summary: Summary) -> Table:
    table = Table("part", "parameters", "share", "active", "in the file", box=None, pad_edge=False)
    for part in summary.parts:
        share = f"{part.parameters / max(1, summary.parameters):.1%}"
        active = "" if part.active_parameters == part.parameters else human_count(part.active_parameters)
        table.add_row(part.name, f"{part.parameters:,}", share, active, human_bytes(part.nbytes))
    return table


def _cache(summary: Summary) -> Table:
    table = Table("context", "cache", "a token", "the next token", box=None, pad_edge=False)
    for cost in summary.cache:
        table.add_row(
            f"{cost.context_len:,}",
            human_bytes(cost.nbytes),
            human_bytes(cost.bytes_per_token),
            human_bytes(cost.next_token_bytes),
        )
    return table


def _tensors(summary: Summary) -> Table:
    table = Table("tensor", "part", "dtype", "shape", "bytes", box=None, pad_edge=False)
    for tensor in summary.tensors:
        shape = " x ".join(map(str, tensor.shape))
        table.add_row(tensor.name, tensor.part, tensor.dtype, shape, human_bytes(tensor.nbytes))
    return table
