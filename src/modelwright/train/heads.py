"""Objectives of task heads: classes of texts, pairs and tokens, extractive answers, values, scores of passages.

    classes  cross-entropy of one label a text (or pair), or a token        divided by the labelled texts or tokens
    labels   several labels at once: binary cross-entropy of each           divided by texts
    values   squared error of one or more numbers a text, or a series       divided by texts
    spans    cross-entropy of the first and of the last token, their mean   divided by questions
    scores   cross-entropy of the right passage among those of a query      divided by queries

Sources: Devlin et al. 2019, arXiv:1810.04805, section 4; Nogueira and Cho 2019, arXiv:1901.04085 (scores of passages).
Not done: conditional random fields over tokens, ordinal labels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.base.errors import ConfigError
from modelwright.data.examples import GroupBatch, SeriesBatch, TextBatch
from modelwright.data.pack import IGNORED
from modelwright.train.masked import summed_cross_entropy
from modelwright.train.objective import Objective, unwrap


def _need_task(model: nn.Module, task: str) -> None:
    found = getattr(unwrap(model), "task", None)
    if found != task:
        raise ConfigError(
            f"{type(unwrap(model)).__name__} has a head for {found or 'nothing'}; expected {task}. Load the folder "
            f"with task={task!r}."
        )


class SequenceClassification(Objective):
    """One class a text or pair; labels (B,), `IGNORED` for a text without one.

    Args:
        class_weights: How much a text of each class counts, (C,); the sum is still divided by texts. None: the same.
        smoothing: Label smoothing.
    """

    def __init__(self, class_weights: Tensor | None = None, smoothing: float = 0.0):
        self.class_weights, self.smoothing = class_weights, smoothing

    def loss(self, model: nn.Module, batch: TextBatch) -> Tensor:  # type: ignore[override]
        """Return the summed cross-entropy."""
        _need_task(model, "sequence_classification")
        logits = model(batch.input_ids, **batch.inputs()).logits.float()  # (B, C)
        if self.class_weights is None:
            return summed_cross_entropy(logits, batch.labels, self.smoothing)
        each = F.cross_entropy(
            logits, batch.labels, ignore_index=IGNORED, reduction="none", label_smoothing=self.smoothing
        )
        weights = self.class_weights.to(logits.device)[batch.labels.clamp(min=0)]
        return (each * weights).sum()


class MultiLabelClassification(Objective):
    """Any number of classes a text; labels (B, C) of 0 and 1, float32. The loss of a text is the mean over classes."""

    def loss(self, model: nn.Module, batch: TextBatch) -> Tensor:  # type: ignore[override]
        """Return the summed binary cross-entropy."""
        _need_task(model, "sequence_classification")
        logits = model(batch.input_ids, **batch.inputs()).logits.float()  # (B, C)
        return F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none").mean(-1).sum()

    def count_trained(self, batch: TextBatch) -> int:  # type: ignore[override]
        """Count texts."""
        return len(batch.labels)


class TokenClassification(Objective):
    """One class a token; labels (B, T), `IGNORED` at special tokens and the later pieces of a word."""

    def loss(self, model: nn.Module, batch: TextBatch) -> Tensor:  # type: ignore[override]
        """Return the summed cross-entropy."""
        _need_task(model, "token_classification")
        return summed_cross_entropy(model(batch.input_ids, **batch.inputs()).logits, batch.labels)


class TextRegression(MultiLabelClassification):
    """One or more numbers a text; labels (B, C) float32. The loss of a text is the mean squared error over them."""

    def loss(self, model: nn.Module, batch: TextBatch) -> Tensor:  # type: ignore[override]
        """Return the summed squared error."""
        _need_task(model, "sequence_classification")
        logits = model(batch.input_ids, **batch.inputs()).logits.float()  # (B, C)
        return (logits - batch.labels).square().mean(-1).sum()


class SeriesRegression(Objective):
    """The value behind each window of a series; the error is taken in the window's own spread."""

    def loss(self, model: nn.Module, batch: SeriesBatch) -> Tensor:  # type: ignore[override]
        """Return the summed squared error in units of each window's variance."""
        spread = batch.inputs.std(1).clamp_min(1e-8)  # (B,)
        return ((model(batch.inputs) - batch.labels) / spread).square().sum()

    def count_trained(self, batch: SeriesBatch) -> int:  # type: ignore[override]
        """Count windows."""
        return len(batch.labels)

    def count_processed(self, batch: SeriesBatch) -> int:  # type: ignore[override]
        """Count the values that are read."""
        return batch.inputs.numel()


class AnswerSpans(Objective):
    """The first and the last token of an answer; labels (B, 2). A stretch without it has both at the first token."""

    def loss(self, model: nn.Module, batch: TextBatch) -> Tensor:  # type: ignore[override]
        """Return the summed mean of the two cross-entropies; padding cannot be chosen."""
        _need_task(model, "question_answering")
        out = model(batch.input_ids, **batch.inputs())
        padding = batch.attention_mask == 0
        total = torch.zeros((), device=batch.input_ids.device)
        for logits, labels in ((out.start_logits, batch.labels[:, 0]), (out.end_logits, batch.labels[:, 1])):
            total = total + summed_cross_entropy(logits.float().masked_fill(padding, float("-inf")), labels) / 2
        return total

    def count_trained(self, batch: TextBatch) -> int:  # type: ignore[override]
        """Count stretches."""
        return len(batch.labels)


class PassageRanking(Objective):
    """The right passage of each query among its candidates; `GroupBatch` holds pairs, the right one first (B, K, T).

    The model is a cross-encoder: a sequence classifier with one label, its logit the score.
    """

    def loss(self, model: nn.Module, batch: GroupBatch) -> Tensor:  # type: ignore[override]
        """Return the summed cross-entropy over each query's candidates."""
        _need_task(model, "sequence_classification")
        num, size, _ = batch.input_ids.shape
        types = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids.flatten(0, 1)}
        logits = model(batch.input_ids.flatten(0, 1), attention_mask=batch.attention_mask.flatten(0, 1), **types).logits
        if logits.shape[-1] != 1:
            raise ConfigError(
                f"The model has {logits.shape[-1]} labels; a reranker has one. Load it with num_labels=1."
            )
        scores = logits.float().view(num, size)
        return summed_cross_entropy(scores, torch.zeros(num, dtype=torch.int64, device=scores.device))

    def count_trained(self, batch: GroupBatch) -> int:  # type: ignore[override]
        """Count queries."""
        return len(batch.input_ids)
