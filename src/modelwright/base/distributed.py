"""Several processes that train together: who I am, and sums over all of them.

Everything here also answers in a process that is alone, so that callers need no second path. The group of a call is
the set of ranks that see different data; None means all of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def is_distributed() -> bool:
    """Tell whether this process is one of several that torch.distributed has brought together."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process, 0 when it is alone."""
    import torch.distributed as dist

    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return how many processes there are, 1 when it is alone."""
    import torch.distributed as dist

    return dist.get_world_size() if is_distributed() else 1


def sum_over_ranks(values: "torch.Tensor", group: Any = None) -> "torch.Tensor":
    """Return the sum of a tensor over all ranks of the group; the tensor itself where there is one process."""
    if not is_distributed():
        return values
    import torch.distributed as dist

    total = values.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
    return total
