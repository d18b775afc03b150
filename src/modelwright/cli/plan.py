"""``mw plan``: what a training run will cost, before anything is spent."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from modelwright.base.errors import DeviceError
from modelwright.base.progress import console, human_bytes, human_count
from modelwright.cli.recipe import read_training_recipe
from modelwright.train.budget import Plan
from modelwright.train.plan import plan_run


def plan(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="The recipe that mw train would be given.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Print parameters, memory by part, FLOPs and time of a training run on this machine.

    Takes --section.field=value as mw train does. Ends with code 1 when the run will not fit in memory.
    """
    _, config = read_training_recipe(recipe, context.args)
    planned = plan_run(config)
    if as_json:
        print(json.dumps(planned.to_dict(), indent=2))
    else:
        console.print(_table(planned))
    if not planned.fits:
        raise DeviceError(
            f"The run will not fit: it needs {human_bytes(planned.total_bytes)}, and this machine has "
            f"{human_bytes(planned.machine_memory_bytes)}, of which a tenth is left to the rest. Lower "
            "loop.micro_batch_size (and raise loop.grad_accum_steps), max_seq_len or the shape."
        )


def _table(planned: Plan) -> Table:
    table = Table("what", "how much", "", box=None, pad_edge=False)
    optimizer = f"{human_bytes(planned.optimizer_bytes)}"
    seconds = planned.estimated_seconds
    rows = [
        ("parameters", human_count(planned.parameters), f"{human_count(planned.matmul_parameters)} in matrix products"),
        ("tokens", human_count(planned.total_tokens), f"{planned.num_steps:,} steps of {planned.tokens_per_step:,}"),
        ("FLOPs", human_count(planned.total_flops), f"{human_count(planned.flops_per_token)} a token"),
        ("memory", human_bytes(planned.total_bytes), f"of {human_bytes(planned.machine_memory_bytes)} in this machine"),
        ("  weights", human_bytes(planned.weight_bytes), "float32, and a bf16 copy where autocast makes one"),
        ("  gradients", human_bytes(planned.gradient_bytes), ""),
        ("  optimizer", optimizer, ""),
        ("  activations", human_bytes(planned.activation_bytes), "estimate"),
        ("KV cache", human_bytes(planned.kv_cache_bytes_per_token), "a token, when served in bf16"),
        (
            "time",
            f"{seconds / 60:,.1f} min" if seconds > 90 else f"{seconds:.0f} s",
            f"at {planned.assumed_mfu_fraction:.0%} of the {human_count(planned.machine_flops_per_second)}FLOP/s "
            "measured here; compilation comes on top",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    return table
