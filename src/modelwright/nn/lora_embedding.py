"""A low-rank change beside a frozen embedding: for new words, scripts or domains.

    e(id) = E[id] + s A[:, id]^T B^T,   A (R, V) zero, B (D, R) random

Here A begins at zero, so that the rows of tokens which are never seen stay as they are.
Source: Hu et al. 2021, arXiv:2106.09685, and the reference code (loralib, Embedding).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.nn.adapters import AdapterLayer, check_rank


class LoraEmbedding(AdapterLayer):
    """A frozen ``nn.Embedding`` with a trainable low-rank change."""

    def __init__(self, base: nn.Embedding, rank: int, alpha: float, *, use_rslora: bool = False) -> None:
        super().__init__()
        check_rank(rank, base.num_embeddings, base.embedding_dim, "the embedding")
        self.base = base.requires_grad_(False)
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self.rank, self.alpha, self.use_rslora = rank, alpha, use_rslora
        self.scaling = alpha / math.sqrt(rank) if use_rslora else alpha / rank
        device = base.weight.device
        self.lora_a = nn.Parameter(torch.zeros(rank, base.num_embeddings, device=device))
        self.lora_b = nn.Parameter(torch.randn(base.embedding_dim, rank, device=device))

    @property
    def weight(self) -> Tensor:
        """The frozen table, for layers that are tied to it."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (B, T) to (B, T, D)."""
        e = self.base(ids)
        low = F.embedding(ids, self.lora_a.t()).to(e.dtype)  # (B, T, R)
        return e + F.linear(low * self.scaling, self.lora_b.to(e.dtype))

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return the embedding with the change added in float32."""
        table: Tensor = self.weight
        total = table.float() + self.scaling * (self.lora_b.float() @ self.lora_a.float()).t()
        table.copy_(total.to(table.dtype))
        return self.base
