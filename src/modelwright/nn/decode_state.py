"""What a model remembers between decoding steps: one protocol for every kind of layer.

An attention layer hands its state the new queries, keys and values and gets the attention's result back. A recurrent
layer (state-space, RWKV, LSTM) keeps its few tensors in `memory`, and cross-attention the keys and values of the
encoder's output. Where the past is kept, and how, is the state's own affair: `KVState` is the plain one, dense, for
sequences of equal length; the engine's paged cache is another and is tested against this one.
"""

from typing import Protocol

import torch
from torch import Tensor

from modelwright.base.errors import ConfigError, RequestError
from modelwright.nn.attention import NO_RULE, AttentionRule, attend


class DecodeState(Protocol):
    """Anything that keeps the past of every layer."""

    def attend(
        self,
        layer_index: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        *,
        bias: Tensor | None = None,
        rule: AttentionRule = NO_RULE,
    ) -> Tensor:
        """Store ``k``, ``v`` (B, T, K, H) and return the causal attention of ``q`` (B, T, N, H) over all so far."""
        ...

    def memory(self, layer_index: int) -> dict[str, Tensor]:
        """Return what a layer keeps for itself, to read and to change; empty before the first token."""
        ...

    def advance(self, num_tokens: int) -> None:
        """Note that all layers have seen ``num_tokens`` more; a model calls it at the end of a step."""
        ...


class KVState:
    """The past of B sequences of equal length. Memory is taken when a layer first stores something.

    A layer with a window keeps only the keys that a later token can still see.

    >>> state = KVState(batch_size=1, max_seq_len=8)
    >>> x = torch.ones(1, 3, 1, 2)
    >>> state.attend(0, x, x, x, scale=1.0).shape, state.lengths
    (torch.Size([1, 3, 1, 2]), {0: 3})
    """

    def __init__(self, *, batch_size: int, max_seq_len: int, dtype: torch.dtype | None = None):
        """Make an empty state.

        Args:
            batch_size: B.
            max_seq_len: Tokens a sequence may reach.
            dtype: Of stored keys and values; None: as they come.
        """
        if min(batch_size, max_seq_len) < 1:
            raise ConfigError(
                f"KVState was asked for {batch_size} sequences of {max_seq_len} positions; each must be at least 1."
            )
        self.batch_size, self.max_seq_len, self.dtype = batch_size, max_seq_len, dtype
        self.length = 0  # tokens that every layer has seen; `advance` moves it
        self.lengths: dict[int, int] = {}  # tokens that an attention layer has stored
        self._keys: dict[int, tuple[Tensor, Tensor]] = {}
        self._memory: dict[int, dict[str, Tensor]] = {}

    def positions(self, num_tokens: int, device: torch.device | None = None) -> Tensor:
        """Return the positions of the next ``num_tokens`` tokens, (B, T)."""
        return torch.arange(self.length, self.length + num_tokens, device=device).expand(self.batch_size, -1)

    def advance(self, num_tokens: int) -> None:
        """Note that all layers have seen ``num_tokens`` more; a model calls it at the end of a step.

        Raises:
            RequestError: The sequence is longer than this state holds.
        """
        self._check(self.length + num_tokens)
        self.length += num_tokens

    def memory(self, layer_index: int) -> dict[str, Tensor]:
        """Return what a layer keeps for itself, to read and to change; empty before the first token."""
        return self._memory.setdefault(layer_index, {})

    def select_rows(self, rows: Tensor) -> None:
        """Go on with these of the B sequences, in this order and as often as they are named: a beam search's step.

        Args:
            rows: (B,) indices of rows; the number of sequences stays what it was.

        Raises:
            RequestError: Another number of rows.
        """
        if rows.shape != (self.batch_size,):
            raise RequestError(
                f"select_rows was given indices of shape {tuple(rows.shape)}; this state holds {self.batch_size} "
                "sequences and keeps that number. Give one index a sequence."
            )
        self._keys = {i: (keys[rows], values[rows]) for i, (keys, values) in self._keys.items()}
        self._memory = {i: {name: x[rows] for name, x in kept.items()} for i, kept in self._memory.items()}

    def attend(
        self,
        layer_index: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        *,
        bias: Tensor | None = None,
        rule: AttentionRule = NO_RULE,
    ) -> Tensor:
        """Store ``k`` (B, T, K, H), ``v`` (B, T, K, Hv) and return the causal attention of ``q`` over all so far.

        ``bias`` is broadcast to (B, N, T, S) with S all positions up to the newest. Returns (B, T, N, Hv).
        """
        start = self.lengths.get(layer_index, 0)
        stop = start + q.shape[1]
        self._check(stop)
        keys, values = (self._store if rule.window is None else self._roll)(layer_index, k, v, rule.window)
        self.lengths[layer_index] = stop
        first = stop - keys.shape[1]  # the position of the first key at hand
        query_at = torch.arange(start, stop, device=q.device)[:, None]
        key_at = torch.arange(first, stop, device=q.device)
        mask = key_at <= query_at  # (T, S)
        if rule.window is not None:
            mask &= query_at - key_at < rule.window
        is_open = q.shape[1] == 1 and (rule.window is None or keys.shape[1] <= rule.window)
        if bias is not None:
            bias = bias[..., first:]
        rest = AttentionRule(None, rule.softcap, rule.sinks)
        keys, values = keys.to(q.dtype), values.to(q.dtype)
        return attend(q, keys, values, scale=scale, mask=None if is_open else mask[None, None], bias=bias, rule=rest)

    def _check(self, length: int) -> None:
        if length > self.max_seq_len:
            raise RequestError(
                f"The sequence reaches {length} tokens; this state holds {self.max_seq_len}. "
                "Make it with a larger max_seq_len or end the sequence earlier.",
                code="context_length_exceeded",
            )

    def _store(self, layer_index: int, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Write into arrays of ``max_seq_len`` positions; return the filled part."""
        if layer_index not in self._keys:
            dtype = self.dtype or k.dtype
            self._keys[layer_index] = (
                k.new_zeros(k.shape[0], self.max_seq_len, *k.shape[2:], dtype=dtype),  # (B, S, K, H)
                v.new_zeros(v.shape[0], self.max_seq_len, *v.shape[2:], dtype=dtype),
            )
        keys, values = self._keys[layer_index]
        start = self.lengths.get(layer_index, 0)
        stop = start + k.shape[1]
        keys[:, start:stop] = k
        values[:, start:stop] = v
        return keys[:, :stop], values[:, :stop]

    def _roll(self, layer_index: int, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Append to the last ``window`` - 1 positions; return these and the new ones."""
        assert window is not None
        k, v = k.to(self.dtype or k.dtype), v.to(self.dtype or v.dtype)
        if layer_index in self._keys:
            old_k, old_v = self._keys[layer_index]
            k, v = torch.cat((old_k, k), dim=1), torch.cat((old_v, v), dim=1)
        kept = max(0, k.shape[1] - (window - 1))
        self._keys[layer_index] = (k[:, kept:], v[:, kept:])
        return k, v
