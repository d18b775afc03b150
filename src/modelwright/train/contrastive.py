"""Contrastive learning of sentence vectors: each anchor picks its positive among all candidates of the global batch.

    loss = - sum_i log( exp(a_i . p_i / t) / sum_j exp(a_i . c_j / t) )     c: all positives and hard negatives

Candidates come from the whole global batch, whatever its split into micro-batches and ranks: vectors of all are
computed first without a graph, then the loss and its gradient by the vectors, then each micro-batch again with a
graph (GradCache; the random state is put back, so that dropout is the same). So eight micro-batches of one give the
gradient of one of eight, and memory is that of one. A candidate that is the anchor's own positive again, in another
group, is not a negative; nor is a text of its own class, where the batch says classes.

SimCSE is a group of one text twice: dropout (`modelwright.train.dropout`) makes the two differ. Matryoshka adds the
same loss of the first few numbers of each vector, normalised again.

Sources: van den Oord et al. 2018, arXiv:1807.03748 (InfoNCE); Gao et al. 2021, arXiv:2104.08821 (SimCSE) and
arXiv:2101.06983 (GradCache); Kusupati et al. 2022, arXiv:2205.13147 (Matryoshka).
Not done: memory banks.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.base.errors import ConfigError, DataError
from modelwright.data.examples import GroupBatch
from modelwright.models.sentence import SentenceEncoder
from modelwright.train.objective import Objective, unwrap

if TYPE_CHECKING:
    from modelwright.train.loop import Run


class Contrastive(Objective):
    """Pull an anchor to its positive and away from all other candidates; batches are `GroupBatch` (B, K, T).

    Args:
        temperature: t; 0.05 is SimCSE's.
        sizes: First so many numbers of a vector that are trained too, each as a vector of its own; (): the whole alone.
        is_symmetric: Let each positive pick its anchor too, and take the mean of both.
    """

    def __init__(self, temperature: float = 0.05, sizes: Sequence[int] = (), is_symmetric: bool = False):
        if not temperature > 0:
            raise ConfigError(f"temperature is {temperature}; it must be above 0.")
        if any(size < 1 for size in sizes) or len(set(sizes)) < len(sizes):
            raise ConfigError(f"matryoshka sizes are {tuple(sizes)}; expected different numbers of at least 1.")
        self.temperature, self.sizes, self.is_symmetric = temperature, tuple(sizes), is_symmetric

    def embed(self, model: nn.Module, batch: GroupBatch) -> Tensor:
        """Return the vectors of a micro-batch's texts, (B, K, D), float32."""
        bare = unwrap(model)
        if not isinstance(bare, SentenceEncoder):
            raise ConfigError(f"{type(bare).__name__} makes no vectors of texts. Wrap an encoder in SentenceEncoder.")
        width = int(bare.encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
        if any(size > width for size in self.sizes):
            raise ConfigError(
                f"matryoshka sizes are {self.sizes}; the vectors have {width} numbers. Give smaller ones."
            )
        num, size, length = batch.input_ids.shape
        flat = model(batch.input_ids.view(-1, length), attention_mask=batch.attention_mask.view(-1, length))
        return flat.embeddings.float().view(num, size, -1)

    def contrast(self, vectors: Tensor, names: Sequence[Sequence[object]]) -> Tensor:
        """Return the loss of groups (B, K, D) summed over anchors.

        Args:
            vectors: The anchor first, its positive second, hard negatives behind.
            names: What each text is, (B, K), itself or its class: equal ones are no negatives of each other.
        """
        if vectors.shape[1] < 2:
            raise DataError(f"Groups have {vectors.shape[1]} text; an anchor needs a positive. Give pairs.")
        is_copy = _copies(names).to(vectors.device)
        sizes = {min(s, vectors.shape[-1]) for s in self.sizes} | {vectors.shape[-1]}
        total = vectors.new_zeros(())
        for size in sorted(sizes):
            unit = F.normalize(vectors[..., :size], dim=-1)
            total = total + self._one_size(unit, is_copy) / len(sizes)
        return total

    def _one_size(self, unit: Tensor, is_copy: Tensor) -> Tensor:
        anchors = unit[:, 0]  # (B, D)
        candidates = unit[:, 1:].transpose(0, 1).flatten(0, 1)  # (B * (K - 1), D), the positives first
        scores = anchors @ candidates.T / self.temperature
        own = torch.arange(len(anchors), device=unit.device)
        loss = F.cross_entropy(scores.masked_fill(is_copy, float("-inf")), own, reduction="sum")
        if self.is_symmetric:
            back = (unit[:, 1] @ anchors.T / self.temperature).masked_fill(is_copy[:, : len(anchors)].T, float("-inf"))
            loss = (loss + F.cross_entropy(back, own, reduction="sum")) / 2
        return loss

    def loss(self, model: nn.Module, batch: GroupBatch) -> Tensor:  # type: ignore[override]
        """Return the summed loss of a batch whose candidates are its own."""
        return self.contrast(self.embed(model, batch), text_names(batch))

    def count_trained(self, batch: GroupBatch) -> int:  # type: ignore[override]
        """Count anchors."""
        return len(batch.input_ids)

    def step(self, run: "Run", batches: Sequence[GroupBatch]) -> tuple[float, int, float]:  # type: ignore[override]
        """Do one update; every anchor sees the candidates of all micro-batches, on this rank and on all others."""
        if len(batches) == 1 and not run.layout.is_parallel:
            return super().step(run, batches)  # type: ignore[arg-type]
        batches = [batch.to(run.device) for batch in batches]
        num = run.sum_over_ranks(sum(self.count_trained(batch) for batch in batches))
        states, parts = [], []
        for batch in batches:
            states.append(_random_state(run.device))
            with torch.no_grad(), run.autocast():
                parts.append(self.embed(run.model, batch))
        names = [row for batch in batches for row in text_names(batch)]
        mine, whole, names = _gather(run, torch.cat(parts), names)
        vectors = whole.requires_grad_()  # (B, K, D)
        summed = self.contrast(vectors, names)
        slopes = torch.autograd.grad(summed / num, vectors)[0][mine]
        for i, (batch, slope) in enumerate(zip(batches, slopes.split([len(p) for p in parts]), strict=True)):
            _set_random_state(run.device, states[i])
            with run.layout.micro_step(is_last=i == len(batches) - 1):
                with run.autocast():
                    again = self.embed(run.model, batch)
                run.backward((again * slope).sum())
        loss = float(summed.detach()) / num if num else math.nan
        return loss, int(num), run.update(loss)


def _gather(run: "Run", vectors: Tensor, names: Any) -> tuple[slice, Tensor, Any]:
    """Return where this rank's groups stand among those of all ranks, all vectors, and all names."""
    if not run.layout.is_parallel:
        return slice(None), vectors, names
    group = run.layout.group
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (vectors.cpu(), names), group=group)
    first = sum(len(one[0]) for one in found[: dist.get_rank(group)])
    whole = torch.cat([one[0] for one in found]).to(vectors.device)
    return slice(first, first + len(vectors)), whole, [row for one in found for row in one[1]]


def text_names(batch: GroupBatch) -> list[list[tuple[int, ...]]]:
    """Return the class of each text of a batch, or its ids without padding where there are no classes, (B, K)."""
    if batch.classes is not None:
        return [[(kind,) for kind in kinds] for kinds in batch.classes.tolist()]
    rows = []
    for ids, masks in zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), strict=True):
        rows.append([tuple(t for t, m in zip(i, k, strict=True) if m) for i, k in zip(ids, masks, strict=True)])
    return rows


def _copies(names: Sequence[Sequence[object]]) -> Tensor:
    """Return which candidates are an anchor's positive, or the anchor itself, a second time: (B, B * (K - 1))."""
    candidates = [row[k] for k in range(1, len(names[0])) for row in names]
    found = torch.zeros(len(names), len(candidates), dtype=torch.bool)
    places: dict[object, list[int]] = {}
    for j, name in enumerate(candidates):
        places.setdefault(name, []).append(j)
    for i, row in enumerate(names):
        for j in [*places.get(row[0], ()), *places.get(row[1], ())]:
            found[i, j] = j != i
    return found


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
