"""Context parallelism of the loop: which positions of a batch a rank computes, and which models allow it.

All of a decoder but its attention looks at one position at a time, so a rank that has some positions of each row needs
the others only there (`modelwright.nn.ring`). Positions are always given, so rotations and learned positions are those
of the whole row; in packed rows the mask keeps documents apart as ever.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.data.load import Batch
from modelwright.models.decoder import Decoder
from modelwright.nn.attention import Attention
from modelwright.nn.mlp import GatedMlp, Mlp
from modelwright.nn.ring import zigzag
from modelwright.nn.rope import RotaryTable

# Modules of a block that look at one position at a time.
POINTWISE = (GatedMlp, Mlp, nn.Linear, nn.LayerNorm, nn.Dropout)


def check_context(model: nn.Module) -> None:
    """Refuse models that look at other positions by anything but attention, or change with the length of the row.

    Raises:
        ConfigError: The model is one.
    """
    if not isinstance(model, Decoder):
        raise ConfigError(f"loop.parallel.context is above 1; {type(model).__name__} is no decoder. Use shard.")
    for name, module in model.named_modules():
        is_scaled = (
            isinstance(module, RotaryTable) and module.scaling is not None and module.scaling.is_length_dependent
        )
        has_sinks = isinstance(module, Attention) and module.sinks is not None
        if is_scaled or has_sinks:
            raise ConfigError(
                f"loop.parallel.context is above 1, and {name} is a {type(module).__name__} that cannot be cut: it has "
                "sinks, or rotations that depend on the length of the row. Use shard or tensor."
            )
    for name, block in model.layers.named_children():
        for inner, module in block.named_children():
            is_known = isinstance(module, (Attention, *POINTWISE)) or type(module).__name__.endswith("Norm")
            if not is_known and not hasattr(module, "base"):
                raise ConfigError(
                    f"loop.parallel.context is above 1, and layers.{name}.{inner} is a {type(module).__name__}, which "
                    "may look at other positions. Use shard or tensor."
                )


def cut_positions(batch: Any, rank: int, size: int) -> Any:
    """Return the positions of a batch that belong to a rank of the ring; the mask keeps the keys of the whole row.

    Raises:
        ConfigError: The batch is not one of token rows, or its rows cannot be cut.
    """
    if not isinstance(batch, Batch):
        raise ConfigError(f"loop.parallel.context is above 1; {type(batch).__name__} is no batch of token rows.")
    at = zigzag(batch.input_ids.shape[1], rank, size).to(batch.input_ids.device)
    positions: Tensor = at.expand(len(batch.input_ids), -1) if batch.positions is None else batch.positions[:, at]
    return replace(
        batch,
        input_ids=batch.input_ids[:, at],
        labels=batch.labels[:, at],
        positions=positions,
        mask=None if batch.mask is None else batch.mask[:, :, at],
    )
