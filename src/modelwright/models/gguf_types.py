"""The number formats of GGUF tensors: blocks of few-bit numbers to floats, and floats to blocks.

A block is a short stretch of one row with its own scale; the K formats split 256 numbers into smaller stretches whose
scales are themselves 6- or 8-bit numbers times one half-precision scale. Each format is one function from the blocks'
bytes (n, block_bytes) to float32 (n, block_len), vectorised in NumPy and applied to a few megabytes at a time, so
that unpacking costs little beside the result. Scales are kept in half precision, products in float32, in the order
of the reference, so results are equal bit for bit.

Source: ggml, ggml-quants.c (``dequantize_row_*`` and ``quantize_row_*_ref``).
Not done: Q2_K, Q3_K, the IQ and TQ formats; writing of Q5_0 and Q5_1.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from modelwright.base.errors import CheckpointError
from modelwright.base.gguf_file import BLOCK_TYPES, TYPE_NUMBERS, tensor_bytes
from modelwright.models.gguf_superblocks import to_q4_k, to_q5_k, to_q6_k

_PIECE_NUMBERS = 1 << 20  # unpacked or packed at once
PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_NIBBLES = np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """Read the half-precision number at byte ``at`` of every block: (n, 1) float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _signed(blocks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(blocks).view(np.int8)


def _nibbles(packed: np.ndarray, stretch: int) -> np.ndarray:
    """Unpack 4-bit numbers: each ``stretch`` bytes hold a stretch in the low halves, the next in the high."""
    count = len(packed)
    return ((packed.reshape(count, -1, 1, stretch) >> _NIBBLES) & 15).reshape(count, -1)


def _fifth_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    """Read the 32 bits at byte ``at``, lowest first: (n, 32)."""
    return np.unpackbits(np.ascontiguousarray(blocks[:, at : at + 4]), axis=1, bitorder="little")


def _from_q8_0(blocks: np.ndarray) -> np.ndarray:
    return _signed(blocks[:, 2:]).astype(np.float32) * _half(blocks, 0)


def _from_q4_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:], 16).view(np.int8) - np.int8(8)).astype(np.float32)


def _from_q4_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:], 16).astype(np.float32) + _half(blocks, 2)


def _from_q5_0(blocks: np.ndarray) -> np.ndarray:
    numbers = _nibbles(blocks[:, 6:], 16) | (_fifth_bits(blocks, 2) << 4)
    return _half(blocks, 0) * (numbers.view(np.int8) - np.int8(16)).astype(np.float32)


def _from_q5_1(blocks: np.ndarray) -> np.ndarray:
    numbers = _nibbles(blocks[:, 8:], 16) | (_fifth_bits(blocks, 4) << 4)
    return _half(blocks, 0) * numbers.astype(np.float32) + _half(blocks, 2)


