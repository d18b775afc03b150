"""Learn from a teacher's logits: forward or reverse Kullback-Leibler divergence at a temperature, beside the labels.

    forward   T^2 sum_v p_T(v) log(p_T(v) / p_S(v))     cover all that the teacher finds likely
    reverse   T^2 sum_v p_S(v) log(p_S(v) / p_T(v))     stay within what the teacher finds likely

The teacher is any function from a batch to logits: another model that runs beside (`teacher_of`), or what it once wrote
down (`cache_teacher`): its K most likely tokens a position. Of a cached one the rest is one event more, so the
divergence is that of K + 1 events; it is at most that of the whole vocabulary, and equal to it when K is V.

Source: Hinton et al. 2015, arXiv:1503.02531, section 2 (temperature, T^2); Gu et al. 2023, arXiv:2306.08543 (reverse).
Not done: hidden states as targets, vocabularies that differ, sequences written by the student.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, DataError
from modelwright.data.examples import PairBatch, TextBatch
from modelwright.data.load import Batch, make_batch
from modelwright.data.pack import IGNORED, Rows
from modelwright.models.tensor_file import write_tensors
from modelwright.train.masked import summed_cross_entropy
from modelwright.train.objective import Objective

Teacher = Callable[[Any], Tensor]  # a batch -> logits (..., V) of each position that the student predicts at
DIRECTIONS = ("forward", "reverse")


@dataclass(frozen=True)
class DistillConfig:
    """How much is learned from the teacher, and how."""

    direction: str = "forward"  # forward or reverse
    temperature: float = 1.0  # both distributions are softened by it
    teacher_fraction: float = 0.5  # of the loss; the rest is the cross-entropy of the labels

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ConfigError(f"distill.direction is {self.direction!r}; known: {', '.join(DIRECTIONS)}.")
        if not self.temperature > 0:
            raise ConfigError(f"distill.temperature is {self.temperature}; it must be above 0.")
        if not 0 < self.teacher_fraction <= 1:
            raise ConfigError(f"distill.teacher_fraction is {self.teacher_fraction}; it must be above 0, at most 1.")


@dataclass(frozen=True)
class TaughtBatch(Batch):
    """A batch of rows with the teacher's most likely tokens."""

    top_ids: Tensor = field(kw_only=True)  # (B, T, K) int64
    top_log_probs: Tensor = field(kw_only=True)  # (B, T, K), at the temperature of the cache

    def to(self, device: torch.device) -> "TaughtBatch":
        """Return the batch on another device."""
        moved = {name: None if v is None else v.to(device, non_blocking=True) for name, v in vars(self).items()}
        return TaughtBatch(**moved)  # type: ignore[arg-type]


def divergence(student: Tensor, teacher: Tensor, direction: str = "forward") -> Tensor:
    """Return the divergence of log-probabilities (M, V) from the teacher's, (M,).

    >>> same = torch.tensor([[0.5, 0.5]]).log()
    >>> divergence(same, torch.tensor([[0.9, 0.1]]).log()).item(), divergence(same, same).item()
    (0.368..., 0.0)
    """
    first, second = (teacher, student) if direction == "forward" else (student, teacher)
    # An event that cannot happen adds nothing: 0 log 0 = 0.
    terms = first.exp() * (first - second)
    return torch.where(first == float("-inf"), 0.0, terms).sum(-1)


def call_model(model: nn.Module, batch: Any) -> Tensor:
    """Return the logits of any model for a batch of the kind that it is trained on."""
    if isinstance(batch, TextBatch):
        return model(batch.input_ids, **batch.inputs()).logits
    if isinstance(batch, PairBatch):
        return model(batch.input_ids, batch.decoder_input_ids, attention_mask=batch.attention_mask).logits
    return model(batch.input_ids, positions=batch.positions, mask=batch.mask).logits


def teacher_of(model: nn.Module) -> Teacher:
    """Return a model as a teacher: frozen, in evaluation mode, without a graph."""
    model.eval().requires_grad_(False)

    @torch.no_grad()
    def teach(batch: Any) -> Tensor:
        return call_model(model, batch)

    return teach


