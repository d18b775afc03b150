"""Checkpoints of GPTQ and AWQ, as their tools publish them: read as if they held plain weights, or kept in 4 bits.

A linear layer stands as ``qweight``, ``qzeros``, ``scales`` and perhaps ``g_idx``, int32 words of several numbers:

    W[o, i] = (q[i, o] - z[g(i), o]) s[g(i), o],      g(i) = i // group_size, or g_idx[i] with activation order

GPTQ packs q along the inputs and z along the outputs, lowest bits first, and stores z - 1 (``checkpoint_format`` gptq;
gptq_v2 stores z). AWQ packs both along the outputs, eight columns a word in the order 0 2 4 6 1 3 5 7.
Symmetric GPTQ without activation order (z = 2^(b-1)) has the numbers of `modelwright.nn.lowbit`: they are repacked bit
by bit, stay in 4 or 8 bits, and are served by the same kernels; only the scales are rounded, from float16 to the
model's dtype. Everything else is multiplied out.
Source: Frantar et al. 2022 and Lin et al. 2023, as packed by AutoGPTQ (qlinear_cuda.py) and AutoAWQ (packing_utils.py,
gemm.py). Not done: 3 bits, AWQ's gemv and marlin layouts.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelwright.base.errors import CheckpointError
from modelwright.base.logs import get_logger
from modelwright.nn.lowbit import pack, quantization_config

log = get_logger(__name__)
METHODS = ("gptq", "awq")
PARTS = ("qweight", "qzeros", "scales", "g_idx")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that the i-th 4 bits of a word hold
BITS = {"gptq": (2, 4, 8), "awq": (4,)}


def unpack_words(words: Tensor, bits: int, dim: int) -> Tensor:
    """Spread int32 words into numbers 0 .. 2^bits - 1 (int32), lowest bits first, along a dimension.

    >>> unpack_words(torch.tensor([[0x21], [0x43]], dtype=torch.int32), 4, 0)[:2].flatten().tolist()
    [1, 2]
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    spread = (words.movedim(dim, -1).unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return spread.flatten(-2).movedim(-1, dim)


def unpack_gptq(parts: Mapping[str, Tensor], bits: int, *, is_v2: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (in, out), z (groups, out), both int32, and g (in,)."""
    q = unpack_words(parts["qweight"], bits, 0)
    z = unpack_words(parts["qzeros"], bits, 1)[:, : q.shape[1]]
    if not is_v2:
        z = (z + 1) & ((1 << bits) - 1)  # stored less one; 0 was stored as the largest number
    groups = parts.get("g_idx")
    if groups is None:
        groups = torch.arange(q.shape[0]) // (q.shape[0] // z.shape[0])
    return q, z, groups.long()


def unpack_awq(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (in, out), z (groups, out), both int32, and g (in,)."""
    back = torch.tensor(AWQ_ORDER).argsort()
    q, z = (unpack_words(parts[name], 4, 1).unflatten(1, (-1, 8))[..., back].flatten(1) for name in PARTS[:2])
    return q, z, torch.arange(q.shape[0]) // (q.shape[0] // z.shape[0])


def dequantize(q: Tensor, z: Tensor, scale: Tensor, groups: Tensor) -> Tensor:
    """Return W (out, in) in float32; each product is rounded once."""
    return ((q - z[groups]).float() * scale.float()[groups]).t()


def reader_of(source: Path, values: Mapping[str, Any]) -> "QuantizedReader | None":
    """Return what turns the tensors of a GPTQ or AWQ folder into those that `assemble` knows; None for other folders.

    Raises:
        CheckpointError: The scheme has a part that is not read here; the message names it.
    """
    config = values.get("quantization_config")
    if not isinstance(config, Mapping) or config.get("quant_method") not in METHODS:
        return None
    return QuantizedReader(source, config)


class QuantizedReader:
    """Reads one folder's layers.

    Args:
        source: The folder, for messages.
        config: The ``quantization_config`` of its config.json.
    """

    def __init__(self, source: Path, config: Mapping[str, Any]):
        self.source = source
        self.method = str(config["quant_method"])
        self.bits, self.group_size = config.get("bits"), config.get("group_size")
        rules: list[tuple[str, Any, tuple[Any, ...]]] = [("bits", self.bits, BITS[self.method])]
        if self.method == "awq":
            rules.append(("version", str(config.get("version", "gemm")).lower(), ("gemm",)))
        else:
            rules.append(("checkpoint_format", config.get("checkpoint_format", "gptq"), ("gptq", "gptq_v2")))
        for name, value, known in rules:
            if value not in known:
                raise CheckpointError(
                    f"{source}: quantization_config: {name} is {value!r} of {self.method}; read here: "
                    f"{', '.join(map(str, known))}. Load the model before quantization, or one quantized so."
                )
        self.is_v2 = config.get("checkpoint_format") == "gptq_v2"
        is_plain = bool(config.get("sym")) and not config.get("desc_act") and not config.get("dynamic")
        self.is_packed = self.method == "gptq" and self.bits in (4, 8) and is_plain

    def config_values(self, values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """Return the config.json that the turned tensors belong to; `names`: of all tensors in the folder."""
        kept = {name: value for name, value in values.items() if name != "quantization_config"}
        if self.is_packed:
            listed = set(names)
            dense = [
                n for n in listed if n.endswith(".weight") and f"{n.removesuffix('.weight')}.qweight" not in listed
            ]
            size = self.group_size if self.group_size and self.group_size > 0 else None
            tied = [] if "lm_head.qweight" in listed else ["lm_head.weight"]  # it may be the embedding, in no file
            ignored = sorted({name.removesuffix(".weight") for name in (*dense, *tied)})
            kept["quantization_config"] = quantization_config(int(self.bits or 4), size, ignored)
        else:
            log.info("%s: %s weights are multiplied out, which takes the memory of 16 bits", self.source, self.method)
        return kept

    def turn(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield (published name, tensor) with each quantized layer's parts put together."""
        waiting: dict[str, dict[str, Tensor]] = {}
        wanted = set(PARTS[:3]) | ({"g_idx"} if self.method == "gptq" else set())
        for name, tensor in tensors:
            layer, _, part = name.rpartition(".")
            if part not in PARTS:
                yield name, tensor
                continue
            found = waiting.setdefault(layer, {})
            found[part] = tensor
            if wanted <= set(found):
                yield from self._layer(layer, waiting.pop(layer))
        for layer, found in waiting.items():  # older files have no g_idx
            missing = [part for part in PARTS[:3] if part not in found]
            if missing:
                raise CheckpointError(f"{self.source}: {layer} has no {missing[0]}. Fetch the whole model again.")
            yield from self._layer(layer, found)

    def _layer(self, layer: str, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        bits = int(self.bits or 4)
        try:
            q, z, groups = unpack_awq(parts) if self.method == "awq" else unpack_gptq(parts, bits, is_v2=self.is_v2)
            scale = parts["scales"]
            if z.shape != scale.shape or scale.shape[1] != q.shape[1] or int(groups.max()) >= scale.shape[0]:
                raise CheckpointError("")
        except (CheckpointError, RuntimeError, ZeroDivisionError, IndexError):
            shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
            raise CheckpointError(
                f"{self.source}: the parts of {layer} do not fit together: {shapes} at {bits} bits. "
                "The config and the weights belong to different models."
            ) from None
        if not self.is_packed:
            yield f"{layer}.weight", dequantize(q, z, scale, groups).to(scale.dtype)
            return
        middle = 1 << (bits - 1)
        in_order = torch.arange(q.shape[0]) // (q.shape[0] // z.shape[0])
        if not bool((z == middle).all()) or not torch.equal(groups, in_order):
            raise CheckpointError(
                f"{self.source}: the config says that {layer} is symmetric and in order (sym, desc_act), but its zeros "
                "or g_idx say otherwise. Set sym to false in config.json to have it multiplied out."
            )
        yield f"{layer}.weight_packed", pack((q - middle).to(torch.int8).t().contiguous(), bits)
        yield f"{layer}.weight_scale", scale.t().contiguous()
        yield f"{layer}.weight_shape", torch.tensor([q.shape[1], q.shape[0]])
