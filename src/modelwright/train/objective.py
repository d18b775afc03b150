"""Objectives: what happens in one training step.

The loop owns *when*; an objective owns *what*. Most only say what the loss of a micro-batch is and inherit `step`:
sum the losses of all micro-batches, divide by the trained tokens of the whole global batch (so that any split into
micro-batches gives the same gradient), clip, update. A method with several models or updates overrides `step`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.base.errors import ConfigError
from modelwright.data.load import Batch
from modelwright.data.pack import IGNORED
from modelwright.models.moe_decoder import MoeOutput

if TYPE_CHECKING:
    from modelwright.train.loop import Run


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    step: int  # counted from 1
    loss: float  # mean over the trained tokens, nats
    num_tokens: int  # positions processed, trained or not
    num_trained_tokens: int
    gradient_norm: float  # before clipping
    learning_rate: float  # of the first parameter group
    seconds: float


class Objective:
    """Base of all objectives; override `loss`, or `step` when one update is not all there is."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a micro-batch summed over its trained tokens, as a scalar to differentiate."""
        raise NotImplementedError

    def step(self, run: "Run", batches: Sequence[Batch]) -> tuple[float, int, float]:
        """Do one update from the micro-batches of a global batch.

        Returns:
            Mean loss in nats a trained token, the number of trained tokens, the gradient norm before clipping.
        """
        num_trained = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
        if num_trained == 0:
            return 0.0, 0, 0.0
        total = 0.0
        for batch in batches:
            with run.autocast():
                summed = run.compiled_loss(run.model, batch.to(run.device))
            (summed / num_trained).backward()
            total += float(summed.detach())
        norm = clip_gradients(run.optimizer.parameters(), run.config.max_grad_norm)
        if total != total or norm != norm or norm == float("inf"):
            raise ConfigError(
                f"The loss or gradient is not finite at step {run.step + 1} (loss sum {total}, gradient norm {norm}). "
                "The weights were not changed. Lower optimizer learning rates, or check the data for broken rows."
            )
        run.optimizer.step()
        run.optimizer.zero_grad()
        return total / num_trained, num_trained, norm


class CausalLanguageModeling(Objective):
    """Predict each token from those before it."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the summed cross-entropy of the trained positions, computed in float32.

        A model with experts adds what keeps their load even: the loss of each row, as often as the row has trained
        positions. So it counts as part of the mean over these, and no split into micro-batches changes it.
        """
        out = model(batch.input_ids, positions=batch.positions, mask=batch.mask)  # logits (B, T, V)
        loss = F.cross_entropy(
            out.logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        if isinstance(out, MoeOutput) and out.auxiliary is not None:
            loss = loss + (out.auxiliary * (batch.labels != IGNORED).sum(1)).sum()
        return loss


def clip_gradients(parameters: Sequence[Tensor], max_norm: float | None) -> float:
    """Scale all gradients so that their joint norm is at most ``max_norm``; return the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if max_norm is not None:
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return float(norm)
