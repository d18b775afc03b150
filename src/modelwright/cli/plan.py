"""``mw plan``: what a training run will cost, before anything is spent."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from modelwright.base.errors import ConfigError, DeviceError
from modelwright.base.progress import console, human_bytes, human_count
from modelwright.cli.plan_optimal import read_prices, show_optimal
from modelwright.cli.recipe import read_training_recipe
from modelwright.train.budget import Plan
from modelwright.train.plan import plan_run

HIDDEN_AT_ZERO = ("  loading", "  checkpoint", "  shared", "  logits", "KV cache")


def plan(
    context: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(help="The recipe that mw train would be given.")] = None,
    flops: Annotated[float | None, typer.Option(help="Of training: the best size and tokens for them.")] = None,
    parameters: Annotated[float | None, typer.Option(help="Of a model: the tokens that suit it.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Of data: the size that suits them.")] = None,
    prices: Annotated[Path | None, typer.Option(help="YAML: a machine's name to its price an hour.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Print parameters, memory by part, FLOPs, time and cost of a training run on this machine.

    Takes --section.field=value as mw train does. Ends with code 1 when the run will not fit in memory.
    Without a recipe, --flops, --parameters or --tokens says what is compute-optimal by the law of Hoffmann et al. 2022.
    """
    asked = {name: v for name, v in (("flops", flops), ("parameters", parameters), ("tokens", tokens)) if v is not None}
    if recipe is None or asked:
        if recipe is not None or len(asked) != 1:
            raise ConfigError("Give a recipe, or one of --flops, --parameters and --tokens.")
        show_optimal(asked, as_json=as_json)
        return
    _, config = read_training_recipe(recipe, context.args)
    planned = plan_run(config)
    costs = {} if prices is None else read_prices(prices, planned.estimated_seconds)
    if as_json:
        print(json.dumps({**planned.to_dict(), "costs": costs}, indent=2))
    else:
        console.print(_table(planned))
        for name, cost in costs.items():
            console.print(f"cost             {cost:,.2f} on {name}, if it takes as long there as here")
    if not planned.fits:
        raise DeviceError(
            f"The run will not fit: it needs {human_bytes(planned.total_bytes)}, and this machine has "
            f"{human_bytes(planned.machine_memory_bytes)}, of which a tenth is left to the rest. "
            f"{planned.batch.largest_micro_batch} rows at a time would fit, {planned.batch.largest_recomputed} with "
            "loop.recompute.name=layers. Lower loop.micro_batch_size (and raise loop.grad_accum_steps), max_seq_len or "
            "the shape."
        )


def _table(planned: Plan) -> Table:
    table = Table("what", "how much", "", box=None, pad_edge=False)
    optimizer = f"{human_bytes(planned.optimizer_bytes)}"
    seconds = planned.estimated_seconds
    rows = [
        ("parameters", human_count(planned.parameters), f"{human_count(planned.matmul_parameters)} in matrix products"),
        ("tokens", human_count(planned.total_tokens), f"{planned.num_steps:,} steps of {planned.tokens_per_step:,}"),
        ("FLOPs", human_count(planned.total_flops), f"{human_count(planned.flops_per_token)} a token"),
        (
            "memory",
            human_bytes(planned.total_bytes),
            f"a process, of {human_bytes(planned.machine_memory_bytes)} in this machine",
        ),
        ("  weights", human_bytes(planned.weight_bytes), "float32"),
        ("  gradients", human_bytes(planned.gradient_bytes), ""),
        ("  optimizer", optimizer, ""),
        ("  activations", human_bytes(planned.activation_bytes), "at the peak of a step, eager"),
        ("  logits", human_bytes(planned.peak.logits_bytes), "at the peak"),
        ("  allocator", human_bytes(planned.peak.allocator_bytes), "holes, and what is freed and not given back"),
        ("  loading", human_bytes(planned.peak.loading_bytes), "beyond a step, while the model is made"),
        ("  checkpoint", human_bytes(planned.peak.checkpoint_bytes), "the copy that is written meanwhile"),
        ("  framework", human_bytes(planned.peak.framework_bytes), "interpreter and libraries"),
        ("  shared", human_bytes(-planned.peak.shared_bytes), "gradients that come where activations were"),
        ("largest batch", f"{planned.batch.largest_micro_batch} rows", _advice(planned)),
        ("KV cache", human_bytes(planned.kv_cache_bytes_per_token), "a token, when served in bf16"),
        (
            "time",
            f"{seconds / 60:,.1f} min" if seconds > 90 else f"{seconds:.0f} s",
            f"at {planned.assumed_mfu_fraction:.0%} of the {human_count(planned.machine_flops_per_second)}FLOP/s "
            "measured here; compilation comes on top",
        ),
    ]
    for row in rows:
        if row[0] not in HIDDEN_AT_ZERO or not row[1].startswith("0"):
            table.add_row(*row)
    return table


def _advice(planned: Plan) -> str:
    found = planned.batch
    return f"{found.largest_recomputed} with loop.recompute.name=layers; recommended: {found.recommended_recompute}"
