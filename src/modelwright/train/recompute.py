"""Gradient checkpointing: forget activations in the forward pass and compute them again in the backward pass.

``layers`` keeps only the input of every ``every``-th block, and computes the block twice; ``selective`` keeps the
results of matrix products, which are dear to compute, and forgets the cheap rest. Blocks are the members of module
lists called ``layers``, as all model files name them.

Source: Chen et al. 2016, arXiv:1604.06174; Korthikanti et al. 2022, arXiv:2205.05198, section 5 (selective).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from modelwright.base.errors import ConfigError

WAYS = ("none", "layers", "selective")
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.linear.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


@dataclass(frozen=True)
class RecomputeConfig:
    """What is computed twice to save memory."""

    name: str = "none"  # none, layers or selective
    every: int = 1  # of how many blocks one is recomputed; 1: all

    def __post_init__(self) -> None:
        if self.name not in WAYS:
            raise ConfigError(f"loop.recompute.name is {self.name!r}; known: {', '.join(WAYS)}.")
        if self.every < 1 or (self.name == "none" and self.every != 1):
            raise ConfigError(
                f"loop.recompute.every is {self.every} with name {self.name!r}; it must be at least 1, and it has no "
                "effect with none."
            )


def apply_recompute(model: nn.Module, config: RecomputeConfig) -> int:
    """Make the blocks of a model forget their activations; return how many do.

    Raises:
        ConfigError: The model has no list of blocks called ``layers``.
    """
    if config.name == "none":
        return 0
    blocks = [
        block
        for name, layers in model.named_modules()
        if name.rpartition(".")[2] == "layers" and isinstance(layers, nn.ModuleList)
        for block in layers
    ]
    if not blocks:
        raise ConfigError(
            f"loop.recompute.name is {config.name!r}, but {type(model).__name__} has no list of blocks called layers. "
            "Set it to none."
        )
    chosen = blocks[:: config.every]
    for block in chosen:
        if not hasattr(block, "plain_forward"):
            block.plain_forward = block.forward  # type: ignore[assignment]
        block.forward = _forgetful(block.plain_forward, config.name)  # type: ignore[assignment,arg-type]
    return len(chosen)


def _forgetful(forward: Callable[..., Any], name: str) -> Callable[..., Any]:
    contexts: dict[str, Any] = {}
    if name == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)

    return run


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
