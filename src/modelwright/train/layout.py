"""How a model lies on devices while it is trained: what the loop asks, and the answers of one process alone.

Everything that several processes change about a step is behind this class, so that neither the loop nor an objective
knows of them: which rows of a batch are mine, how gradients meet, what the norm of all of them is. The parallel
layout is `modelwright.train.parallel.ParallelLayout`.
"""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modelwright.train.objective import Objective, clip_gradients

if TYPE_CHECKING:
    from modelwright.train.loop import LoopConfig, Run


class Layout:
    """One process alone; parallel layouts subclass it."""

    is_parallel: bool = False
    group: Any = None  # the ranks that see different data; None: all there are
    gradient_factor: float = 1.0  # of the loss before the backward pass; above 1 where gradients are averaged
    buckets: Sequence[Tensor] = ()  # copies that gradients are collected in, where a plan counts them
    num_parts: int = 1  # into how many parts the positions of a batch are split

    def check(self, config: "LoopConfig") -> None:
        """Refuse settings of the loop that this layout does not compute as one process would."""

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return the model as the loop calls it, on the device; called before the optimizer is made."""
        return model.to(device)

    def next_batches(self, loader: Any, num: int) -> list[Any]:
        """Take the next ``num`` micro-batches of an update from the loader; return those of this rank."""
        return [loader.next_batch() for _ in range(num)]

    def part_of(self, batch: Any) -> Any:
        """Return the positions of a micro-batch that this rank computes."""
        return batch

    def micro_step(self, *, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context of one forward and backward pass; gradients need to meet in the last one only."""
        return contextlib.nullcontext()

    def accumulate(self, run: "Run", objective: Objective, batches: Sequence[Any], num_trained: float) -> Tensor:
        """Add the gradients of all micro-batches of an update; return the summed loss of this rank's positions."""
        total = torch.zeros((), device=run.device)
        for index, batch in enumerate(batches):
            with self.micro_step(is_last=index == len(batches) - 1):
                with run.autocast():
                    summed = run.compiled_loss(run.model, batch.to(run.device))
                run.backward(summed / num_trained)
            total += summed.detach()
        return total

    def watched(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of all steps, in which other ranks are watched."""
        return contextlib.nullcontext()

    def clip(self, named: Sequence[tuple[str, Tensor]], max_norm: float | None) -> float:
        """Scale all gradients so that their joint norm is at most ``max_norm``; return the norm before."""
        return clip_gradients([gradient for _, gradient in named], max_norm)

    def whole_model(self, model: nn.Module, given: nn.Module) -> nn.Module:
        """Return the trained model in one piece; on other ranks than the first it may be without numbers.

        Args:
            model: What `place` returned.
            given: What `place` was given: it is in one piece afterwards, too.
        """
        return model

    def whole_gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a copy of every gradient by name, whole, on the first rank."""
        return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
