"""Scaled dot-product attention, self and cross, with grouped key/value heads.

`attend` is the one door: every model's attention goes through it, so a backend chosen by `use_backend`, and the maps
that `record_attention` collects, hold for all of them. `Attention` is the layer: without a state it attends within the
sequence it is given; with a `DecodeState` it hands queries, keys and values over, and the state answers for the past.

Source: Vaswani et al. 2017, section 3.2; Ainslie et al. 2023, "GQA" (query heads n * N/K .. (n + 1) * N/K - 1 share
key/value head n); Riviere et al. 2024, "Gemma 2" (soft-capped scores); Henry et al. 2020 (QK-norm); OpenAI 2025,
"gpt-oss" (sinks). Not here: dropout.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.base.registry import lookup
from modelwright.nn import ATTENTION_BACKENDS
from modelwright.nn.rope import Rope, rotate

# Longest rows for which training on a CPU keeps the attention weights instead of recomputing them.
MAX_PRODUCT_LEN = 512
BLOCK_LEN = 128  # queries at a time; a block skips the keys after it
# From this many scores a head on, what the fused kernel of torch cannot do goes to the tiled one instead of the plain.
MAX_PLAIN_SCORES = 2048 * 2048


@dataclass(frozen=True)
class AttentionRule:
    """What a family changes about plain attention."""

    window: int | None = None  # key s is seen by query t only if t - s < window; None: any distance
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap); None: as they are
    sinks: Tensor | None = None  # (N,) a score per head that takes part in the softmax and has no value


NO_RULE = AttentionRule()


class AttentionBackend(Protocol):
    """One way of computing `attend`; the table is `modelwright.nn.ATTENTION_BACKENDS`."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        mask: Tensor | None = None,
        is_causal: bool = False,
        bias: Tensor | None = None,
        rule: AttentionRule = NO_RULE,
    ) -> Tensor:
        """Attend; arguments and result are those of `attend`."""
        ...


