"""One rank of a layout of several processes, played by one process alone, for the plan of its memory.

The group of processes exists in name: its exchanges return at once and carry nothing (torch's "fake" backend). What the
layout cuts, gathers and scatters runs as it does in earnest, on tensors without numbers, so shards and cut layers need
no formula. Two things are played: DDP, whose reducer is written in C++ and wants numbers, is the plain model with
buckets as large as its gradients; a pipeline, whose stages would wait for each other, passes its micro-batches through
this rank's stages in the order of the schedule, with as many of them in flight.

Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2 (how many are in flight).
Not here: what gloo and nccl take.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore  # its import makes the backend known
from torch.utils._python_dispatch import _disable_current_modes

from modelwright.base.errors import ConfigError
from modelwright.train.objective import Objective
from modelwright.train.parallel import ParallelConfig, ParallelLayout
from modelwright.train.pipeline import Pipeline

if TYPE_CHECKING:
    from modelwright.train.loop import Run


def num_ranks(parallel: ParallelConfig) -> int:
    """Return the processes that a layout asks for."""
    return parallel.inner * (parallel.data or 1)


def traced_ranks(parallel: ParallelConfig) -> tuple[int, ...]:
    """Return the ranks that can be the largest: of a pipeline the first, most in flight, and the last, with logits.

    >>> traced_ranks(ParallelConfig(pipeline=4, tensor=2))
    (0, 6)
    """
    total = num_ranks(parallel)
    return (0,) if parallel.pipeline == 1 else (0, total - total // parallel.pipeline)


@contextlib.contextmanager
def as_rank(parallel: ParallelConfig, rank: int, precision: str) -> Iterator[ParallelLayout | None]:
    """Be a rank of a layout for the time of the ``with``; yield the layout, or None for one process alone.

    Raises:
        ConfigError: This process is one of several already.
    """
    total = num_ranks(parallel)
    if total == 1:
        yield None
        return
    if dist.is_initialized():
        raise ConfigError(
            f"A plan of {total} processes was asked of one that is one of {dist.get_world_size()} itself. Plan in "
            "a process alone: mw plan RECIPE."
        )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=total)
    try:
        with _numbered_meshes():
            yield PlayedLayout(replace(parallel, data=parallel.data or 1), torch.device("cpu"), precision)
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it holds meshes whose groups are gone


@contextlib.contextmanager
def _numbered_meshes() -> Iterator[None]:
    """Let meshes of ranks have numbers where no other tensor has: a rank must find its place in them."""
    plain = {name: vars(DeviceMesh)[name] for name in ("__init__", "__getitem__", "_flatten", "_concatenate")}

    def numbered(given: Any) -> Any:
        function = getattr(given, "__func__", given)  # of a static method

        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return function(*args, **kwargs)

        return staticmethod(call) if isinstance(given, staticmethod) else call

    for name, given in plain.items():
        setattr(DeviceMesh, name, numbered(given))
    try:
        yield
    finally:
        for name, given in plain.items():
            setattr(DeviceMesh, name, given)


class PlayedPipeline(Pipeline):
    """The stages of one rank, with nothing before or behind them."""

    def accumulate(self, run: "Run", objective: Objective, batches: Sequence[Any], num_trained: float) -> Tensor:
        """Pass micro-batches forward and back in the schedule's order."""
        loss_of = self.find_loss(objective)
        for segment in self.segments:
            segment.run = run
        shape = (*batches[0].input_ids.shape, self.model.config.hidden_size)
        # A stage has a buffer for what comes from each side, for each micro-batch, as long as the run lasts.
        if not self._buffers:
            num_sides = sum((not s.is_first) + (not s.is_last) for s in self.segments)
            self._buffers = [torch.empty(shape) for _ in range(num_sides * len(batches))]
        forward, backward, most = self.order(len(batches))
        held: dict[tuple[int, int], Tensor] = {}
        kept: list[Tensor | None] = []  # what the last stage returns of each micro-batch
        num_done = 0
        for key in backward:
            while num_done < len(forward) and (num_done - len(kept) < most or key not in held):
                micro, chunk = forward[num_done]
                segment, batch = self.segments[chunk], batches[micro]
                x = batch.input_ids if segment.is_first else torch.empty(shape, requires_grad=True)
                out = segment(x, batch.positions, batch.mask)
                if segment.is_last:
                    with run.autocast():
                        held[micro, chunk] = loss_of(segment.lm_head, out, batch.labels) / num_trained
                    held[micro, -1] = out.detach()
                else:
                    held[micro, chunk] = out
                del x, out
                num_done += 1
            _set_meeting(self.segments[key[1]], is_last=key[0] == len(batches) - 1)
            ended = held.pop(key)
            ended.backward(torch.empty_like(ended))
            kept.append(held.pop((key[0], -1), None) if self.segments[key[1]].is_last else None)
            del ended
        return torch.zeros(())

    _buffers: Sequence[Tensor] = ()

    def order(self, num_micro: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]], int]:
        """Return (micro-batch, stage of this rank) as they go forward and back, and how many are in flight at most."""
        num_chunks = len(self.segments)
        if num_chunks == 1:
            order = [(micro, 0) for micro in range(num_micro)]
            return order, order, min(num_micro, self.size - self.rank)
        groups = [range(first, min(first + self.size, num_micro)) for first in range(0, num_micro, self.size)]
        forward = [(m, chunk) for group in groups for chunk in range(num_chunks) for m in group]
        backward = [(m, chunk) for group in groups for chunk in reversed(range(num_chunks)) for m in group]
        most = 2 * (self.size - self.rank - 1) + (num_chunks - 1) * self.size + 1
        return forward, backward, min(len(forward), most)


def _set_meeting(segment: nn.Module, *, is_last: bool) -> None:
    """Keep weights and gradients of shards whole until the last micro-batch, as torch's stages do."""
    if isinstance(segment, FSDPModule):
        segment.set_is_last_backward(is_last)
        segment.set_reshard_after_backward(is_last)
        segment.set_requires_gradient_sync(is_last)


class PlayedLayout(ParallelLayout):
    """A layout of which one rank is played."""

    pipeline_class = PlayedPipeline

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Cut the model as the layout does; DDP's buckets are made instead of DDP."""
        if not self.is_ddp:
            return super().place(model, device)
        self.buckets = [torch.empty_like(p) for p in model.parameters() if p.requires_grad]
        return model

    def move(self, module: nn.Module, device: torch.device) -> nn.Module:
        """Leave the module: tensors without numbers are there already, and cannot be moved in place."""
        return module
