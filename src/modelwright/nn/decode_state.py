"""What a model remembers between decoding steps, behind one method.

A layer that is given a state hands it the new queries, keys and values and gets the attention's result back; where
the past is kept, and how, is the state's own affair. `KVState` is the plain one: a dense array per layer. The
engine's paged cache is another, and is tested against this one.
"""

from typing import Protocol

import torch
from torch import Tensor

from modelwright.base.errors import ConfigError, RequestError
from modelwright.nn.attention import attend


class DecodeState(Protocol):
    """Anything that keeps the past keys and values of every layer."""

    def attend(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Store ``k``, ``v`` (B, T, K, H) and return the causal attention of ``q`` (B, T, N, H) over all so far."""
        ...


class KVState:
    """Keys and values of B sequences of equal length in one dense array per layer.

    Arguments: ``num_layers``; ``batch_size`` B; ``max_seq_len`` S; ``num_kv_heads`` K; ``head_dim`` H.

    >>> state = KVState(num_layers=1, batch_size=1, max_seq_len=8, num_kv_heads=1, head_dim=2)
    >>> x = torch.ones(1, 3, 1, 2)
    >>> state.attend(0, x, x, x, scale=1.0).shape, state.length
    (torch.Size([1, 3, 1, 2]), 3)
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        max_seq_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        if min(num_layers, batch_size, max_seq_len) < 1:
            raise ConfigError(
                f"KVState was asked for {num_layers} layers, {batch_size} sequences, {max_seq_len} positions; "
                "each must be at least 1."
            )
        shape = (num_layers, 2, batch_size, max_seq_len, num_kv_heads, head_dim)
        self.cache = torch.zeros(shape, dtype=dtype, device=device)  # (L, 2, B, S, K, H)
        self.lengths = [0] * num_layers

    @property
    def length(self) -> int:
        """Positions that every layer has stored."""
        return min(self.lengths)

    def positions(self, num_tokens: int) -> Tensor:
        """Return the positions of the next ``num_tokens`` tokens, (B, T)."""
        row = torch.arange(self.length, self.length + num_tokens, device=self.cache.device)
        return row.expand(self.cache.shape[2], -1)

    def attend(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Store ``k``, ``v`` (B, T, K, H) and return the causal attention of ``q`` (B, T, N, H) over all so far."""
        start = self.lengths[layer_index]
        stop = start + q.shape[1]
        if stop > self.cache.shape[3]:
            raise RequestError(
                f"The sequence reaches {stop} tokens; this state holds {self.cache.shape[3]}. "
                "Make it with a larger max_seq_len or end the sequence earlier.",
                code="context_length_exceeded",
            )
        keys, values = self.cache[layer_index]  # (B, S, K, H) each
        keys[:, start:stop] = k
        values[:, start:stop] = v
        self.lengths[layer_index] = stop
        mask = None
        if q.shape[1] > 1:  # query t stands at position start + t and sees positions up to its own
            mask = torch.ones(q.shape[1], stop, dtype=torch.bool, device=q.device).tril(start)  # (T, S)
        return attend(q, keys[:, :stop].to(q.dtype), values[:, :stop].to(q.dtype), scale=scale, mask=mask)
