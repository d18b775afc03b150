"""Floats to the K formats of GGUF: 256 numbers share one or two half-precision scales of eight or sixteen small ones.

Each stretch of 16 or 32 numbers first finds its own scale (and minimum): of some twenty candidates, each refined by
weighted least squares, the one with the least error, where large numbers weigh more. These scales are then rounded to 6
or 8 bits of the block's, and the numbers rounded anew under the rounded scales. Vectorised over blocks.

Source: ggml, ggml-quants.c (``make_qkx2_quants``, ``make_qx_quants``, ``quantize_row_q4_K_ref`` and kin); no importance
matrix.
"""

import numpy as np


def _divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0)


def _halved(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round to half precision: the bytes (n, 2), and what they say, (n, 1) float32."""
    half = values.astype(np.float16)
    return half.view(np.uint8), half.astype(np.float32)


def _fit_with_minimum(x: np.ndarray, largest: int, first: float, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Find scale and minimum (both (n, k, 1), not negative) so that scale * number - minimum is near x (n, k, 32)."""
    weight = np.sqrt((x * x).mean(axis=-1, keepdims=True)) + np.abs(x)
    low = np.minimum(x.min(axis=-1, keepdims=True), 0)
    width = x.max(axis=-1, keepdims=True) - low
    sum_w, sum_x = weight.sum(-1, keepdims=True), (weight * x).sum(-1, keepdims=True)
    scale, minimum = _divided(width, np.float32(largest) * np.ones_like(width)), low
    best = np.full_like(width, np.inf)
    steps = [largest, *(largest + first + 0.1 * step for step in range(num_steps + 1))]
    for count in steps:
        numbers = np.rint(_divided(np.float32(count) * np.ones_like(width), width) * (x - low)).clip(0, largest)
        if count is largest:
            tried_scale, tried_low = scale, low
        else:
            weighted = weight * numbers
            sum_l, sum_l2 = weighted.sum(-1, keepdims=True), (weighted * numbers).sum(-1, keepdims=True)
            sum_xl = (weighted * x).sum(-1, keepdims=True)
            determinant = sum_w * sum_l2 - sum_l * sum_l
            tried_low = np.minimum(_divided(sum_l2 * sum_x - sum_l * sum_xl, determinant), 0)
            with_low = _divided(sum_w * sum_xl - sum_x * sum_l, determinant)
            tried_scale = np.where(tried_low < 0, with_low, _divided(sum_xl, sum_l2))
        error = (weight * (tried_scale * numbers + tried_low - x) ** 2).sum(-1, keepdims=True)
        is_better = (error < best) & (tried_scale >= 0)
        scale, minimum = np.where(is_better, tried_scale, scale), np.where(is_better, tried_low, minimum)
        best = np.where(is_better, error, best)
    return scale, -minimum


def _fit(x: np.ndarray) -> np.ndarray:
    """Find the scale (n, k, 1) so that scale * number is near x (n, k, 16), numbers from -32 to 31."""
    furthest = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)
    weight = x * x
    scale, best = np.zeros_like(furthest), np.zeros_like(furthest)
    for step in (0, *range(-9, 0), *range(1, 10)):
        numbers = np.rint(_divided(np.float32(-(32 + 0.1 * step)) * np.ones_like(furthest), furthest) * x).clip(-32, 31)
        sum_xl = (weight * x * numbers).sum(-1, keepdims=True)
        sum_l2 = (weight * numbers * numbers).sum(-1, keepdims=True)
        tried = _divided(sum_xl, sum_l2)
        is_better = tried * sum_xl > best  # how much of the weighted squares is explained
        scale, best = np.where(is_better, tried, scale), np.where(is_better, tried * sum_xl, best)
    return scale


def _packed_scales(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Pack eight 6-bit scales and eight 6-bit minima into (n, 12) bytes."""
    low = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    middle = minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    return np.concatenate([low, middle, (scales[:, 4:] & 15) | (minima[:, 4:] << 4)], axis=1)


def _with_minima(blocks: np.ndarray, largest: int, first: float, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the 16 bytes of scales of each block, and its numbers (n, 8, 32) as uint8."""
    x = blocks.reshape(-1, 8, 32)
    scale, minimum = _fit_with_minimum(x, largest, first, num_steps)
    most_scale, most_minimum = scale.max(axis=1), minimum.max(axis=1)  # (n, 1)
    sixty_three = np.full_like(most_scale, 63)
    scales = np.rint(_divided(sixty_three, most_scale) * scale[..., 0]).clip(0, 63).astype(np.uint8)
    minima = np.rint(_divided(sixty_three, most_minimum) * minimum[..., 0]).clip(0, 63).astype(np.uint8)
    (scale_bytes, d), (minimum_bytes, m) = _halved(most_scale / 63), _halved(most_minimum / 63)
    step, offset = (d * scales)[..., None], (m * minima)[..., None]  # (n, 8, 1)
    numbers = np.rint(_divided(x + offset, step)).clip(0, largest).astype(np.uint8)
    return np.concatenate([scale_bytes, minimum_bytes, _packed_scales(scales, minima)], axis=1), numbers


def _low_halves(numbers: np.ndarray) -> np.ndarray:
    """Pack the low four bits of (n, 8, 32): each pair of stretches into 32 bytes."""
    pairs = (numbers & 15).reshape(-1, 4, 2, 32)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)


def to_q4_k(blocks: np.ndarray) -> np.ndarray:
    """Pack (n, 256) float32 into (n, 144) bytes."""
    head, numbers = _with_minima(blocks, 15, -1.0, 20)
    return np.concatenate([head, _low_halves(numbers)], axis=1)


def to_q5_k(blocks: np.ndarray) -> np.ndarray:
    """Pack (n, 256) float32 into (n, 176) bytes."""
    head, numbers = _with_minima(blocks, 31, -0.5, 15)
    fifth = np.packbits(numbers >> 4, axis=1, bitorder="little")[:, 0]  # stretch j is bit j: (n, 32)
    return np.concatenate([head, fifth, _low_halves(numbers)], axis=1)


def to_q6_k(blocks: np.ndarray) -> np.ndarray:
    """Pack (n, 256) float32 into (n, 210) bytes."""
    x = blocks.reshape(-1, 16, 16)
    scale = _fit(x)[..., 0]  # (n, 16)
    most = np.take_along_axis(scale, np.abs(scale).argmax(axis=1)[:, None], axis=1)
    d_bytes, d = _halved(most / -128)
    scales = np.rint(_divided(np.full_like(most, -128), most) * scale).clip(-128, 127).astype(np.int8)
    numbers = np.rint(_divided(x, (d * scales)[..., None])).clip(-32, 31) + 32
    quarters = numbers.astype(np.uint8).reshape(-1, 2, 4, 32)  # two halves of four times 32
    low = np.concatenate([quarters[:, :, 0:2] & 15 | (quarters[:, :, 2:4] & 15) << 4], axis=1).reshape(-1, 128)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    high = np.bitwise_or.reduce(quarters >> 4 << shifts, axis=2).reshape(-1, 64)
    return np.concatenate([low, high, scales.view(np.uint8), d_bytes], axis=1)
