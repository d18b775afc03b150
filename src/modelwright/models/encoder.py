"""What every encoder has in common: its output, how its config is read and written, what padding hides.

A family's file gives its config, its blocks and its tables of published names; `modelwright.models.heads` puts the
task heads on top. Encoders see both sides of a token, so there is no decode state here. Dropout is not here either.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modelwright.base.errors import ConfigError, RequestError

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "max_seq_len")


class EncoderOutput(NamedTuple):
    """What an encoder returns."""

    last_hidden_state: Tensor  # (B, T, D)
    pooled: Tensor | None  # (B, D), the first token through the pooler; None where the weights have no pooler


def check_sizes(config: Any) -> None:
    """Refuse sizes that are no counts or contradict each other.

    Raises:
        ConfigError: It names the field.
    """
    for name in SIZES:
        value = getattr(config, name)
        if not (isinstance(value, int) and value >= 1):
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1.")
    if config.hidden_size % config.num_heads:
        raise ConfigError(
            f"hidden_size is {config.hidden_size} and num_heads is {config.num_heads}; the heads must divide it evenly."
        )


def read_fields(values: Mapping[str, Any], names: Mapping[str, str], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Return our fields of a published config: those it gives; the others keep their defaults.

    Args:
        values: The published ``config.json``.
        names: Our field -> the published one.
        fixed: Published fields that must have this value where they are given.

    Raises:
        ConfigError: A fixed field has another value, which is not computed here.
    """
    for name, expected in fixed.items():
        if values.get(name, expected) != expected:
            raise ConfigError(f"{name} is {values[name]!r}; the encoder here computes {expected!r} only.")
    return {ours: values[theirs] for ours, theirs in names.items() if values.get(theirs) is not None}


def write_fields(config: Any, names: Mapping[str, str], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the published config: our fields under their published names, and the fixed ones."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {theirs: values[ours] for ours, theirs in names.items()} | dict(fixed)


def check_length(input_ids: Tensor, max_seq_len: int) -> None:
    """Refuse rows that are longer than the encoder's positions.

    Raises:
        RequestError: They are.
    """
    if input_ids.shape[1] > max_seq_len:
        raise RequestError(
            f"The input has {input_ids.shape[1]} tokens; this encoder reads at most {max_seq_len}. Shorten it.",
            code="context_length_exceeded",
        )


def token_mask(attention_mask: Tensor | None, mask: Tensor | None = None) -> Tensor | None:
    """Return what may be seen, boolean, broadcast to (B, N, T, S): tokens, narrowed by ``mask``; None: everything.

    A row of nothing but padding sees all of it, so that it gives numbers and not NaN.
    """
    if attention_mask is None:
        return mask
    is_token = attention_mask.to(torch.bool)
    seen = (is_token | ~is_token.any(-1, keepdim=True))[:, None, None]  # (B, 1, 1, S)
    return seen if mask is None else seen & mask
