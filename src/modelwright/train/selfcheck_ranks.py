"""The invariances of several processes: each layout takes the step of one process, gradient by gradient.

Two or four processes on this machine meet over gloo (`modelwright.train.ranks`), make the same toy from the recipe, and
each layout's gradients are gathered whole. A layout that a recipe's model or objective does not allow is refused by
the layout itself; the row then is not checked, and says why.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from modelwright.base.errors import ConfigError
from modelwright.train.parallel import ParallelConfig
from modelwright.train.ranks import POOL
from modelwright.train.selfcheck import Finding, Subject, compare, make_subject

NUM_MICRO = 4
BOUND = 1e-4


def step_on_ranks(method: str, config: Any, parallel: ParallelConfig) -> dict[str, Tensor] | str:
    """Take one step as one rank of a layout; return whole gradients, or why the layout was refused."""
    subject = make_subject(method, config)
    # Rules with a state of their own order are refused by the layout; the gradient is the same for all rules.
    plain = replace(subject.loop.optimizer, name="adamw") if subject.loop.optimizer.name == "adafactor" else None
    changes: dict[str, Any] = {} if plain is None else {"optimizer": plain}
    try:
        return subject.gradients(subject.loader(2), num_micro=NUM_MICRO, parallel=parallel, device="cpu", **changes)
    except ConfigError as error:
        return str(error)


def _check(subject: Subject, name: str, parallel: ParallelConfig, num_ranks: int = 2) -> Finding:
    found = POOL.call(num_ranks, step_on_ranks, *subject.recipe, parallel)
    if isinstance(found[0], str):
        return Finding(name, None, None, BOUND, found[0])
    alone = subject.gradients(subject.loader(2), num_micro=NUM_MICRO, device="cpu")
    return compare(name, found[0], alone, BOUND)


def check_data(subject: Subject) -> Finding:
    """Two copies that share the rows give the gradient of one process."""
    return _check(subject, "2 ranks (DDP) = 1", ParallelConfig(data=2))


def check_shard(subject: Subject) -> Finding:
    """Two ranks that keep half of each weight give the gradient of one process."""
    return _check(subject, "2 ranks (FSDP2) = 1", ParallelConfig(shard=2))


def check_tensor(subject: Subject) -> Finding:
    """Two ranks that compute half of each layer give the gradient of one process."""
    return _check(subject, "2 ranks (tensor) = 1", ParallelConfig(tensor=2))


def check_pipeline(subject: Subject) -> Finding:
    """Two ranks that hold half of the layers give the gradient of one process."""
    return _check(subject, "2 ranks (pipeline) = 1", ParallelConfig(pipeline=2))


def check_context(subject: Subject) -> Finding:
    """Two ranks that see half of each row give the gradient of one process."""
    return _check(subject, "2 ranks (context) = 1", ParallelConfig(context=2))


def check_two_by_two(subject: Subject) -> Finding:
    """Four ranks, each of two shards cut in two by tensors, give the gradient of one process."""
    return _check(subject, "2 x 2 ranks (FSDP2 x tensor) = 1", ParallelConfig(shard=2, tensor=2), 4)
