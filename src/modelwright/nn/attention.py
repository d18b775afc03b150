"""Scaled dot-product self-attention with grouped key/value heads.

One layer serves training, scoring and decoding: without a state it attends within the sequence it is given; with a
`DecodeState` it hands queries, keys and values over, and the state answers for the past.

Source: Vaswani et al. 2017, section 3.2; Ainslie et al. 2023, "GQA". Query heads n * N/K .. (n + 1) * N/K - 1 share
key/value head n. Not here: dropout, sliding windows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.nn.rope import Rope, rotate

# Longest rows for which training on a CPU keeps the attention weights instead of recomputing them.
MAX_PRODUCT_LEN = 512
BLOCK_LEN = 128  # queries at a time; a block skips the keys after it


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Attend from ``q`` (B, T, N, H) to ``k``, ``v`` (B, S, K, H); returns (B, T, N, H).

    Args:
        q: Queries.
        k: Keys; K divides N.
        v: Values.
        scale: Factor on the scores before the softmax.
        mask: Boolean, True where attention is allowed, broadcast to (B, 1, T, S).
        is_causal: Position t sees s <= t only. Together with ``mask``, both must allow.
    """
    is_trained = torch.is_grad_enabled() and q.requires_grad
    if is_causal and is_trained and q.device.type == "cpu" and q.shape[1] == k.shape[1] <= MAX_PRODUCT_LEN:
        return attend_products(q, k, v, scale=scale, mask=mask)
    if mask is not None and is_causal:
        mask = mask & causal_mask(q.shape[1], k.shape[1], q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # (B, N, T, H)
        k.transpose(1, 2),  # (B, K, S, H)
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal and mask is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)  # (B, T, N, H)


def attend_products(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attend causally by matrix products and a softmax, keeping the weights for the backward pass.

    A block of queries skips the keys that none of it may see. Memory grows with T x T; in exchange training short
    rows on a CPU is faster than by the fused kernel, whose backward pass is slow there. Forward and backward in
    bfloat16, 4,096 tokens, 2 heads of 128, T = 256, two cores, eager / compiled: 15.7 / 13.9 ms against 23.5 / 24.8;
    4 heads of 64, T = 512: 36 / 27 against 51 / 51; at T = 1,024 the fused kernel wins when eager.

    Scores pass through the dtype of ``v``, as in the eager attention of transformers; the softmax is float32.
    """
    batch, length, num_heads, size = q.shape
    num_kv_heads = k.shape[2]
    groups = num_heads // num_kv_heads
    # The heads of a group stand one after the other, so that keys and values need no repeating: (B, K, N/K, T, H).
    q = (q * scale).to(v.dtype).view(batch, length, num_kv_heads, groups, size).permute(0, 2, 3, 1, 4)
    k, v = (x.to(v.dtype).transpose(1, 2).reshape(-1, length, size) for x in (k, v))  # (B*K, T, H)
    allowed = causal_mask(length, length, q.device)
    if mask is not None:
        allowed = allowed & mask[..., None, :, :]  # (B, 1, 1, T, T)
    out = []
    for start in range(0, length, BLOCK_LEN):
        stop = min(start + BLOCK_LEN, length)
        rows = q[:, :, :, start:stop].reshape(batch * num_kv_heads, -1, size)  # (B*K, N/K * block, H)
        scores = (rows @ k[:, :stop].transpose(1, 2)).float().view(batch, num_kv_heads, groups, -1, stop)
        scores = scores.masked_fill(~allowed[..., start:stop, :stop], float("-inf"))
        weights = scores.softmax(-1).to(v.dtype).view(batch * num_kv_heads, -1, stop)
        out.append((weights @ v[:, :stop]).view(batch, num_kv_heads, groups, -1, size))
    joined = torch.cat(out, dim=3) if len(out) > 1 else out[0]  # (B, K, N/K, T, H)
    return joined.permute(0, 3, 1, 2, 4).reshape(batch, length, num_heads, size)


def attend_plain(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """Compute what `attend` computes in the open, float32 inside: the readable twin that tests compare with."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))  # (B, S, N, H)
    scores = torch.einsum("btnh,bsnh->bnts", q.float(), k.float()) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bnts,bsnh->btnh", scores.softmax(-1), v.float()).to(q.dtype)


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Return the (T, S) mask that is True where key s <= query t.

    >>> causal_mask(2, 2, torch.device("cpu")).tolist()
    [[True, False], [True, True]]
    """
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril()


def padding_mask(attention_mask: Tensor) -> Tensor:
    """Turn a published ``attention_mask`` (B, T), 1 for tokens and 0 for padding, into a mask (B, 1, T, T).

    Every position may see itself, so that a row of nothing but padding gives numbers and not NaN.
    """
    is_token = attention_mask.to(torch.bool)[:, None, None, :]  # (B, 1, 1, S)
    size = attention_mask.shape[1]
    return is_token | torch.eye(size, dtype=torch.bool, device=attention_mask.device)


class Attention(nn.Module):
    """Multi-head self-attention: project, rotate, attend, project back.

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
    ):
        super().__init__()
        self.head_dim, self.layer_index, self.scale = head_dim, layer_index, head_dim**-0.5
        self.q = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o = nn.Linear(num_heads * head_dim, hidden_size, bias=bias if output_bias is None else output_bias)

    def forward(
        self,
        x: Tensor,
        rope: Rope | None = None,
        *,
        mask: Tensor | None = None,
        is_causal: bool = True,
        state: Any = None,
    ) -> Tensor:
        """Map (B, T, D) to (B, T, D).

        Args:
            x: Input.
            rope: cos and sin for the positions of ``x``, from `RotaryTable`; None for no rotation.
            mask: Boolean, True where attention is allowed, broadcast to (B, 1, T, T). Not used with a state.
            is_causal: Position t sees s <= t only.
            state: A `DecodeState` that holds the past, or None.
        """
        batch, length, _ = x.shape
        q, k, v = (p(x).view(batch, length, -1, self.head_dim) for p in (self.q, self.k, self.v))  # (B, T, N or K, H)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if state is not None:
            out = state.attend(self.layer_index, q, k, v, self.scale)
        else:
            out = attend(q, k, v, scale=self.scale, mask=mask, is_causal=is_causal)
        return self.o(out.reshape(batch, length, -1))
