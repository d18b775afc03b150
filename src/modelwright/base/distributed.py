"""Several processes that train together: who I am, and sums over all of them.

Everything here also answers in a process that is alone, so that callers need no second path. The group of a call is
the set of ranks that see different data; None means all of them. `join` brings together what torchrun has started.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# How long a rank waits for another in one exchange before it gives up; a dead one is noticed sooner (`base.pulse`).
MAX_WAIT = timedelta(minutes=15)


_joined: list[bool] = []  # not empty inside of `join`


class Finished(BaseException):
    """Raised on the ranks that have nothing left to do; `join` takes it."""


def is_launched() -> bool:
    """Tell whether torchrun, or another launcher that sets its variables, has started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def is_restarted() -> bool:
    """Tell whether torchrun has started this process again because one of the group had ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def join() -> Iterator[None]:
    """Bring the processes of a launch together for the time of the ``with``; nothing happens in a process alone.

    Each process takes the GPU of its local rank. Exchanges go over nccl between GPUs and over gloo between CPUs.
    """
    if not is_launched() and not is_distributed():
        yield
        return
    import torch
    import torch.distributed as dist

    is_made_here = not is_distributed()  # Ray brings its workers together itself
    if is_made_here:
        has_gpu = torch.cuda.is_available()
        if has_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=MAX_WAIT, **_meeting_place())
    _joined.append(True)
    try:
        yield
    except Finished:
        pass
    finally:
        _joined.pop()
        if is_made_here:
            dist.destroy_process_group()


def _meeting_place() -> dict[str, Any]:
    """Return where the processes find each other, if it is not where torch would look.

    When a worker has died, torchrun starts all of them anew over the same store, in which the addresses of the dead
    still stand: the new ones would call there and fail. On one machine every start gets a part of the store of its own;
    on several the counts of starts can differ, and it stays as torch has it.
    """
    import torch.distributed as dist

    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return {}
    store, rank, world_size = next(dist.rendezvous("env://", timeout=MAX_WAIT))
    return {"store": dist.PrefixStore(f"start_{restarts}", store), "rank": rank, "world_size": world_size}


def leave_to_first() -> None:
    """End the work of every rank but the first here, inside of `join`: what is left, one process does alone."""
    if _joined and rank() > 0:
        raise Finished


def barrier() -> None:
    """Wait until every rank is here."""
    if is_distributed():
        import torch.distributed as dist

        dist.barrier()


def share(value: Any) -> Any:
    """Return what the first rank has, on every rank; the value itself where there is one process."""
    if not is_distributed():
        return value
    import torch.distributed as dist

    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


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
