"""Learn a new task without losing the old one: elastic weights, and rows of the old task among the new.

    L = L_new + (strength / 2) sum_i F_i (w_i - w*_i)^2,   F_i = mean over old examples of (dL_old/dw_i)^2

Weights that the old task depends on (large F, the diagonal of the Fisher information) are held near their old values;
the others are free. Replay mixes rows of the old task into the new ones.

Source: Kirkpatrick et al. 2017, arXiv:1612.00796, equation 3 (EWC); Rolnick et al. 2019, arXiv:1811.11682 (replay).
Not done: several old tasks with a penalty each (give the rows of all of them to one `fisher`).
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, DataError
from modelwright.data.load import RowLoader
from modelwright.data.pack import Rows
from modelwright.train.objective import CausalLanguageModeling, Objective


def fisher(
    model: nn.Module, rows: Rows, objective: Objective | None = None, max_rows: int = 64
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return for each trained parameter its value now, and how much the old task depends on it.

    Args:
        rows: Of the old task; one row is one example.
        max_rows: More than these are not looked at.
    """
    objective = objective or CausalLanguageModeling()
    loader = RowLoader(lambda _: rows, 1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    squares = {name: torch.zeros_like(p) for name, p in trained.items()}
    num_rows = min(len(rows), max_rows)
    for _ in range(num_rows):
        batch = loader.next_batch()
        loss = objective.loss(model, batch) / max(1, objective.count_trained(batch))
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        for square, gradient in zip(squares.values(), gradients, strict=True):
            if gradient is not None:
                square.addcmul_(gradient, gradient, value=1 / num_rows)
    return {name: (p.detach().clone(), squares[name]) for name, p in trained.items()}


class ElasticWeights(Objective):
    """Another objective, with a spring on every weight that the old task needs."""

    def __init__(self, inner: Objective, anchors: dict[str, tuple[Tensor, Tensor]], strength: float):
        if strength < 0:
            raise ConfigError(f"strength is {strength}; it must be at least 0.")
        self.inner, self.anchors, self.strength = inner, anchors, strength

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the inner loss and the penalty, as often as there are trained tokens: so it counts in the mean."""
        names = dict(model.named_parameters())
        pull = torch.zeros((), device=next(iter(names.values())).device)
        for name, (old, weight) in self.anchors.items():
            pull = pull + (weight * (names[name] - old).square()).sum()
        return self.inner.loss(model, batch) + self.strength / 2 * pull * self.inner.count_trained(batch)

    def count_trained(self, batch: Any) -> int:
        """Return what the inner objective counts."""
        return self.inner.count_trained(batch)


def replay_rows(new: Rows, old: Rows, fraction: float, seed: int = 0) -> Rows:
    """Return the new rows with old ones among them.

    Args:
        fraction: Of the result that is old, at least 0 and below 1.

    Raises:
        ConfigError: The fraction is none.
        DataError: The rows differ in length, or one part has boundaries and the other none.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"fraction is {fraction}; it must be at least 0 and below 1.")
    if new.input_ids.shape[1] != old.input_ids.shape[1] or (new.document_ids is None) != (old.document_ids is None):
        raise DataError(
            f"New rows have {new.input_ids.shape[1]} tokens and old ones {old.input_ids.shape[1]}; both must be of one "
            "length and packed in one way. Pack them again."
        )
    random = np.random.default_rng(seed)
    num_old = round(len(new) * fraction / (1 - fraction))
    picked = random.choice(len(old), num_old, replace=num_old > len(old))
    order = random.permutation(len(new) + num_old)

    def joined(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.concatenate((a, b[picked]))[order]

    documents = None
    if new.document_ids is not None and old.document_ids is not None:
        documents = joined(new.document_ids, old.document_ids)
    return replace(
        new,
        input_ids=joined(new.input_ids, old.input_ids),
        labels=joined(new.labels, old.labels),
        document_ids=documents,
    )
