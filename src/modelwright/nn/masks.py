"""Who may look at whom: masks that are joined with ``&``, ``|`` and ``~`` and made dense, or into blocks, at the end.

A `Mask` is a function of four indices, batch b, head h, query position q and key position k, in the form that
flex_attention takes, so one definition serves every backend: ``(causal() & packed(ids)).dense(T, T)`` is the boolean
(B, N, T, S) that `modelwright.nn.attention.attend` takes, ``.block_mask(T, T)`` the sparse form for flex_attention.

Source: Raffel et al. 2020, "T5", section 3.2.1 (prefix); Beltagy et al. 2020, "Longformer", section 3.1;
Zaheer et al. 2020, "BigBird", section 2. The random blocks of BigBird are drawn once a layer call from a seed, the same
for all heads; the published code draws them a head at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from modelwright.base.errors import ConfigError

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Mask:
    """A rule that says, for index tensors (b, h, q, k) that broadcast, where attention is allowed.

    >>> causal().dense(2, 2)[0, 0].int().tolist()
    [[1, 0], [1, 1]]
    """

    allows: MaskFunction
    batch_size: int = 1  # of what the rule was made from; 1: the same for every row
    num_heads: int = 1

    def __and__(self, other: "Mask") -> "Mask":
        return self._join(other, lambda b, h, q, k: self.allows(b, h, q, k) & other.allows(b, h, q, k))

    def __or__(self, other: "Mask") -> "Mask":
        return self._join(other, lambda b, h, q, k: self.allows(b, h, q, k) | other.allows(b, h, q, k))

    def __invert__(self) -> "Mask":
        return Mask(lambda b, h, q, k: ~self.allows(b, h, q, k), self.batch_size, self.num_heads)

    def dense(self, num_queries: int, num_keys: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the boolean mask (B, N, T, S), with B and N of 1 where all rows and heads are alike."""
        b = torch.arange(self.batch_size, device=device)[:, None, None, None]
        h = torch.arange(self.num_heads, device=device)[:, None, None]
        q = torch.arange(num_queries, device=device)[:, None]
        k = torch.arange(num_keys, device=device)
        shape = (self.batch_size, self.num_heads, num_queries, num_keys)
        return self.allows(b, h, q, k).expand(shape)

    def block_mask(self, num_queries: int, num_keys: int, device: torch.device | str = "cpu") -> Any:
        """Return the BlockMask for torch's flex_attention; blocks that nobody may look at are skipped there."""
        batch = self.batch_size if self.batch_size > 1 else None
        heads = self.num_heads if self.num_heads > 1 else None
        return create_block_mask(self.allows, batch, heads, num_queries, num_keys, device=str(device))

    def _join(self, other: "Mask", allows: MaskFunction) -> "Mask":
        sizes = {self.batch_size, other.batch_size} - {1}
        if len(sizes) > 1:
            raise ConfigError(
                f"Masks for {' and '.join(map(str, sorted(sizes)))} rows were joined; they must be equal."
            )
        return Mask(allows, max(self.batch_size, other.batch_size), max(self.num_heads, other.num_heads))


def full() -> Mask:
    """Everybody sees everybody."""
    return Mask(lambda b, h, q, k: (q >= 0) & (k >= 0))


def causal(offset: int = 0) -> Mask:
    """Query q sees key k <= q + ``offset``; the offset is the number of keys that came before the first query."""
    return Mask(lambda b, h, q, k: k <= q + offset)


def sliding(window: int) -> Mask:
    """Query q sees the keys with |q - k| < ``window``; joined with `causal` that is itself and window - 1 before.

    Raises:
        ConfigError: The window is below 1.
    """
    if window < 1:
        raise ConfigError(f"window is {window}; a position sees at least itself, so it must be at least 1.")
    return Mask(lambda b, h, q, k: ((q - k) < window) & ((k - q) < window))


def prefix(lengths: Tensor) -> Mask:
    """Everybody sees the first ``lengths`` (B,) positions of the row; join with ``| causal()`` for a prefix LM."""
    return Mask(lambda b, h, q, k: k < lengths[b], lengths.shape[0])


def padding(attention_mask: Tensor) -> Mask:
    """Tokens alone are seen: ``attention_mask`` (B, S) is 1 for tokens, 0 for padding.

    Every position also sees itself, so that a row of nothing but padding gives numbers and not NaN.
    """
    is_token = attention_mask.bool()
    return Mask(lambda b, h, q, k: is_token[b, k] | (q == k), attention_mask.shape[0])


def packed(document_ids: Tensor) -> Mask:
    """Positions of one document see each other: ``document_ids`` (B, T) holds a number a document."""
    return Mask(lambda b, h, q, k: document_ids[b, q] == document_ids[b, k], document_ids.shape[0])


def longformer(window: int, is_global: Tensor) -> Mask:
    """A window of ``window`` // 2 to each side, and global positions that see all and are seen by all.

    Args:
        window: Width of the window, even, as in the published configs.
        is_global: (B, T) boolean.
    """
    marked = is_global.bool()
    near = sliding(window // 2 + 1)
    return near | Mask(lambda b, h, q, k: marked[b, q] | marked[b, k], is_global.shape[0])


def bigbird(seq_len: int, block_size: int, num_random_blocks: int, *, seed: int = 0) -> Mask:
    """Blocks: the first and last see and are seen by all; others see themselves, their neighbours and random ones.

    Raises:
        ConfigError: The length is not a multiple of the block size, or there are too few blocks to draw from.
    """
    num_blocks = seq_len // block_size
    if seq_len % block_size or num_blocks < 5 + num_random_blocks:
        raise ConfigError(
            f"A row of {seq_len} in blocks of {block_size} with {num_random_blocks} random ones: the length must be a "
            f"multiple of the block and at least {5 + num_random_blocks} blocks. Use full attention for short rows."
        )
    at = torch.arange(num_blocks)
    seen = (at[:, None] - at).abs() <= 1
    is_end = (at == 0) | (at == num_blocks - 1)
    seen |= is_end | is_end[:, None]
    generator = torch.Generator().manual_seed(seed)
    for row in range(1, num_blocks - 1):
        free = (~seen[row]).nonzero().flatten()
        chosen = free[torch.randperm(len(free), generator=generator)[:num_random_blocks]]
        seen[row, chosen] = True

    def allows(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return seen.to(q.device)[q // block_size, k // block_size]

    return Mask(allows)