def _scales_and_minima(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack the eight 6-bit scales and eight 6-bit minima of a Q4_K or Q5_K block from its 12 bytes."""
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 2) & 48)], axis=1)
    return scales, minima


def _from_q4_k(blocks: np.ndarray) -> np.ndarray:
    return _from_sixth_bits(blocks, _nibbles(blocks[:, 16:], 32))


def _from_q5_k(blocks: np.ndarray) -> np.ndarray:
    shifts = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    fifth = ((blocks[:, 16:48].reshape(-1, 1, 32) >> shifts) & 1).reshape(len(blocks), 256)
    return _from_sixth_bits(blocks, _nibbles(blocks[:, 48:], 32) | (fifth << 4))


def _from_sixth_bits(blocks: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Scale the numbers (n, 256) of a Q4_K or Q5_K block in eight stretches of 32."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scale = (_half(blocks, 0) * scales.astype(np.float32))[:, :, None]  # (n, 8, 1)
    minimum = (_half(blocks, 2) * minima.astype(np.float32))[:, :, None]
    return (scale * numbers.reshape(-1, 8, 32).astype(np.float32) - minimum).reshape(-1, 256)


def _from_q6_k(blocks: np.ndarray) -> np.ndarray:
    count = len(blocks)
    low = _nibbles(blocks[:, :128], 64)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    high = ((blocks[:, 128:192].reshape(count, 2, 1, 32) >> shifts) & 3).reshape(count, 256)
    numbers = (low | (high << 4)).view(np.int8) - np.int8(32)
    scale = (_half(blocks, 208) * _signed(blocks[:, 192:208]).astype(np.float32))[:, :, None]  # (n, 16, 1)
    return (scale * numbers.reshape(count, 16, 16).astype(np.float32)).reshape(count, 256)


_UNPACK: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q8_0": _from_q8_0,
    "Q4_0": _from_q4_0,
    "Q4_1": _from_q4_1,
    "Q5_0": _from_q5_0,
    "Q5_1": _from_q5_1,
    "Q4_K": _from_q4_k,
    "Q5_K": _from_q5_k,
    "Q6_K": _from_q6_k,
}
READABLE = (*PLAIN_TYPES, *_UNPACK)


def unpack(data: np.ndarray, type_name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Turn the bytes of a tensor into numbers.

    Args:
        data: uint8, as `GgufFile.raw` returns them.
        type_name: "F32", "Q4_K", ...
        shape: Outermost first.
        dtype: Of the result; None: as stored, float32 for blocks. Plain numbers that keep their dtype are a view.

    Raises:
        CheckpointError: The format is not read here.
    """
    if type_name in PLAIN_TYPES:
        is_aligned = data.ctypes.data % PLAIN_TYPES[type_name].itemsize == 0  # a file may choose to align to one byte
        plain = torch.from_numpy(data if is_aligned else data.copy()).view(PLAIN_TYPES[type_name]).reshape(tuple(shape))
        return plain if dtype is None else plain.to(dtype)
    if type_name not in _UNPACK:
        raise CheckpointError(
            f"A tensor is stored as {type_name}, which is not read here. Read: {', '.join(READABLE)}. "
            "Make another file from the original weights with one of these."
        )
    entry = BLOCK_TYPES[TYPE_NUMBERS[type_name]]
    blocks = data.reshape(-1, entry.block_bytes)
    result = torch.empty(len(blocks), entry.block_len, dtype=dtype or torch.float32)
    # Random bytes may hold a scale of infinity or NaN; the product is what the format says, without a warning.
    with np.errstate(invalid="ignore", over="ignore"):
        at_once = _PIECE_NUMBERS // entry.block_len
        for start in range(0, len(blocks), at_once):
            piece = _UNPACK[type_name](blocks[start : start + at_once])
            result[start : start + at_once] = torch.from_numpy(piece)
    return result.reshape(tuple(shape))


def _inverse(scale: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _bytes_of(scale: np.ndarray) -> np.ndarray:
    return scale.astype(np.float16).view(np.uint8)


def _pack_nibbles(numbers: np.ndarray) -> np.ndarray:
    """Pack (n, 32) numbers below 16 into (n, 16) bytes: the first half low, the second half high."""
    return numbers[:, :16] | (numbers[:, 16:] << 4)


def _to_q8_0(blocks: np.ndarray) -> np.ndarray:
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scale)
    away = np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))  # halves go away from zero, as in C
    return np.concatenate([_bytes_of(scale), away.astype(np.int8).view(np.uint8)], axis=1)


def _to_q4_0(blocks: np.ndarray) -> np.ndarray:
    furthest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = furthest / np.float32(-8)
    numbers = np.trunc(blocks.astype(np.float64) * _inverse(scale).astype(np.float64) + 8.5)
    return np.concatenate([_bytes_of(scale), _pack_nibbles(numbers.clip(0, 15).astype(np.uint8))], axis=1)


def _to_q4_1(blocks: np.ndarray) -> np.ndarray:
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    scale = (high - low) / np.float32(15)
    numbers = np.trunc((blocks - low) * _inverse(scale) + np.float32(0.5)).clip(0, 15).astype(np.uint8)
    return np.concatenate([_bytes_of(scale), _bytes_of(low), _pack_nibbles(numbers)], axis=1)


_PACK: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q8_0": _to_q8_0,
    "Q4_0": _to_q4_0,
    "Q4_1": _to_q4_1,
    "Q4_K": to_q4_k,
    "Q5_K": to_q5_k,
    "Q6_K": to_q6_k,
}
WRITABLE = ("F32", "F16", "BF16", *_PACK)


def pack(tensor: Tensor, type_name: str, name: str = "tensor") -> np.ndarray:
    """Turn a tensor into the bytes of a format, uint8.

    Raises:
        CheckpointError: The tensor holds infinities or NaN, or numbers beyond the range of half precision, that the
            format cannot say; the message names it.
    """
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if type_name in PLAIN_TYPES:
        plain = flat.to(PLAIN_TYPES[type_name])
        if type_name == "F16" and not torch.equal(plain.isfinite(), flat.isfinite()):
            raise CheckpointError(
                f"{name} holds {flat[~plain.isfinite()][0].item():g}, beyond the range of F16. Write it as bf16 or f32."
            )
        return plain.view(torch.uint8).numpy()
    entry = BLOCK_TYPES[TYPE_NUMBERS[type_name]]
    blocks = flat.reshape(-1, entry.block_len)
    result = np.empty((len(blocks), entry.block_bytes), np.uint8)
    assert result.nbytes == tensor_bytes(type_name, tensor.shape)
    at_once = _PIECE_NUMBERS // entry.block_len
    for start in range(0, len(blocks), at_once):
        piece = blocks[start : start + at_once].float().numpy()
        furthest = np.abs(piece).max(initial=0)
        if not furthest < 65504:
            raise CheckpointError(
                f"{name} holds {furthest:g}; the blocks of {type_name} have half-precision scales and cannot say it. "
                "Mend the weights, or write it as f32."
            )
        result[start : start + at_once] = _PACK[type_name](piece)
    return result.reshape(-1)
