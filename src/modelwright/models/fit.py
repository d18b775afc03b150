"""Training of the small models that fit in memory with their data: Adam, a falling rate, clipped gradients.

For language models on rows of tokens, with checkpoints and hooks, there is `train.loop`; this is for the classical
models, which train in seconds or minutes from arrays at hand and stand below that room.
Source: Kingma & Ba 2015, arXiv:1412.6980 (Adam); Loshchilov & Hutter 2017, arXiv:1608.03983 (cosine);
Pascanu et al. 2013 (clipping).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, DataError


def fit_steps(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    num_steps: int,
    *,
    learning_rate: float = 3e-3,
    max_grad_norm: float = 1.0,
) -> list[float]:
    """Train ``model`` in place and return the loss of each step; it is left in evaluation mode.

    Args:
        model: Its parameters are changed.
        loss_at: Step number (from 0) -> the loss of a batch, to differentiate.
        num_steps: Updates; the rate falls over them along half a cosine, to zero.
        learning_rate: At the first step.
        max_grad_norm: Gradients are scaled to at most this joint norm: what recurrence over many steps needs.

    Raises:
        DataError: The loss is no longer finite.
    """
    if num_steps < 1:
        raise ConfigError(f"num_steps is {num_steps}; it must be at least 1.")
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    model.train()
    losses = []
    for step in range(num_steps):
        loss = loss_at(step)
        losses.append(float(loss.detach()))
        if losses[-1] != losses[-1] or abs(losses[-1]) == float("inf"):
            raise DataError(
                f"The loss is {losses[-1]} at step {step}. Lower learning_rate, or look for broken numbers."
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        schedule.step()
    model.eval()
    return losses
