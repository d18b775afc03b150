"""Linear layers whose weights are stored in 8, 4 or 2 bits; activations stay as they are.

    W[o, i] = q[o, i] s[o, i // g],   -2^(b-1) <= q < 2^(b-1),   one scale s for g inputs (a whole row without groups)

The tensors are those of the compressed-tensors layout "pack-quantized": ``weight_packed`` holds q + 2^(b-1) in int32
words along the input, lowest bits first; ``weight_scale`` is (out, groups); ``weight_shape`` is [out, in].
The scale of each group is searched for the smallest squared error, so the largest weight may be clipped.
Source: https://github.com/vllm-project/compressed-tensors (pack_quantized); Frantar et al. 2022, section 2 (RTN).
Not done: zero points, activation order, 3 bits, low-bit activations.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.nn.linear import linears, replace_module

FORMAT = "pack-quantized"  # the one layout of compressed-tensors that is read and written here
# The fused CPU kernels read each weight once for every few input rows. In bfloat16 they beat dequantize-then-multiply
# up to about this many rows and lose beyond; in float32 they are scalar code and lose from the second row on.
MAX_FUSED_ROWS = 16
_CLIP_RATIOS = tuple(1.0 - 0.02 * step for step in range(26))  # 1.00 .. 0.50 of the largest weight
_SEARCH_ELEMENTS = 1 << 22  # weights searched at once: bounds the memory of the search


class LowBitLinear(nn.Module):
    """A weight-only quantized linear layer; the subclasses say how many bits. Usually made by `from_linear`.

    Args:
        group_size: Inputs that share a scale; None: one scale for each output row.
        dtype: Of the scales and the bias, usually the model's own.
    """

    bits: ClassVar[int]
    weight_packed: Tensor  # (out, ceil(in x bits / 32)) int32
    weight_scale: Tensor  # (out, groups)
    weight_shape: Tensor  # (2,) int64: out, in

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int | None = None,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if group_size is not None and (group_size < 1 or in_features % group_size):
            raise ConfigError(
                f"group_size is {group_size}, which does not divide the layer's {in_features} inputs. "
                "Use a divisor, or None for one scale a row."
            )
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        groups = in_features // group_size if group_size else 1
        words = math.ceil(in_features * self.bits / 32)
        self.register_buffer("weight_packed", torch.zeros(out_features, words, dtype=torch.int32, device=device))
        self.register_buffer("weight_scale", torch.ones(out_features, groups, dtype=dtype, device=device))
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.use_fused = True  # False: always the readable path
        # A product (rows, in) -> (rows, out), bias included, that is taken for any number of rows: `pack_low_bit`.
        self.kernel: Callable[[Tensor], Tensor] | None = None
        # The kernels' own layout of the weight, made on first use and never saved: (stamp, tensors).
        self._fused: tuple[tuple[int, ...], tuple[Tensor, ...]] | None = None

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        group_size: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        importance: Tensor | None = None,
    ) -> Self:
        """Round a dense layer's weight (out, in) to the nearest representable values under searched scales.

        Args:
            dtype: Of the scales and the bias; None: the weight's own.
            importance: (in,) weights of the squared error, for instance the mean square of each input. None: all one.

        Raises:
            CheckpointError: The weight holds NaN or infinity.
        """
        weight = linear.weight.detach()
        if not torch.isfinite(weight).all():
            raise CheckpointError("The weight to quantize holds NaN or infinity; expected finite numbers.")
        out_features, in_features = weight.shape
        options: dict[str, Any] = {"dtype": dtype or weight.dtype, "device": weight.device}
        layer = cls(in_features, out_features, group_size, bias=linear.bias is not None, **options)
        groups = weight.float().view(out_features, -1, group_size or in_features)  # (out, groups, g)
        cost = torch.ones(in_features) if importance is None else importance.float()
        cost = cost.to(weight.device).view(1, -1, groups.shape[-1])
        rows = max(1, _SEARCH_ELEMENTS // in_features)
        parts = [_round_groups(part, cost, cls.bits, layer.weight_scale.dtype) for part in groups.split(rows)]
        layer.weight_scale.copy_(torch.cat([scale for _, scale in parts]).squeeze(-1))
        layer.weight_packed.copy_(pack(torch.cat([q for q, _ in parts]).view(out_features, in_features), cls.bits))
        if layer.bias is not None:
            layer.bias.copy_(linear.bias)
        return layer.requires_grad_(False)

    def integers(self) -> Tensor:
        """Return q, (out, in) int8."""
        return unpack(self.weight_packed, self.bits, self.in_features)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight (out, in), multiplied out in ``dtype`` (None: the scales' own)."""
        scale = self.weight_scale.to(dtype or self.weight_scale.dtype)
        q = self.integers().to(scale.dtype).view(self.out_features, scale.shape[1], -1)
        return (q * scale.unsqueeze(-1)).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self.kernel is not None and self._has_no_graph(x):
            y = self.kernel(x.reshape(-1, self.in_features).float())
            return y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        if self.use_fused and self._fits_fused(x):
            rows = x.reshape(-1, self.in_features).contiguous()
            y = self._fused_matmul(rows).view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.dequantize(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def _fits_fused(self, x: Tensor) -> bool:
        """Whether a fused kernel exists for this input and was measured to be faster."""
        return (
            x.device.type == "cpu"
            and x.dtype == self.weight_scale.dtype == torch.bfloat16
            and x.numel() <= MAX_FUSED_ROWS * self.in_features
            and self._has_no_graph(x)
            and ((self.bits == 8 and self.group_size is None) or self._has_int4_shape())
        )

    def _has_no_graph(self, x: Tensor) -> bool:
        """Whether a kernel may run: it has no derivative, and a compiler cannot look into it."""
        return not (torch.is_grad_enabled() and x.requires_grad) and not torch.compiler.is_compiling()

    def _has_int4_shape(self) -> bool:
        return self.bits == 4 and self.group_size in (32, 64, 128, 256) and self.out_features % 16 == 0

    def _fused_matmul(self, x: Tensor) -> Tensor:
        packed, scale = self.weight_packed, self.weight_scale
        stamp = (packed.data_ptr(), packed._version, scale.data_ptr(), scale._version)
        if self._fused is None or self._fused[0] != stamp:
            self._fused = (stamp, self._fused_layout())
        weight, scales = self._fused[1]
        if self.bits == 8:
            return torch.ops.aten._weight_int8pack_mm(x, weight, scales)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, self.group_size, scales)

    def _fused_layout(self) -> tuple[Tensor, Tensor]:
        if self.bits == 8:
            return self.integers(), self.weight_scale.view(-1)
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(self.integers().to(torch.int32) + 8, 1)
        scales = self.weight_scale.t()  # (groups, out)
        return weight, torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous()  # zero points: none

    def extra_repr(self) -> str:
        """Describe the layer the way nn.Linear does."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bits={self.bits}, group_size={self.group_size}, bias={self.bias is not None}"


class Int8Linear(LowBitLinear):
    """Eight bits a weight, by default with one scale for each output row."""

    bits = 8


class Int4Linear(LowBitLinear):
    """Four bits a weight, by default with one scale for every 32 inputs."""

    bits = 4

    def __init__(self, in_features: int, out_features: int, group_size: int | None = 32, **options: Any) -> None:
        super().__init__(in_features, out_features, group_size, **options)

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int | None = 32, **options: Any) -> Self:
        """Round a dense layer's weight; see `LowBitLinear.from_linear`."""
        return super().from_linear(linear, group_size, **options)


