"""Multi-head latent attention: keys and values are read from one short vector a token, shared by all heads.

A token is pressed into a latent of ``kv_rank`` numbers, from which each head's key and value are expanded. Position
enters beside it: a part of each query, and one key for all heads, is rotated. Values may be of another size than keys.
With a decode state the expanded keys and values are stored (N heads of Hk and Hv numbers), which every state and the
engine's pages take as they are. Not here: storing the latent itself and folding the expansion into the queries.

Source: DeepSeek-AI 2024, arXiv 2405.04434 (DeepSeek-V2), section 2.1 and appendix C.
B, T, D, N as everywhere; Hk = nope + rope numbers of a key, Hv of a value.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.nn.attention import attend
from modelwright.nn.norm import RMSNorm
from modelwright.nn.rope import Rope, rotate_interleaved

LATENT_EPS = 1e-6  # of the norms of the latents, whatever that of the other norms is


@dataclass(frozen=True)
class LatentShape:
    """Sizes of the heads and of what they are expanded from."""

    kv_rank: int = 512
    q_rank: int | None = None  # None: queries are made from the stream directly
    nope_dim: int = 128  # numbers of a query or key that are not rotated
    rope_dim: int = 64  # those that are
    value_dim: int = 128

    def __post_init__(self) -> None:
        for name in ("kv_rank", "q_rank", "nope_dim", "rope_dim", "value_dim"):
            value = getattr(self, name)
            if name == "q_rank" and value is None:
                continue
            if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if self.rope_dim % 2:
            raise ConfigError(f"rope_dim is {self.rope_dim}; rotary positions need an even number.")

    @property
    def key_dim(self) -> int:
        """Size of a query or key head."""
        return self.nope_dim + self.rope_dim


class LatentAttention(nn.Module):
    """Press, norm, expand, rotate, attend, project back."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        shape: LatentShape,
        *,
        layer_index: int = 0,
        scale: float | None = None,
        bias: bool = False,
    ):
        """Make the layer.

        Args:
            hidden_size: D.
            num_heads: N.
            shape: Of heads and latents.
            layer_index: Under which a decode state keeps what this layer stores.
            scale: Of the scores; None: 1 / sqrt(Hk).
            bias: On the projections from and to the stream, but for queries that have no latent.
        """
        super().__init__()
        self.shape, self.layer_index = shape, layer_index
        self.scale = shape.key_dim**-0.5 if scale is None else scale
        query_size = num_heads * shape.key_dim
        self.q: nn.Linear | None = None
        self.q_down: nn.Linear | None = None
        self.q_norm: RMSNorm | None = None
        self.q_up: nn.Linear | None = None
        if shape.q_rank is None:
            self.q = nn.Linear(hidden_size, query_size, bias=False)
        else:
            self.q_down = nn.Linear(hidden_size, shape.q_rank, bias=bias)
            self.q_norm = RMSNorm(shape.q_rank, LATENT_EPS)
            self.q_up = nn.Linear(shape.q_rank, query_size, bias=False)
        self.kv_down = nn.Linear(hidden_size, shape.kv_rank + shape.rope_dim, bias=bias)
        self.kv_norm = RMSNorm(shape.kv_rank, LATENT_EPS)
        self.kv_up = nn.Linear(shape.kv_rank, num_heads * (shape.nope_dim + shape.value_dim), bias=False)
        self.o = nn.Linear(num_heads * shape.value_dim, hidden_size, bias=bias)

    def forward(self, x: Tensor, rope: Rope, *, mask: Tensor | None = None, state: Any = None) -> Tensor:
        """Map (B, T, D) to (B, T, D), causally.

        Args:
            x: Input.
            rope: cos and sin for the positions of ``x``, of ``rope_dim`` numbers.
            mask: Boolean, True where attention is allowed, broadcast to (B, N, T, S). Not used with a state.
            state: A `DecodeState` that holds the past, or None.
        """
        s = self.shape
        q = self._queries(x).unflatten(-1, (-1, s.key_dim))  # (B, T, N, Hk)
        q_nope, q_rope = q.split((s.nope_dim, s.rope_dim), dim=-1)
        q = torch.cat((q_nope, rotate_interleaved(q_rope, rope)), dim=-1)
        latent, k_rope = self.kv_down(x).split((s.kv_rank, s.rope_dim), dim=-1)
        expanded = self.kv_up(self.kv_norm(latent)).unflatten(-1, (-1, s.nope_dim + s.value_dim))  # (B, T, N, ..)
        k_nope, v = expanded.split((s.nope_dim, s.value_dim), dim=-1)
        k_rope = rotate_interleaved(k_rope[:, :, None], rope).expand(-1, -1, k_nope.shape[2], -1)
        k = torch.cat((k_nope, k_rope), dim=-1)  # (B, T, N, Hk)
        if state is not None:
            out = state.attend(self.layer_index, q, k, v, self.scale)
        else:
            out = attend(q, k, v, scale=self.scale, mask=mask, is_causal=True)
        return self.o(out.flatten(2))

    def _queries(self, x: Tensor) -> Tensor:
        if self.q is not None:
            return self.q(x)
        assert self.q_down is not None and self.q_norm is not None and self.q_up is not None
        return self.q_up(self.q_norm(self.q_down(x)))