class Distillation(Objective):
    """Learn from labels and a teacher; batches of token ids, texts, or pairs.

    Args:
        teacher: Gives logits for a batch; None: batches are `TaughtBatch`.
        config: How much from whom.
    """

    def __init__(self, teacher: Teacher | None, config: DistillConfig):
        self.teacher, self.config = teacher, config

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the sum over labelled positions of the divergence and the cross-entropy, each by its share."""
        c = self.config
        logits = call_model(model, batch).float()  # (..., V)
        trained = batch.labels != IGNORED
        student, labels = logits[trained], batch.labels[trained]  # (M, V), (M,)
        scaled = (student / c.temperature).log_softmax(-1)
        if self.teacher is not None:
            known = self.teacher(batch).float()
            if known.shape != logits.shape:
                raise ConfigError(
                    f"The teacher gives logits of shape {tuple(known.shape)}, the student {tuple(logits.shape)}; both "
                    "must speak one vocabulary. Take a teacher of the same tokenizer, or transplant the tokenizer."
                )
            taught = (known[trained] / c.temperature).log_softmax(-1)
        elif isinstance(batch, TaughtBatch):
            scaled, taught = with_rest(scaled, batch.top_ids[trained], batch.top_log_probs[trained].float())
        else:
            raise ConfigError(f"There is no teacher, and a {type(batch).__name__} brings none. Give one of the two.")
        total = c.teacher_fraction * c.temperature**2 * divergence(scaled, taught, c.direction).sum()
        if c.teacher_fraction < 1:
            total = total + (1 - c.teacher_fraction) * summed_cross_entropy(student, labels)
        return total


def with_rest(student: Tensor, top_ids: Tensor, top_log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as log-probabilities of K + 1 events: the teacher's K tokens, and any other one, (M, K + 1)."""
    ours = student.gather(-1, top_ids)  # (M, K)
    if top_ids.shape[-1] == student.shape[-1]:
        return ours, top_log_probs
    # Not below what half precision of the cache can tell from nothing.
    rest = [torch.log1p(-p.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6)) for p in (ours, top_log_probs)]
    return torch.cat([ours, rest[0]], -1), torch.cat([top_log_probs, rest[1]], -1)


def cache_teacher(
    teacher: Teacher, rows: Rows, file: Path, *, top_k: int = 32, temperature: float = 1.0, batch_size: int = 8
) -> None:
    """Write the teacher's most likely tokens of every row into one safetensors file.

    Raises:
        ConfigError: ``top_k`` is below 1 or above the vocabulary.
    """
    ids, log_probs = [], []
    for start in range(0, len(rows), batch_size):
        part = np.arange(start, min(start + batch_size, len(rows)))
        scaled = (teacher(make_batch(_pick(rows, part))).float() / temperature).log_softmax(-1)  # (B, T, V)
        if not 1 <= top_k <= scaled.shape[-1]:
            raise ConfigError(f"top_k is {top_k}; it must lie between 1 and the vocabulary of {scaled.shape[-1]}.")
        best, where = scaled.topk(top_k)
        ids.append(where.to(torch.int32).cpu())
        log_probs.append(best.to(torch.float16).cpu())
    write_tensors(file, {"top_ids": torch.cat(ids), "top_log_probs": torch.cat(log_probs)})


def taught_batches(rows: Rows, file: Path) -> Callable[[Sequence[int], int], TaughtBatch]:
    """Return what makes batches of rows with their cached teacher; it fits `data.examples.ExampleLoader`.

    Raises:
        DataError: The cache is of other rows.
    """
    kept = load_file(file)
    shape = tuple(kept["top_ids"].shape[:2])
    if shape != rows.input_ids.shape:
        raise DataError(
            f"{file} holds a teacher's logits for rows of shape {shape}; the rows have {rows.input_ids.shape}. Write "
            "the cache again for these rows."
        )

    def collate(numbers: Sequence[int], epoch: int) -> TaughtBatch:
        part = np.asarray(numbers)
        plain = make_batch(_pick(rows, part))
        top = torch.from_numpy(part)
        return TaughtBatch(**vars(plain), top_ids=kept["top_ids"][top].long(), top_log_probs=kept["top_log_probs"][top])

    return collate


def _pick(rows: Rows, numbers: np.ndarray) -> Rows:
    documents = None if rows.document_ids is None else rows.document_ids[numbers]
    return Rows(rows.input_ids[numbers], rows.labels[numbers], documents)