class Int2Linear(LowBitLinear):
    """Two bits a weight: the size at which plain rounding fails, kept as the control of the other two."""

    bits = 2


LAYERS: dict[int, type[LowBitLinear]] = {2: Int2Linear, 4: Int4Linear, 8: Int8Linear}


def _round_groups(weight: Tensor, cost: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Search a scale for each group of ``weight`` (rows, groups, g); return q (int8) and the scales in ``dtype``."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    largest = weight.abs().amax(dim=-1, keepdim=True)
    best_q = torch.zeros_like(weight, dtype=torch.int8)
    best_scale = torch.ones_like(largest, dtype=dtype)
    best_error = torch.full_like(largest, torch.inf)

    def offer(scale: Tensor) -> None:
        # The error is that of the scale as it will be stored, so its rounding is part of the search.
        stored = scale.to(dtype)
        used = torch.where(stored > 0, stored, torch.ones_like(stored)).float()
        q = (weight / used).round_().clamp_(low, high)
        error = ((q * used - weight).square_() * cost).sum(dim=-1, keepdim=True)
        is_better = error < best_error
        best_q.copy_(torch.where(is_better, q.to(torch.int8), best_q))
        best_scale.copy_(torch.where(is_better, used.to(dtype), best_scale))
        best_error.copy_(torch.where(is_better, error, best_error))

    for ratio in _CLIP_RATIOS:
        offer(largest * (ratio / high))
    for _ in range(2):  # given q, the best scale is a least-squares fit
        q = best_q.float()
        offer((cost * q * weight).sum(-1, keepdim=True) / (cost * q * q).sum(-1, keepdim=True).clamp_min(1e-30))
    return best_q, best_scale


def pack(q: Tensor, bits: int) -> Tensor:
    """Pack int8 values (out, in) into int32 words along the input, lowest bits first, zero-filled at the end.

    Example:
        >>> pack(torch.tensor([[-8, -7, 0, 7, 0, 0, 0, 0]], dtype=torch.int8), 4).item() & 0xFFFF
        63504
    """
    per_word, per_byte = 32 // bits, 8 // bits
    shifted = (q.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    shifted = F.pad(shifted, (0, -q.shape[1] % per_word)).view(q.shape[0], -1, per_byte)
    packed = shifted[..., 0].clone()
    for place in range(1, per_byte):
        packed |= shifted[..., place] << (bits * place)
    return packed.view(torch.int32)  # all supported machines are little-endian


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Undo `pack`: return int8 values (out, in)."""
    data = packed.contiguous().view(torch.uint8)
    mask = (1 << bits) - 1
    values = torch.stack([(data >> (bits * place)) & mask for place in range(8 // bits)], dim=-1) if bits < 8 else data
    values = values.view(packed.shape[0], -1)[:, :in_features]
    return (values ^ (1 << (bits - 1))).view(torch.int8) if bits == 8 else values.view(torch.int8) - (1 << (bits - 1))


def quantization_config(bits: int, group_size: int | None, ignore: Sequence[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a model's config.json: every linear layer but ``ignore`` in ``bits``."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "block_structure": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def swap_linears(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Replace every dense linear layer by an empty low-bit one of the kind that ``config`` describes.

    For loading: the tensors come afterwards, and until then the layers stand for a weight of zeros.

    Args:
        model: Usually on the meta device.
        config: A ``quantization_config``. Its ``ignore`` holds names of this model's layers, or ``re:`` patterns.

    Returns:
        The names of the replaced layers.

    Raises:
        ConfigError: A scheme that is not computed here: another format, activations, zero points, reordering.
    """
    layer_type, group_size = _read_scheme(config)
    ignore = list(config.get("ignore") or ())
    replaced = []
    for name, layer in list(linears(model)):
        if type(layer) is not nn.Linear or any(_is_named(name, pattern) for pattern in ignore):
            continue
        options: dict[str, Any] = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        empty = layer_type(layer.in_features, layer.out_features, group_size, bias=layer.bias is not None, **options)
        replace_module(model, name, empty.requires_grad_(False))
        replaced.append(name)
    return replaced


def _is_named(name: str, pattern: str) -> bool:
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else name == pattern


def _read_scheme(config: Mapping[str, Any]) -> tuple[type[LowBitLinear], int | None]:
    """Return the layer type and group size, or say which part of the scheme is not computed here."""
    groups = list((config.get("config_groups") or {}).values())
    group = groups[0] if groups else {}
    weights = group.get("weights") or {}
    strategy = weights.get("strategy")
    rules = (
        ("quant_method", config.get("quant_method"), ("compressed-tensors",)),
        ("format", config.get("format"), (FORMAT,)),
        ("the number of config_groups", len(groups), (1,)),
        ("kv_cache_scheme", config.get("kv_cache_scheme"), (None,)),
        ("targets", group.get("targets"), (["Linear"],)),
        ("input_activations", group.get("input_activations"), (None,)),
        ("output_activations", group.get("output_activations"), (None,)),
        ("weights.type", weights.get("type", "int"), ("int",)),
        ("weights.num_bits", weights.get("num_bits"), tuple(LAYERS)),
        ("weights.symmetric", weights.get("symmetric", True), (True,)),
        ("weights.strategy", strategy, ("group", "channel")),
        ("weights.actorder", weights.get("actorder"), (None, False, "weight", "static")),  # these change no layout
    )
    for name, value, known in rules:
        if value not in known:
            raise ConfigError(
                f"quantization_config: {name} is {value!r}; computed here: {' or '.join(map(repr, known))}. "
                "Load the model before quantization, or one quantized in a known way."
            )
    return LAYERS[weights["num_bits"]], weights["group_size"] if strategy == "group" else None
