"""Low-bit products on CPUs: weights of 4 or 8 bits times activations of 8 bits, in whole numbers.

    y[r, o] = sum_g  (sum_{i in g} q[o, i] a[r, i])  s[o, g] t[r, g],     a = round(x / t),  t = max|x| / 127 in g

g: 32 inputs. The inner sum is exact, the outer one goes over the groups in order, so a row's result does not depend on
the rows beside it nor on the number of threads. `PackedMatrix` holds the layout of cpu_linear.h, made once at loading;
`multiply_plain` is the twin in PyTorch. Weights of 16 bits are bfloat16, and so are their activations.

Source: the idea of llama.cpp's Q8_0 activations (ggml-quants.c), with this project's weights and its own layout.
"""

import contextlib
import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.nn.lowbit import LAYERS, LowBitLinear

GROUP = 32  # inputs that share an activation scale
BLOCK = 32  # outputs in a block
LARGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23  # Linux 5.14


class CMatrix(ctypes.Structure):
    """`Matrix` of cpu_linear.h."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("num_ins", ctypes.c_int64),
        ("num_outs", ctypes.c_int64),
        ("bits", ctypes.c_int64),
    )


def bits_of(layer: nn.Module) -> int:
    """Return the bits of a layer's weights as the kernels store them.

    Raises:
        ConfigError: The kernels have no form for this layer; the message says what stands in the way.
    """
    if type(layer) is nn.Linear:
        if layer.weight.dtype != torch.bfloat16 or layer.in_features % GROUP:
            raise ConfigError(f"A dense layer of {layer.weight.dtype} with {layer.in_features} inputs has no kernel.")
        return 16
    if not isinstance(layer, LowBitLinear) or layer.bits not in (4, 8):
        raise ConfigError(f"A {type(layer).__name__} has no kernel; linear layers of 4, 8 and 16 bits have.")
    size = layer.group_size or layer.in_features
    if size % GROUP or layer.weight_scale.dtype != torch.bfloat16:
        raise ConfigError(f"Groups of {size} inputs with {layer.weight_scale.dtype} scales have no kernel.")
    return layer.bits


class Arena:
    """Memory for packed weights in large pages: a product that streams them runs 1.3 times as fast."""

    def __init__(self, chunk_bytes: int = 64 << 20):
        self.chunk_bytes = chunk_bytes
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """Return bytes that begin at a multiple of 64; memory is committed as it is written."""
        size = -(-num_bytes // 64) * 64
        if size > self._left.numel():
            self._left = allocate(max(size, self.chunk_bytes))
        found, self._left = self._left[:num_bytes], self._left[size:]
        return found


def allocate(num_bytes: int) -> Tensor:
    """Return that many bytes, in large pages where the system has them."""
    whole = torch.empty(num_bytes + LARGE_PAGE, dtype=torch.uint8)
    start = -whole.data_ptr() % LARGE_PAGE
    found = whole[start : start + num_bytes]
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None and num_bytes >= LARGE_PAGE:  # a wish: what it returns does not matter
        advise(ctypes.c_void_p(found.data_ptr()), ctypes.c_size_t(num_bytes // LARGE_PAGE * LARGE_PAGE), MADV_HUGEPAGE)
    return found


def commit(tensors: Sequence[Tensor], chunk_bytes: int = 8 << 20) -> None:
    """Have the system give memory to pages that nobody has touched yet, without a change to what they hold.

    A first touch costs a fault and a page of zeros, 0.3 s for a cache of 512 MB, which requests would wait for. Safe
    while others read and write. Where the system cannot do it, the first touch does.
    """
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is None:
        return
    for tensor in tensors:
        start = -(-tensor.data_ptr() // LARGE_PAGE) * LARGE_PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // LARGE_PAGE * LARGE_PAGE
        for at in range(start, end, chunk_bytes):
            size = min(chunk_bytes, end - at)
            if advise(ctypes.c_void_p(at), ctypes.c_size_t(size), MADV_POPULATE_WRITE):
                return


class PackedMatrix:
    """The weights of one or more linear layers, laid out for the kernels.

    Args:
        library: From `modelwright.nn.kernels.build`.
        layers: Of one number of bits and of equal inputs; their outputs follow each other.
        is_alternating: Blocks of 32 outputs are taken from each layer in turn (a gate and its partner).
        arena: Where the blocks lie; None: in memory of their own.

    Raises:
        ConfigError: The kernels have no form for a layer, or the layers do not go together.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        layers: Sequence[nn.Module],
        *,
        is_alternating: bool = False,
        arena: Arena | None = None,
    ):
        bits, num_ins = {bits_of(layer) for layer in layers}, {int(layer.in_features) for layer in layers}  # type: ignore[arg-type]
        outs = [int(layer.out_features) for layer in layers]  # type: ignore[arg-type]
        is_even = all(size % BLOCK == 0 for size in outs) and (not is_alternating or len(set(outs)) == 1)
        if len(bits) > 1 or len(num_ins) > 1 or (len(outs) > 1 and not is_even):
            raise ConfigError(
                f"Layers of {sorted(bits)} bits, {sorted(num_ins)} inputs and {outs} outputs do not join."
            )
        self.library, self.bits, self.num_ins = library, bits.pop(), num_ins.pop()
        num_blocks = sum(-(-size // BLOCK) for size in outs)
        self.num_outs = num_blocks * BLOCK
        size = library.mw_block_bytes(self.bits, self.num_ins)
        self.blocks = (arena or Arena(0)).take(num_blocks * size)
        at, stride = 0, len(layers) if is_alternating else 1
        for index, layer in enumerate(layers):
            start = index if is_alternating else at
            self._pack(layer, self.blocks.data_ptr() + start * size, stride)
            at += -(-outs[index] // BLOCK)
        self.bias = _joined_bias(layers, self.num_outs, is_alternating)
        bias = None if self.bias is None else self.bias.data_ptr()
        self.c = CMatrix(self.blocks.data_ptr(), bias, self.num_ins, self.num_outs, self.bits)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedMatrix":
        return self  # never changed once made

    def _pack(self, layer: nn.Module, address: int, stride: int) -> None:
        threads = torch.get_num_threads()
        if isinstance(layer, LowBitLinear):
            q, scale = layer.weight_packed.contiguous(), layer.weight_scale.contiguous()
            sizes = (self.bits, layer.out_features, self.num_ins, scale.shape[1], q.shape[1] * 4, stride)
            self.library.mw_pack(q.data_ptr(), scale.data_ptr(), *sizes, address, threads)
        else:
            weight: Tensor = layer.weight.detach().contiguous()  # type: ignore[union-attr, operator]
            self.library.mw_pack_halves(weight.data_ptr(), weight.shape[0], self.num_ins, stride, address, threads)

    def multiply(self, x: Tensor) -> Tensor:
        """Map (rows, in) float32 to (rows, out) float32; outputs are padded to a multiple of 32."""
        x = x.contiguous()
        y = torch.empty(x.shape[0], self.num_outs)
        self.library.mw_linear(ctypes.byref(self.c), x.data_ptr(), x.shape[0], y.data_ptr(), torch.get_num_threads())
        return y


def pack_low_bit(model: nn.Module, library: ctypes.CDLL | None) -> None:
    """Have every low-bit layer of a model on a CPU compute a row to the same bits in any company.

    By itself such a layer goes by the number of rows: PyTorch's fused product for a few, the weight made dense for
    more, and the two round otherwise. Here all rows go through these kernels; a layer that has no form in them, or
    without ``library``, is always made dense.
    """
    for layer in [module for module in model.modules() if isinstance(module, LowBitLinear)]:
        layer.use_fused = False
        if library is None or layer.weight_packed.device.type != "cpu":
            continue
        with contextlib.suppress(ConfigError):  # no form: dense
            layer.kernel = partial(_all_rows, PackedMatrix(library, [layer]), layer.out_features)


def _all_rows(matrix: PackedMatrix, num_outs: int, x: Tensor) -> Tensor:
    return matrix.multiply(x)[:, :num_outs]


def round_linear(library: ctypes.CDLL, linear: nn.Linear, bits: int, group_size: int | None) -> LowBitLinear:
    """Do what ``LowBitLinear.from_linear`` does to a bfloat16 layer, some hundred times faster.

    The sums of squares are added in another order, so a near tie between two scales may go the other way.

    Raises:
        CheckpointError: The weight holds NaN or infinity.
    """
    weight = linear.weight.detach().contiguous()
    if not torch.isfinite(weight).all():
        raise CheckpointError("The weight to quantize holds NaN or infinity; expected finite numbers.")
    num_outs, num_ins = weight.shape
    layer = LAYERS[bits](num_ins, num_outs, group_size, bias=linear.bias is not None, dtype=torch.bfloat16)
    sizes = (bits, num_outs, num_ins, group_size or num_ins, layer.weight_packed.shape[1] * 4)
    addresses = (layer.weight_packed.data_ptr(), layer.weight_scale.data_ptr())
    library.mw_round(weight.data_ptr(), *sizes, *addresses, torch.get_num_threads())
    if layer.bias is not None:
        layer.bias.data.copy_(linear.bias)
    return layer.requires_grad_(False)


def _joined_bias(layers: Sequence[Any], num_outs: int, is_alternating: bool) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    parts = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias.float() for layer in layers]
    joined = torch.stack([p.view(-1, BLOCK) for p in parts], dim=1).flatten() if is_alternating else torch.cat(parts)
    return torch.nn.functional.pad(joined.detach(), (0, num_outs - joined.shape[0])).contiguous()


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round activations (rows, in) to 8 bits: whole numbers (rows, groups, 32) as float32, scales (rows, groups, 1)."""
    groups = x.float().view(x.shape[0], -1, GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127.0 / largest, torch.zeros_like(largest))
    return (groups * inverse).round(), largest / 127.0


def multiply_plain(layer: nn.Module, x: Tensor) -> Tensor:
    """Map (rows, in) to (rows, out) float32 as the kernels do: the readable twin."""
    if isinstance(layer, LowBitLinear):
        a, t = quantize_rows(x)
        q = layer.integers().float().view(layer.out_features, -1, GROUP)
        scale = layer.weight_scale.float().repeat_interleave(q.shape[1] // layer.weight_scale.shape[1], dim=1)
        exact = torch.einsum("rgi,ogi->rog", a, q)  # whole numbers below 2^24: float32 holds them
        y = (exact * scale * t.transpose(1, 2)).sum(-1)
    else:
        y = x.bfloat16().float() @ layer.weight.float().t()  # type: ignore[union-attr, operator]
    return y if layer.bias is None else y + layer.bias.float()  # type: ignore[union-attr, operator]
