"""Attention by torch's flex_attention: the rule is compiled into the kernel, and blocks it forbids are skipped.

On a GPU the call is compiled once a shape; on a CPU it is computed unfused and forward only, as a check of the rule
and not for speed.

Source: Dong et al. 2024, "FlexAttention", arXiv 2412.05496. Sinks are not here.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from modelwright.base.errors import ConfigError
from modelwright.nn.attention import NO_RULE, AttentionRule

_compiled: list[Any] = []  # filled on the first call on a GPU


def attend_flex(
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
    """Attend; arguments and result are those of `modelwright.nn.attention.attend`.

    Raises:
        ConfigError: Sinks, which flex_attention cannot put into its softmax; or gradients on a CPU.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ConfigError("The backend 'flex' has no backward pass on a CPU; use 'auto' or 'flash' for training there.")
    if rule.sinks is not None:
        raise ConfigError("The backend 'flex' has no sinks; use 'auto', 'plain' or 'flash'.")
    if not torch.is_grad_enabled():
        q, k, v = q.detach(), k.detach(), v.detach()  # the kernel asks for requires_grad, not for the mode
    batch, num_queries, num_heads, _ = q.shape
    num_keys, window = k.shape[1], rule.window
    dense = None if mask is None else mask.expand(batch, -1, num_queries, num_keys)
    added = None if bias is None else bias.expand(batch, -1, num_queries, num_keys)

    def allows(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        seen = s <= t if is_causal else s >= 0
        if window is not None:
            seen = seen & (t - s < window) & (s - t < window)
        if dense is not None:
            seen = seen & dense[b, h % dense.shape[1], t, s]
        return seen

    def score(value: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if added is not None:
            value = value + added[b, h % added.shape[1], t, s]
        if rule.softcap is not None:
            value = rule.softcap * torch.tanh(value / rule.softcap)
        return value

    is_open = not is_causal and window is None and dense is None
    heads = num_heads if dense is not None and dense.shape[1] > 1 else None
    blocks = None
    if not is_open:
        blocks = create_block_mask(allows, batch, heads, num_queries, num_keys, device=str(q.device))
    kernel = _kernel(q.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out = kernel(
            q.transpose(1, 2),  # (B, N, T, H)
            k.transpose(1, 2),
            v.transpose(1, 2),
            score_mod=score if added is not None or rule.softcap is not None else None,
            block_mask=blocks,
            scale=scale,
            enable_gqa=num_heads != k.shape[2],
        )
    return out.transpose(1, 2)  # (B, T, N, Hv)


def _kernel(device: torch.device) -> Any:
    if device.type == "cpu":
        return flex_attention
    if not _compiled:
        _compiled.append(torch.compile(flex_attention, dynamic=False))
    return _compiled[0]
