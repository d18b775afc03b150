"""Dropout for a while: hooks on a model whose files have none, active in training alone and removed afterwards.

It falls where BERT has it but for the attention weights: on the embedding, and on what each block's attention and
feed-forward add to the stream. Source: Srivastava et al. 2014; Devlin et al. 2019, appendix A.2 (0.1 everywhere).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.base.errors import ConfigError
from modelwright.nn.attention import Attention

FEED_FORWARD_OUTPUTS = ("mlp.down", "down")


@contextmanager
def dropout(model: nn.Module, rate: float) -> Iterator[int]:
    """Drop numbers with probability ``rate`` while the model is in training mode; yield at how many places.

    Raises:
        ConfigError: The rate is not from 0 to below 1, or the model has no place known here.
    """
    if not 0 <= rate < 1:
        raise ConfigError(f"dropout is {rate}; it must be at least 0 and below 1.")
    places: list[nn.Module] = []
    if rate:
        for name, module in model.named_modules():
            is_embedding = name.endswith("embed_norm") or (name.endswith("embed") and not _has_norm(model, name))
            if isinstance(module, Attention):
                places.append(module.o)
            elif name.endswith(FEED_FORWARD_OUTPUTS) or is_embedding:
                places.append(module)
        if len(places) < 3:
            raise ConfigError(f"{type(model).__name__} has no blocks in which dropout is known here. Set dropout to 0.")

    def drop(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return F.dropout(output, rate, training=module.training)

    handles = [module.register_forward_hook(drop) for module in places]
    try:
        yield len(places)
    finally:
        for handle in handles:
            handle.remove()


def _has_norm(model: nn.Module, name: str) -> bool:
    """Whether an embedding is followed by a norm of its own, which is then the place."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return hasattr(parent, "embed_norm")
