"""Objectives on texts with holes: hidden tokens of an encoder, the targets of an encoder-decoder, a prefix seen whole.

All are sums of cross-entropies over labelled positions; `Objective.step` divides by their number over the whole batch.
Sources: Devlin et al. 2019, arXiv:1810.04805; Raffel et al. 2019, arXiv:1910.10683; Dong et al. 2019, arXiv:1905.03197.
Not done: next-sentence prediction (Liu et al. 2019 drop it), ELECTRA's discriminator.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.base.errors import ConfigError
from modelwright.data.examples import PairBatch, TextBatch
from modelwright.data.load import Batch
from modelwright.data.pack import IGNORED
from modelwright.models.decoder import Decoder
from modelwright.nn.attention import Attention
from modelwright.train.objective import CausalLanguageModeling, Objective, unwrap


def summed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy (..., V) to labels (...) summed over those that are not ignored, in float32."""
    return F.cross_entropy(
        logits.float().flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=smoothing,
    )


class MaskedLanguageModeling(Objective):
    """Predict the hidden tokens of a text from all others; batches are `TextBatch` with labels (B, T)."""

    def loss(self, model: nn.Module, batch: TextBatch) -> Tensor:  # type: ignore[override]
        """Return the summed cross-entropy; logits of positions without a label are not kept."""
        if getattr(unwrap(model), "task", None) != "masked_lm":
            raise ConfigError(
                f"A {type(unwrap(model)).__name__} predicts no masked tokens. Load it with task='masked_lm'."
            )
        logits = model(batch.input_ids, **batch.inputs()).logits  # (B, T, V)
        if torch.compiler.is_compiling():
            return summed_cross_entropy(logits, batch.labels)
        hidden = batch.labels != IGNORED
        return summed_cross_entropy(logits[hidden], batch.labels[hidden])


class Writing(Objective):
    """Write the target of an encoder-decoder: span corruption, UL2, summaries, translations.

    Args:
        smoothing: Label smoothing (Szegedy et al. 2016, arXiv:1512.00567), from 0 to below 1.
    """

    def __init__(self, smoothing: float = 0.0):
        if not 0 <= smoothing < 1:
            raise ConfigError(f"label_smoothing is {smoothing}; it must be at least 0 and below 1.")
        self.smoothing = smoothing

    def loss(self, model: nn.Module, batch: PairBatch) -> Tensor:  # type: ignore[override]
        """Return the summed cross-entropy of the labels."""
        out = model(batch.input_ids, batch.decoder_input_ids, attention_mask=batch.attention_mask)
        return summed_cross_entropy(out.logits, batch.labels, self.smoothing)

    def count_processed(self, batch: PairBatch) -> int:  # type: ignore[override]
        """Count the positions of both halves."""
        return batch.input_ids.numel() + batch.labels.numel()


class PrefixLanguageModeling(CausalLanguageModeling):
    """Predict what follows a prefix that is read from both sides; batches come from `data.infill.prefix_batch`."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the summed cross-entropy behind the prefixes; the batch's mask says all that may be seen."""
        if batch.mask is None:
            raise ConfigError("The batch has no mask, so no prefix could be seen from both sides. Use prefix_batch.")
        with see_as_masked(unwrap(model)):
            return super().loss(model, batch)


@contextmanager
def see_as_masked(model: nn.Module) -> Iterator[None]:
    """Let a causal decoder's attention see what the mask allows, ahead too, and not the past alone.

    Raises:
        ConfigError: The model has layers that can only look back (recurrent, convolutions), or is no decoder.
    """
    found = [module for module in model.modules() if isinstance(module, Attention)]
    num_layers = len(model.layers) if isinstance(model, Decoder) else 0
    if not num_layers or len(found) != num_layers:
        raise ConfigError(
            f"{type(model).__name__} has {len(found)} layers of attention of {num_layers}; a prefix is read from both "
            "sides by decoders of attention alone. Use one of the Llama family."
        )

    def look_ahead(module: nn.Module, inputs: Any, named: dict[str, Any]) -> Any:
        return inputs, {**named, "is_causal": False}

    handles = [module.register_forward_pre_hook(look_ahead, with_kwargs=True) for module in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
