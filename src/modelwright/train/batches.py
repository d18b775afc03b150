"""Look at a batch before it is used: what would train silently on nonsense, or die inside a kernel, is said here.

A batch is any frozen dataclass of tensors; those of whole numbers called ``input_ids`` and ``labels`` are token ids.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.errors import DataError
from modelwright.data.pack import IGNORED


def check_batch(model: nn.Module, batch: Any) -> None:
    """Refuse ids that are no tokens, labels out of range, rows beyond the context, and numbers that are not finite.

    Raises:
        DataError: With the value seen, what is allowed, and where it stands in the batch.
    """
    config = getattr(model, "config", None)
    vocab_size, longest = getattr(config, "vocab_size", None), getattr(config, "max_seq_len", None)
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if not isinstance(value, Tensor) or not value.numel():
            continue
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = (~torch.isfinite(value)).nonzero()[0].tolist()
            raise DataError(
                f"{field.name} of a batch holds {float(value[tuple(bad)])} at {bad}; training needs finite numbers. "
                "Clean or drop such rows."
            )
        if field.name == "input_ids" and not value.is_floating_point():
            _check_ids(value, "input_ids", vocab_size, None)
            if longest is not None and value.ndim == 2 and value.shape[1] > longest:
                raise DataError(
                    f"A row of the batch has {value.shape[1]} tokens, and the model reads at most {longest}. Lower "
                    "max_seq_len, cut the rows, or extend the model's context first."
                )
        if field.name == "labels" and not value.is_floating_point() and value.ndim == 2:
            _check_ids(value, "labels", vocab_size, IGNORED)


def _check_ids(ids: Tensor, name: str, vocab_size: int | None, allowed: int | None) -> None:
    lowest, highest = (int(value) for value in ids.aminmax())
    if vocab_size is None or (lowest >= 0 and highest < vocab_size):
        return
    wrong = (ids < 0) | (ids >= vocab_size)
    if allowed is not None:
        wrong &= ids != allowed
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        also = f", or {allowed} where no loss is taken" if allowed is not None else ""
        raise DataError(
            f"{name} holds {int(ids[row, column])} at row {row}, position {column}; the model knows 0 to "
            f"{vocab_size - 1}{also}. Encode the data with the tokenizer that belongs to the model."
        )
