"""Fewer key/value heads: a multi-head model becomes a grouped- or multi-query one, with a smaller cache.

Consecutive heads, which after the change are one head of a group of queries, are averaged. That costs quality, most of
which a short up-training on the original kind of data brings back (5 % of the pre-training in the paper):
``recipes/pretrain/uptrain.yaml``.

Source: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
arXiv 2305.13245, section 2.1 and figure 4 (mean above first head above random; at toy size mean and first are equal,
benchmarks/shared_heads.py).
Not done: orthogonal alignment of the heads before pooling.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.base.registry import lookup
from modelwright.compress import HEAD_POOLS
from modelwright.compress.surgery import dense_state, rebuild
from modelwright.nn.attention import Attention

M = TypeVar("M", bound=nn.Module)
Pool = Callable[[Tensor], Tensor]


def mean_of_heads(heads: Tensor) -> Tensor:
    """Average the heads of each group: (K, G, H, ...) to (K, H, ...)."""
    return heads.float().mean(1).to(heads.dtype)


def first_of_heads(heads: Tensor) -> Tensor:
    """Keep the first head of each group: (K, G, H, ...) to (K, H, ...)."""
    return heads[:, 0]


def share_heads(model: M, num_kv_heads: int, pool: str | Pool = "mean") -> M:
    """Return the model with ``num_kv_heads`` key/value heads; 1 makes it multi-query.

    Args:
        model: A decoder whose layers are `modelwright.nn.attention.Attention`.
        num_kv_heads: A divisor of the number it has.
        pool: How the heads of a group become one: a name in `HEAD_POOLS`, or a function (K, G, H, ...) -> (K, H, ...).

    Raises:
        ConfigError: The model has no such heads, or the number does not divide theirs.
    """
    state = dict(dense_state(model, "sharing heads"))
    config = model.config
    before = getattr(config, "num_kv_heads", None)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Attention)}
    if not isinstance(before, int) or not layers:
        raise ConfigError(f"A {type(model).__name__} has no key/value heads that could be shared.")
    if num_kv_heads < 1 or before % num_kv_heads:
        raise ConfigError(
            f"num_kv_heads is {num_kv_heads}; it must divide the model's {before} key/value heads. "
            f"Divisors: {', '.join(str(n) for n in range(1, before + 1) if before % n == 0)}."
        )
    take: Pool = lookup(HEAD_POOLS, pool, "pool") if isinstance(pool, str) else pool
    for name, layer in layers.items():
        if layer.k.out_features != before * layer.head_dim:
            raise ConfigError(f"{name} has other key/value heads than the config's {before}; this is not done.")
        for part in ("k", "v"):
            for leaf in ("weight", "bias"):
                tensor = state.get(f"{name}.{part}.{leaf}")
                if tensor is not None:
                    groups = tensor.view(num_kv_heads, before // num_kv_heads, layer.head_dim, *tensor.shape[1:])
                    state[f"{name}.{part}.{leaf}"] = take(groups).flatten(0, 1)  # (K * H, D)
    return rebuild(model, replace(config, num_kv_heads=num_kv_heads), state)  # type: ignore[type-var]
