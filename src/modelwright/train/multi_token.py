"""Multi-token prediction: at each position the next token, and by extra heads those after it.

    loss = sum_t [ CE(next token) + sum_k w_k CE(token k places later) ]        divided by the trained tokens

A later token counts where it is trained itself and belongs to the same document. With weight 0 the objective is plain
next-token prediction, which a test holds. Source: Gloeckle et al. 2024, arXiv:2404.19737, section 2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.data.load import Batch
from modelwright.data.pack import IGNORED
from modelwright.models.multi_token import MultiTokenDecoder
from modelwright.nn.cross_entropy import MAX_LOGITS, head_loss
from modelwright.train.objective import Objective, unwrap


class MultiTokenPrediction(Objective):
    """Predict several tokens at once; the model is a `MultiTokenDecoder`.

    Args:
        weights: Of each extra head's loss beside the first one's 1; as many as the model has heads.
        max_logits: How many logits may stand in memory at once.
    """

    def __init__(self, weights: Sequence[float], max_logits: int = MAX_LOGITS):
        if not weights or min(weights) < 0:
            raise ConfigError(f"multi_token weights are {tuple(weights)}; expected one of at least 0 for each head.")
        self.weights, self.max_logits = tuple(weights), max_logits

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the summed and weighted cross-entropy of all heads."""
        bare = unwrap(model)
        if not isinstance(bare, MultiTokenDecoder) or len(bare.heads) != len(self.weights):
            found = len(bare.heads) if isinstance(bare, MultiTokenDecoder) else 0
            raise ConfigError(
                f"{len(self.weights)} weights were given, but {type(bare).__name__} has {found} heads for later "
                "tokens. Wrap the decoder in MultiTokenDecoder with as many."
            )
        hidden = model(batch.input_ids, positions=batch.positions, mask=batch.mask, hidden_only=True).hidden
        total = head_loss(bare.lm_head, hidden, batch.labels, ignored=IGNORED, max_logits=self.max_logits)
        for k, (head, weight) in enumerate(zip(bare.heads, self.weights, strict=True), start=1):
            if weight:
                labels = later_labels(batch, k)
                loss = head_loss(bare.lm_head, head(hidden), labels, ignored=IGNORED, max_logits=self.max_logits)
                total = total + weight * loss
        return total


def later_labels(batch: Batch, distance: int) -> Tensor:
    """Return the labels ``distance`` positions later, (B, T); `IGNORED` beyond the row or the document.

    >>> later_labels(Batch(torch.zeros(1, 4), torch.tensor([[5, 6, 7, 8]])), 1).tolist()
    [[6, 7, 8, -100]]
    """
    labels = torch.full_like(batch.labels, IGNORED)
    labels[:, :-distance] = batch.labels[:, distance:]
    if batch.mask is not None:  # a later position that may look back at this one belongs to the same document
        same = batch.mask[:, 0].diagonal(-distance, dim1=1, dim2=2)  # (B, T - distance)
        labels[:, :-distance] = labels[:, :-distance].masked_fill(~same, IGNORED)
    return labels
