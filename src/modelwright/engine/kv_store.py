"""The memory of one layer's keys and values: in the dtype of the weights, or rounded to 8 or 4 bits.

A slot is one position; of each kv head it holds the key and the value side by side. Rounded slots are bytes: the codes
of the key, those of the value, then what turns codes back into numbers, one set for each token and head, so that a
slot depends on its own token alone and never on what is written later. 8 bits: symmetric, a scale each. 4 bits: two
codes a byte, a scale and a least value each. What is read is rounded, whether it was written in this step or long ago,
so that chunking, prefix hits and preemption change nothing.

Source: Liu et al. 2024, "KIVI", arXiv 2402.02750, section 3 (per-token rounding; the per-channel keys there need the
whole block at once, which a paged cache of growing requests does not have).
"""

from typing import Protocol

import torch
from torch import Tensor

from modelwright.base.errors import ConfigError
from modelwright.models.decoder import LayerCache

KV_DTYPES = ("int8", "int4")
SCALE = torch.float16  # 11 bits of precision in 2 bytes


class KVStore(Protocol):
    """Anything that keeps a layer's keys and values by slot."""

    pool: Tensor

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Keep ``k`` (T, K, Hk) and ``v`` (T, K, Hv) in the slots (T,)."""
        ...

    def read(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the keys and values of slots (U, S): (U, K, S, Hk) and (U, K, S, Hv)."""
        ...


class PlainStore:
    """Keys and values as they come."""

    def __init__(self, num_slots: int, cache: LayerCache, dtype: torch.dtype, device: torch.device):
        self.cache = cache
        shape = (num_slots, cache.num_kv_heads, cache.key_dim + cache.value_dim)
        # Not filled: slots are read only after they were written, and the system commits memory as it is touched.
        self.pool = torch.empty(shape, dtype=dtype, device=device)

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Keep ``k`` (T, K, Hk) and ``v`` (T, K, Hv) in the slots (T,)."""
        self.pool.index_copy_(0, slots, torch.cat((k, v), dim=-1))

    def read(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the keys and values of slots (U, S): (U, K, S, Hk) and (U, K, S, Hv)."""
        keys, values = _fetch(self.pool, slots).split((self.cache.key_dim, self.cache.value_dim), dim=-1)
        return keys, values


class RoundedStore:
    """Keys and values in 8 or 4 bits."""

    def __init__(self, num_slots: int, cache: LayerCache, kv_dtype: str, device: torch.device):
        self.cache, self.kv_dtype = cache, kv_dtype
        shape = (num_slots, cache.num_kv_heads, head_bytes(cache, kv_dtype))
        self.pool = torch.empty(shape, dtype=torch.uint8, device=device)

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Round ``k`` (T, K, Hk) and ``v`` (T, K, Hv) and keep them in the slots (T,)."""
        rounding = _round8 if self.kv_dtype == "int8" else _round4
        (k_codes, k_scales), (v_codes, v_scales) = rounding(k.float()), rounding(v.float())
        scales = torch.cat((k_scales, v_scales), dim=-1).to(SCALE).contiguous().view(torch.uint8)
        self.pool.index_copy_(0, slots, torch.cat((k_codes, v_codes, scales), dim=-1))

    def read(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the keys and values of slots (U, S): (U, K, S, Hk) and (U, K, S, Hv)."""
        per_byte = 1 if self.kv_dtype == "int8" else 2
        sizes = (self.cache.key_dim // per_byte, self.cache.value_dim // per_byte)
        rows = _fetch(self.pool, slots)  # (U, K, S, bytes)
        k_codes, v_codes, rest = rows.split((*sizes, rows.shape[-1] - sum(sizes)), dim=-1)
        k_scales, v_scales = rest.contiguous().view(SCALE).float().chunk(2, dim=-1)
        restore = _restore8 if self.kv_dtype == "int8" else _restore4
        return restore(k_codes, k_scales).to(dtype), restore(v_codes, v_scales).to(dtype)


def make_store(
    num_slots: int, cache: LayerCache, dtype: torch.dtype, device: torch.device, kv_dtype: str | None
) -> KVStore:
    """Return the memory of one layer.

    Raises:
        ConfigError: Its heads do not fill bytes.
    """
    if kv_dtype is None:
        return PlainStore(num_slots, cache, dtype, device)
    return RoundedStore(num_slots, cache, kv_dtype, device)


def head_bytes(cache: LayerCache, kv_dtype: str) -> int:
    """Return the bytes that one position takes of one kv head.

    >>> head_bytes(LayerCache(2, 64, 64), "int8"), head_bytes(LayerCache(2, 64, 64), "int4")
    (132, 72)
    """
    if kv_dtype == "int8":
        return cache.key_dim + cache.value_dim + 2 * SCALE.itemsize
    if cache.key_dim % 2 or cache.value_dim % 2:
        raise ConfigError(
            f"kv_dtype is 'int4' and this model's heads have {cache.key_dim} and {cache.value_dim} numbers; two "
            "of them share a byte, so they must be even. Use 'int8', or leave it out."
        )
    return (cache.key_dim + cache.value_dim) // 2 + 4 * SCALE.itemsize


def slot_bytes(cache: LayerCache, dtype: torch.dtype, kv_dtype: str | None) -> int:
    """Return the bytes that one position takes in a layer."""
    if kv_dtype is None:
        return cache.num_kv_heads * (cache.key_dim + cache.value_dim) * dtype.itemsize
    return cache.num_kv_heads * head_bytes(cache, kv_dtype)


def _fetch(pool: Tensor, slots: Tensor) -> Tensor:
    """Return (U, K, S, ...) of a pool (slots, K, ...)."""
    return pool.index_select(0, slots.flatten()).view(*slots.shape, *pool.shape[1:]).transpose(1, 2)


def _round8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes (..., H) as bytes and the scale (..., 1), already rounded to what is kept of it."""
    scale = _kept(x.abs().amax(-1, keepdim=True) / 127)
    codes = torch.where(scale > 0, x / scale, 0.0).round().clamp(-127, 127)
    return codes.to(torch.int8).view(torch.uint8), scale


def _restore8(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.view(torch.int8).float() * scale


def _round4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes, (..., H / 2) bytes, and the scale and the least value (..., 2)."""
    least = _kept(x.amin(-1, keepdim=True))
    scale = _kept((x.amax(-1, keepdim=True) - least) / 15)
    codes = torch.where(scale > 0, (x - least) / scale, 0.0).round().clamp(0, 15).to(torch.uint8)
    first, second = codes.chunk(2, dim=-1)
    return first | (second << 4), torch.cat((scale, least), dim=-1)


def _restore4(codes: Tensor, scales: Tensor) -> Tensor:
    scale, least = scales.chunk(2, dim=-1)
    return torch.cat((codes & 15, codes >> 4), dim=-1).float() * scale + least


def _kept(x: Tensor) -> Tensor:
    """Round to the numbers that are kept, so that codes are made with them; what is too large stays finite."""
    return x.clamp(-65504, 65504).to(SCALE).float()
