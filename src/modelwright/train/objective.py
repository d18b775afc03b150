"""Objectives: what happens in one training step.

The loop owns *when*; an objective owns *what*. Most only say what the loss of a micro-batch is and inherit `step`:
sum the losses of all micro-batches, divide by the trained tokens of the whole global batch (so that any split into
micro-batches and ranks gives the same gradient), clip, update. A method with several models or updates overrides
`step`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from modelwright.data.load import Batch
from modelwright.data.pack import IGNORED
from modelwright.models.decoder import Decoder
from modelwright.models.moe_decoder import MoeOutput
from modelwright.nn.cross_entropy import MAX_LOGITS, head_loss
from modelwright.nn.cross_entropy_parts import parts_loss

if TYPE_CHECKING:
    from modelwright.train.loop import Run


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    step: int  # counted from 1
    loss: float  # mean over the trained tokens, nats; NaN where there were none
    num_tokens: int  # positions processed, trained or not
    num_trained_tokens: int
    gradient_norm: float  # before clipping
    learning_rate: float  # of the first parameter group
    seconds: float
    is_skipped: bool = False  # the watchdog, or fp16's scale, did not let the update through


class Objective:
    """Base of all objectives; override `loss`, or `step` when one update is not all there is."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a micro-batch summed over its trained tokens, as a scalar to differentiate."""
        raise NotImplementedError

    def count_trained(self, batch: Batch) -> int:
        """Return over how many things the loss of a micro-batch is summed; by default its trained tokens."""
        return int((batch.labels != IGNORED).sum())

    def count_processed(self, batch: Batch) -> int:
        """Return how many positions a micro-batch makes the model process, for the speed that is shown."""
        return batch.input_ids.numel()

    def step(self, run: "Run", batches: Sequence[Batch]) -> tuple[float, int, float]:
        """Do one update from the micro-batches of a global batch.

        Returns:
            Mean loss in nats a trained token, the number of trained tokens, the gradient norm before clipping.
        """
        num_trained = run.sum_over_ranks(sum(self.count_trained(batch) for batch in batches))
        if num_trained == 0:
            run.watchdog.skip(run.step + 1, "the batch has no trainable token")
            return math.nan, 0, 0.0
        total = run.layout.accumulate(run, self, batches, num_trained)
        loss = run.sum_over_ranks(total) / num_trained
        return loss, int(num_trained), run.update(loss)


class CausalLanguageModeling(Objective):
    """Predict each token from those before it.

    Args:
        max_logits: How many logits may stand in memory at once; None: those of all positions.
    """

    def __init__(self, max_logits: int | None = MAX_LOGITS):
        self.max_logits = max_logits

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the summed cross-entropy of the trained positions, computed in float32.

        A model with experts adds what keeps their load even: the loss of each row, as often as the row has trained
        positions. So it counts as part of the mean over these, and no split into micro-batches changes it.
        """
        bare = unwrap(model)
        in_pieces = self.max_logits is not None and isinstance(bare, Decoder)
        extra = {"hidden_only": True} if in_pieces else {}
        out = model(batch.input_ids, positions=batch.positions, mask=batch.mask, **extra)
        if in_pieces:
            loss = self.loss_of_hidden(bare.lm_head, out.hidden, batch.labels)  # type: ignore[arg-type]
        else:  # logits (B, T, V)
            loss = F.cross_entropy(
                out.logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
            )
        if isinstance(out, MoeOutput) and out.auxiliary is not None:
            loss = loss + (out.auxiliary * (batch.labels != IGNORED).sum(1)).sum()
        return loss

    def loss_of_hidden(self, head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the summed loss from the input of the output matrix; the last stage of a pipeline begins here."""
        is_cut = isinstance(getattr(head, "weight", None), DTensor)
        pieces = {"ignored": IGNORED, "max_logits": self.max_logits or MAX_LOGITS}
        return (parts_loss if is_cut else head_loss)(head, hidden, labels, **pieces)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside of what torch.compile and DistributedDataParallel wrap."""
    for name in ("_orig_mod", "module"):
        model = getattr(model, name, model)
    return model


def clip_gradients(gradients: Sequence[Tensor], max_norm: float | None) -> float:
    """Scale all gradients so that their joint norm is at most ``max_norm``; return the norm before.

    Sharded gradients (DTensors) count as what they are shards of: the norm is that of the whole.
    """
    if not gradients:
        return 0.0
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if max_norm is not None:
        # A gradient that is not finite is left alone here: the watchdog sees the norm, and skips the step.
        factor = torch.clamp(max_norm / (whole + 1e-6), max=1.0)
        torch._foreach_mul_(list(gradients), factor)
    return float(whole)