_chosen = ["auto"]  # the innermost use_backend last; a plain list, because torch.compile can read one
_recorded: ContextVar[list[Tensor] | None] = ContextVar("recorded_attention", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute all attention inside the ``with`` by one backend: auto, plain, sdpa, products, flash or flex.

    The choice holds for every thread of the process.

    Raises:
        ConfigError: No backend has this name.
    """
    if name not in ATTENTION_BACKENDS and name != "auto":
        raise ConfigError(f"attention backend is {name!r}; known: auto, {', '.join(sorted(ATTENTION_BACKENDS))}.")
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


@contextmanager
def record_attention() -> Iterator[list[Tensor]]:
    """Collect the attention weights (B, N, T, S) of every call inside the ``with``, in the order of the calls.

    For a decoder or encoder that is one map a layer; a decoder with cross-attention gives two a layer, self before
    cross. The plain backend computes them, so this is for looking, not for speed. A compiled model shows nothing.
    """
    maps: list[Tensor] = []
    token = _recorded.set(maps)
    try:
        yield maps
    finally:
        _recorded.reset(token)


def is_recording() -> bool:
    """Tell whether attention weights are being collected: what is computed in pieces is then computed whole."""
    return not torch.compiler.is_compiling() and _recorded.get() is not None


def record_weights(weights: Tensor) -> None:
    """Add attention weights (B, N, T, S) that were not computed by `attend` to what is being recorded, if anything."""
    maps = None if torch.compiler.is_compiling() else _recorded.get()
    if maps is not None:
        maps.append(weights.detach())


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    bias: Tensor | None = None,
    rule: AttentionRule = NO_RULE,
) -> Tensor:
    """Attend from ``q`` (B, T, N, H) to ``k`` (B, S, K, H), ``v`` (B, S, K, Hv); returns (B, T, N, Hv).

    Args:
        q: Queries.
        k: Keys; K divides N.
        v: Values; their heads may be of another size.
        scale: Factor on the scores before the softmax.
        mask: Boolean, True where attention is allowed, broadcast to (B, N, T, S).
        is_causal: Position t sees s <= t only. Together with ``mask``, both must allow.
        bias: Added to the scores after ``scale``, broadcast to (B, N, T, S).
        rule: Window, soft-cap and sinks. A window counts positions by their index, so it needs T = S; a
            `DecodeState` turns it into a mask.
    """
    maps = None if torch.compiler.is_compiling() else _recorded.get()
    if maps is not None:
        weights = attention_weights(q, k, scale=scale, mask=_visible(q, k, mask, is_causal, rule), bias=bias, rule=rule)
        maps.append(weights.detach())
        return _weigh(weights, v).to(q.dtype)
    name = _chosen[-1]
    backend: AttentionBackend = _choose(q, k, is_causal, bias, rule) if name == "auto" else _named(name)
    return backend(q, k, v, scale=scale, mask=mask, is_causal=is_causal, bias=bias, rule=rule)


def _named(name: str) -> AttentionBackend:
    return lookup(ATTENTION_BACKENDS, name, "attention backend")


def _choose(q: Tensor, k: Tensor, is_causal: bool, bias: Tensor | None, rule: AttentionRule) -> AttentionBackend:
    if rule.softcap is not None or rule.sinks is not None:
        return _named("flash") if q.shape[1] * k.shape[1] > MAX_PLAIN_SCORES else attend_plain
    is_trained = torch.is_grad_enabled() and q.requires_grad
    is_short = q.shape[1] == k.shape[1] <= MAX_PRODUCT_LEN
    if is_causal and is_trained and is_short and bias is None and q.device.type == "cpu":
        return attend_products
    return attend_sdpa


def attend_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    bias: Tensor | None = None,
    rule: AttentionRule = NO_RULE,
) -> Tensor:
    """Attend by the fused kernel of torch.

    Raises:
        ConfigError: Soft-capped scores or sinks, which the kernel does not have.
    """
    if rule.softcap is not None or rule.sinks is not None:
        raise ConfigError("The backend 'sdpa' has no soft-cap and no sinks; use 'auto', 'plain' or 'flash'.")
    is_plain_causal = is_causal and mask is None and bias is None and not _is_narrowed(k, rule)
    if not is_plain_causal:
        mask = _visible(q, k, mask, is_causal, rule)
        if bias is not None:
            bias = bias.to(q.dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # (B, N, T, H)
        k.transpose(1, 2),  # (B, K, S, H)
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_plain_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)  # (B, T, N, Hv)


def attend_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = True,
    bias: Tensor | None = None,
    rule: AttentionRule = NO_RULE,
) -> Tensor:
    """Attend causally by matrix products and a softmax, keeping the weights for the backward pass.

    A block of queries skips the keys that none of it may see. Memory grows with T x T; in exchange training short
    rows on a CPU is faster than by the fused kernel, whose backward pass is slow there. Forward and backward in
    bfloat16, 4,096 tokens, 2 heads of 128, T = 256, two cores, eager / compiled: 15.7 / 13.9 ms against 23.5 / 24.8;
    4 heads of 64, T = 512: 36 / 27 against 51 / 51; at T = 1,024 the fused kernel wins when eager.

    Scores pass through the dtype of ``v``, as in the eager attention of transformers; the softmax is float32.

    Raises:
        ConfigError: Attention that is not causal self-attention, or that has a bias, a soft-cap or sinks.
    """
    if not is_causal or q.shape[1] != k.shape[1] or bias is not None or rule.softcap or rule.sinks is not None:
        raise ConfigError("The backend 'products' computes plain causal self-attention only; use 'auto' or 'plain'.")
    batch, length, num_heads, size = q.shape
    num_kv_heads = k.shape[2]
    groups = num_heads // num_kv_heads
    # The heads of a group stand one after the other, so that keys and values need no repeating: (B, K, N/K, T, H).
    q = (q * scale).to(v.dtype).view(batch, length, num_kv_heads, groups, size).permute(0, 2, 3, 1, 4)
    k = k.to(v.dtype).transpose(1, 2).reshape(-1, length, size)  # (B*K, T, H)
    v = v.transpose(1, 2).reshape(-1, length, v.shape[-1])  # (B*K, T, Hv)
    allowed = causal_mask(length, length, q.device, rule.window)
    if mask is not None:
        # One mask for all heads, or one a head that is split into groups as the heads are.
        allowed = allowed & (mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (num_kv_heads, groups)))
    out = []
    for start in range(0, length, BLOCK_LEN):
        stop = min(start + BLOCK_LEN, length)
        rows = q[:, :, :, start:stop].reshape(batch * num_kv_heads, -1, size)  # (B*K, N/K * block, H)
        scores = (rows @ k[:, :stop].transpose(1, 2)).float().view(batch, num_kv_heads, groups, -1, stop)
        scores = scores.masked_fill(~allowed[..., start:stop, :stop], float("-inf"))
        weights = scores.softmax(-1).to(v.dtype).view(batch * num_kv_heads, -1, stop)
        out.append((weights @ v[:, :stop]).view(batch, num_kv_heads, groups, -1, v.shape[-1]))
    joined = torch.cat(out, dim=3) if len(out) > 1 else out[0]  # (B, K, N/K, T, Hv)
    return joined.permute(0, 3, 1, 2, 4).reshape(batch, length, num_heads, v.shape[-1])


def attend_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    bias: Tensor | None = None,
    rule: AttentionRule = NO_RULE,
) -> Tensor:
    """Compute what `attend` computes in the open, float32 inside: the readable twin that tests compare with."""
    visible = _visible(q, k, mask, is_causal, rule)
    return _weigh(attention_weights(q, k, scale=scale, mask=visible, bias=bias, rule=rule), v).to(q.dtype)


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    rule: AttentionRule = NO_RULE,
) -> Tensor:
    """Return the weights (B, N, T, S), float32; ``mask`` is the whole of what may be seen."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)  # (B, S, N, H)
    scores = torch.einsum("btnh,bsnh->bnts", q.float(), k.float()) * scale
    if bias is not None:
        scores = scores + bias
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if rule.sinks is None:
        return scores.softmax(-1)
    sinks = rule.sinks.float()[:, None, None].expand(*scores.shape[:3], 1)  # (B, N, T, 1)
    return torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]


def _weigh(weights: Tensor, v: Tensor) -> Tensor:
    v = v.repeat_interleave(weights.shape[1] // v.shape[2], dim=2)  # (B, S, N, Hv)
    return torch.einsum("bnts,bsnh->btnh", weights, v.float())


def _is_narrowed(k: Tensor, rule: AttentionRule) -> bool:
    return rule.window is not None and rule.window < k.shape[1]


def _visible(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, rule: AttentionRule) -> Tensor | None:
    """Join the mask, causality and the window: boolean, broadcast to (B, N, T, S), or None for everything."""
    if not is_causal and not _is_narrowed(k, rule):
        return mask
    shape = causal_mask(q.shape[1], k.shape[1], q.device, rule.window, is_causal)
    return shape if mask is None else mask & shape


def causal_mask(
    num_queries: int, num_keys: int, device: torch.device, window: int | None = None, is_causal: bool = True
) -> Tensor:
    """Return the (T, S) mask that is True where key s <= query t, and t - s < ``window`` if there is one.

    Without ``is_causal`` the window reaches to both sides.

    >>> causal_mask(2, 2, torch.device("cpu")).tolist()
    [[True, False], [True, True]]
    """
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    seen = ones.tril() if is_causal else ones
    if window is not None:
        seen = seen.triu(1 - window)
        if not is_causal:
            seen = seen.tril(window - 1)
    return seen


def padding_mask(attention_mask: Tensor) -> Tensor:
    """Turn a published ``attention_mask`` (B, T), 1 for tokens and 0 for padding, into a mask (B, 1, T, T).

    Every position may see itself, so that a row of nothing but padding gives numbers and not NaN.
    """
    is_token = attention_mask.to(torch.bool)[:, None, None, :]  # (B, 1, 1, S)
    size = attention_mask.shape[1]
    return is_token | torch.eye(size, dtype=torch.bool, device=attention_mask.device)


@dataclass(frozen=True)
class AttentionOptions:
    """How a family's attention layer departs from the plain one."""

    scale: float | None = None  # None: 1 / sqrt(head_dim)
    window: int | None = None  # None: every distance
    softcap: float | None = None  # None: off
    has_sinks: bool = False
    qk_norm: Callable[[int], nn.Module] | None = None  # makes the norm of each query and key head; None: no norm
    context_size: int | None = None  # width of what cross-attention looks at; None: self-attention


class Attention(nn.Module):
    """Multi-head attention: project, norm, rotate, attend, project back.

    ``bias`` is that of q, k and v; ``output_bias`` that of o and is the same unless given.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        layer_index: int = 0,
        bias: bool = False,
        output_bias: bool | None = None,
        options: AttentionOptions = AttentionOptions(),
    ):
        super().__init__()
        self.head_dim, self.layer_index, self.options = head_dim, layer_index, options
        self.scale = head_dim**-0.5 if options.scale is None else options.scale
        context_size = hidden_size if options.context_size is None else options.context_size
        self.q = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k = nn.Linear(context_size, num_kv_heads * head_dim, bias=bias)
        self.v = nn.Linear(context_size, num_kv_heads * head_dim, bias=bias)
        self.o = nn.Linear(num_heads * head_dim, hidden_size, bias=bias if output_bias is None else output_bias)
        self.q_norm = options.qk_norm(head_dim) if options.qk_norm is not None else None
        self.k_norm = options.qk_norm(head_dim) if options.qk_norm is not None else None
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if options.has_sinks else None
        # Trained keys and values before the text (`modelwright.nn.virtual_tokens`): a call that the model sets, not a
        # part of this layer.
        self.extend: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def rule(self) -> AttentionRule:
        """Window, soft-cap and sinks, as `attend` takes them."""
        if self.options.window is None and self.options.softcap is None and self.sinks is None:
            return NO_RULE
        return AttentionRule(self.options.window, self.options.softcap, self.sinks)

    def forward(
        self,
        x: Tensor,
        rope: Rope | None = None,
        *,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool = True,
        bias: Tensor | None = None,
        state: Any = None,
    ) -> Tensor:
        """Map (B, T, D) to (B, T, D).

        Args:
            x: Input.
            rope: cos and sin for the positions of ``x``, from `RotaryTable`; None for no rotation.
            context: (B, S, C) what cross-attention looks at. With a state it is needed once: its keys and values
                are remembered.
            mask: Boolean, True where attention is allowed, broadcast to (B, N, T, S). In self-attention not used
                with a state, which knows what may be seen.
            is_causal: Position t sees s <= t only; self-attention.
            bias: Added to the scores, broadcast to (B, N, T, S).
            state: A `DecodeState` that holds the past, or None.
        """
        q = self._heads(self.q(x))  # (B, T, N, H)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.options.context_size is not None:
            k, v = self._cross_keys(context, state)
            out = attend(q, k, v, scale=self.scale, mask=mask, bias=bias, rule=self.rule)
            return self.o(out.flatten(2))
        k, v = self._keys(x)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if state is not None:
            out = state.attend(self.layer_index, q, k, v, self.scale, bias=bias, rule=self.rule)
        elif self.extend is not None:
            k, v, mask = self.extend(self.layer_index, k, v, mask, is_causal)
            out = attend(q, k, v, scale=self.scale, mask=mask, rule=self.rule)
        else:
            out = attend(q, k, v, scale=self.scale, mask=mask, is_causal=is_causal, bias=bias, rule=self.rule)
        return self.o(out.flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim)

    def _keys(self, source: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._heads(self.k(source)), self._heads(self.v(source))  # (B, S, K, H)
        return (k if self.k_norm is None else self.k_norm(k)), v

    def _cross_keys(self, context: Tensor | None, state: Any) -> tuple[Tensor, Tensor]:
        memory = {} if state is None else state.memory(self.layer_index)
        if "cross_k" not in memory:
            if context is None:
                raise ConfigError("Cross-attention was given no context; pass the encoder's output at the first step.")
            memory["cross_k"], memory["cross_v"] = self._keys(context)
        return memory["cross_k"], memory["cross_v"]
