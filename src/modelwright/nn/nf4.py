"""Linear layers whose frozen weights stand in 4 bits, at the quantiles of a normal distribution: the base of QLoRA.

    w ~ levels[q] * absmax(block),   16 levels, blocks of 64 neighbours
    absmax ~ mean + code[q2] * absmax2(block of blocks),   256 levels, blocks of 256     (double quantisation)

4 + 8/64 + 32/(64 x 256) = 4.127 bits a weight; 4.5 without the second line. Two weights share a byte, the first in
its high half. Nothing is multiplied in 4 bits: the matrix is made dense for a product and forgotten, in the forward
pass and once more in the backward pass, so no dense copy waits in between. A byte is looked up as a pair of levels at
once, in a table of 256 pairs; `dequantize_plain` is the readable twin.

The tensors, their names and their bits are those of bitsandbytes (``weight``, ``weight.absmax``, ``weight.quant_map``,
``weight.nested_absmax``, ``weight.nested_quant_map``, ``weight.quant_state.bitsandbytes__nf4``), so folders that
transformers saved in 4 bits load here and ours load there.
Source: Dettmers et al. 2023, arXiv:2305.14314, section 3. Not done: products in 4 bits, fp4, 8-bit (LLM.int8).
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from modelwright.base.device import let_pages_go
from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.nn.linear import linears, replace_module

BLOCK, NESTED_BLOCK = 64, 256
# Where the outermost quantile stands: 1 - (1/30 + 1/32) / 2, as in the paper's code.
_OFFSET = 0.9677083
STATE = "quant_state.bitsandbytes__nf4"
_PIECE = 1 << 22  # numbers rounded at once: bounds the memory of quantising
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@functools.cache
def nf4_levels() -> Tensor:
    """Return the 16 levels, ascending, float32: quantiles of N(0, 1), eight above zero and seven below, and zero.

    >>> [round(x, 4) for x in nf4_levels().tolist()[:3]], nf4_levels()[7].item(), nf4_levels()[15].item()
    ([-1.0, -0.6962, -0.5251], 0.0, 1.0)
    """
    # Halves of different size: the distribution is symmetric, the 16 codes are not, and zero must be one of them.
    above = torch.special.ndtri(torch.linspace(_OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(_OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((above, below, torch.zeros(1, dtype=torch.float64))).sort().values
    return (levels / levels.max()).float()


@functools.cache
def scale_levels() -> Tensor:
    """Return the 256 levels that block scales are rounded to: dense near zero, seven orders of magnitude wide."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1)
        means = (10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
        values += means + [-mean for mean in means]
    return torch.tensor(sorted(values))


@functools.cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the two levels of every byte, (256, 2)."""
    byte = torch.arange(256)
    return torch.stack((nf4_levels()[byte >> 4], nf4_levels()[byte & 15]), dim=1).to(device, dtype)


def forget_tables() -> None:
    """Make the tables anew when they are next wanted: those made while a step is traced without numbers hold none."""
    for table in (nf4_levels, scale_levels, _pairs):
        table.cache_clear()


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    levels = levels.to(x.device)
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)


def _round_blocks(x: Tensor, block: int, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of a flat tensor (uint8) and the largest magnitude of each block (float32)."""
    padded = F.pad(x.float(), (0, -x.numel() % block)).view(-1, block)
    largest = padded.abs().amax(1)
    safe = torch.where(largest > 0, largest, torch.ones_like(largest))
    return _nearest(padded / safe[:, None], levels).view(-1)[: x.numel()], largest


class NF4Linear(nn.Module):
    """A frozen linear layer in NF4. Usually made by `from_linear` or by loading a folder.

    Args:
        double_quant: Round the block scales to 8 bits too.
        dtype: In which the matrix is multiplied out when the caller does not say, and of the bias.
    """

    packed: Tensor  # (ceil(out x in / 2), 1) uint8
    absmax: Tensor  # (blocks,) float32, or uint8 with double quantisation
    nested_absmax: Tensor | None  # (blocks of blocks,) float32
    nested_offset: Tensor | None  # () float32, the mean of the scales

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        double_quant: bool = True,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.double_quant, self.dtype = double_quant, dtype
        num = in_features * out_features
        num_blocks = math.ceil(num / BLOCK)
        self.register_buffer("packed", torch.zeros(math.ceil(num / 2), 1, dtype=torch.uint8, device=device))
        scales = torch.zeros(num_blocks, dtype=torch.uint8 if double_quant else torch.float32, device=device)
        self.register_buffer("absmax", scales)
        nested = torch.zeros(math.ceil(num_blocks / NESTED_BLOCK), device=device) if double_quant else None
        self.register_buffer("nested_absmax", nested)
        self.register_buffer("nested_offset", torch.zeros((), device=device) if double_quant else None)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.requires_grad_(False)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, *, double_quant: bool = True, dtype: torch.dtype | None = None) -> Self:
        """Round a dense layer's weight (out, in) to the nearest levels.

        Raises:
            CheckpointError: The weight holds NaN or infinity.
        """
        weight = linear.weight.detach()
        out_features, in_features = weight.shape
        layer = cls(
            in_features,
            out_features,
            double_quant=double_quant,
            bias=linear.bias is not None,
            dtype=dtype or weight.dtype,
            device=weight.device,
        )
        layer.fill(weight)
        if layer.bias is not None:
            layer.bias.copy_(linear.bias)
        return layer

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Store a dense weight (out, in)."""
        flat = weight.detach().reshape(-1)
        scales = []
        for start in range(0, flat.numel(), _PIECE):
            piece = flat[start : start + _PIECE]
            codes, largest = _round_blocks(piece, BLOCK, nf4_levels())
            if not torch.isfinite(largest).all():
                raise CheckpointError("The weight to quantize holds NaN or infinity; expected finite numbers.")
            codes = F.pad(codes, (0, codes.numel() % 2))
            self.packed[start // 2 : start // 2 + codes.numel() // 2, 0] = (codes[::2] << 4) | codes[1::2]
            scales.append(largest)
        absmax = torch.cat(scales)
        if not self.double_quant:
            self.absmax.copy_(absmax)
            return
        assert self.nested_absmax is not None and self.nested_offset is not None
        self.nested_offset.copy_(absmax.mean())
        codes, nested = _round_blocks(absmax - self.nested_offset, NESTED_BLOCK, scale_levels())
        self.absmax.copy_(codes)
        self.nested_absmax.copy_(nested)

    def scales(self) -> Tensor:
        """Return the scale of each block, (blocks,) float32."""
        if self.nested_absmax is None or self.nested_offset is None:
            return self.absmax
        wide = self.nested_absmax.repeat_interleave(NESTED_BLOCK)[: self.absmax.numel()]
        return scale_levels().to(wide.device)[self.absmax.int()] * wide + self.nested_offset

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight (out, in), multiplied out in ``dtype`` (None: the layer's own)."""
        dtype = dtype or self.dtype
        # One gather for two weights: the pair of levels is fetched as one number twice as wide.
        table = _pairs(dtype, self.packed.device)
        wide = {2: torch.int32, 4: torch.int64, 8: torch.complex128}[table.element_size()]
        levels = table.view(wide).view(-1).index_select(0, self.packed.view(-1).int()).view(dtype)
        num = self.in_features * self.out_features
        scales = self.scales().to(dtype)
        if num % BLOCK:
            levels = F.pad(levels[:num], (0, -num % BLOCK))
        return levels.view(-1, BLOCK).mul_(scales[:, None]).view(-1)[:num].view(self.out_features, self.in_features)

    def dequantize_plain(self) -> Tensor:
        """Compute in the open, float32, what `dequantize` computes: the twin that tests compare with."""
        byte = self.packed.view(-1).long()
        codes = torch.stack((byte >> 4, byte & 15), dim=1).view(-1)[: self.in_features * self.out_features]
        scales = self.scales().repeat_interleave(BLOCK)[: codes.numel()]
        return (nf4_levels().to(byte.device)[codes] * scales).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = _Product.apply(x.to(dtype), self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def num_bytes(self) -> int:
        """Return what the quantized weight takes: codes, scales and their scales."""
        kept = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return sum(t.numel() * t.element_size() for t in kept if t is not None)

    def extra_repr(self) -> str:
        """Describe the layer the way nn.Linear does."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, double_quant={self.double_quant}, bias={self.bias is not None}"

    # In a state dict the layer speaks the names of bitsandbytes.
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        device = self.packed.device
        destination[f"{prefix}weight"] = self.packed
        destination[f"{prefix}weight.absmax"] = self.absmax
        destination[f"{prefix}weight.quant_map"] = nf4_levels().to(device)
        if self.nested_absmax is not None:
            destination[f"{prefix}weight.nested_absmax"] = self.nested_absmax
            destination[f"{prefix}weight.nested_quant_map"] = scale_levels().to(device)
        destination[f"{prefix}weight.{STATE}"] = self._describe()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _describe(self) -> Tensor:
        if self.packed.is_meta:
            return torch.empty(0, dtype=torch.uint8, device="meta")
        values: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": BLOCK,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": [self.out_features, self.in_features],
        }
        if self.nested_offset is not None:
            values |= {
                "nested_blocksize": NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": float(self.nested_offset),
            }
        return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        _, _, missing, *_ = args
        where = f"{prefix}weight.{STATE}"
        wanted = {"weight": "packed", "weight.absmax": "absmax"}
        if self.double_quant:
            wanted["weight.nested_absmax"] = "nested_absmax"
        lacking = [f"{prefix}{name}" for name in (*wanted, f"weight.{STATE}") if f"{prefix}{name}" not in state_dict]
        if lacking:
            missing += lacking
            return
        values = _read_state(state_dict[where], where)
        if values.get("shape") != [self.out_features, self.in_features]:
            raise CheckpointError(
                f"{where}: the shape is {values.get('shape')}; this model's layer is "
                f"[{self.out_features}, {self.in_features}]. The config and the weights belong to different models."
            )
        for name, mine in wanted.items():
            setattr(self, mine, state_dict[f"{prefix}{name}"])
        self.dtype = _DTYPES[values["dtype"]]
        if self.double_quant:
            self.nested_offset = torch.tensor(float(values["nested_offset"]), device=self.packed.device)
        if self.bias is not None and f"{prefix}bias" in state_dict:
            self.bias = nn.Parameter(state_dict[f"{prefix}bias"], requires_grad=False)


class _Product(torch.autograd.Function):
    """x W^T with W dense for the moment of each product; the packed weight alone waits for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.layer.dequantize(gradient.dtype), None


def _read_state(tensor: Tensor, where: str) -> dict[str, Any]:
    """Return the description that bitsandbytes keeps beside a weight, or say what in it is not computed here."""
    try:
        values: dict[str, Any] = json.loads(bytes(tensor.cpu().tolist()))
    except ValueError as error:
        raise CheckpointError(f"{where} is no JSON ({error}). Fetch or save the model again.") from None
    known = {"quant_type": "nf4", "blocksize": BLOCK, "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    for name, value in known.items():
        if values.get(name, value) != value:
            raise CheckpointError(
                f"{where}: {name} is {values[name]!r}; computed here: {value!r}. Load the model before quantization."
            )
    if values.get("dtype") not in _DTYPES:
        raise CheckpointError(f"{where}: dtype is {values.get('dtype')!r}; known: {', '.join(_DTYPES)}.")
    return values


def nf4_config(double_quant: bool, skipped: list[str], dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Return the ``quantization_config`` of a model's config.json, as transformers writes it."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }


def swap_for_nf4(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Replace the linear layers of an empty model that ``config`` says are quantized; return their names.

    Raises:
        ConfigError: The folder was quantized in another way than to NF4.
    """
    seen = {"load_in_4bit": config.get("load_in_4bit"), "bnb_4bit_quant_type": config.get("bnb_4bit_quant_type")}
    for (name, value), known in zip(seen.items(), (True, "nf4"), strict=True):
        if value != known:
            raise ConfigError(
                f"quantization_config: {name} is {value!r}; of bitsandbytes, {known!r} alone is computed here. "
                "Load the model before quantization."
            )
    skipped = config.get("llm_int8_skip_modules") or ["lm_head"]
    double_quant = bool(config.get("bnb_4bit_use_double_quant"))
    return _swap(
        model,
        lambda name: any(name == s or name.endswith(f".{s}") or f".{s}." in f".{name}." for s in skipped),
        lambda layer: NF4Linear(
            layer.in_features,
            layer.out_features,
            double_quant=double_quant,
            bias=layer.bias is not None,
            dtype=layer.weight.dtype,
            device=layer.weight.device,
        ),
    )


def to_nf4(model: nn.Module, *, double_quant: bool = True, skipped: tuple[str, ...] = ("lm_head",)) -> list[str]:
    """Put NF4 layers in the place of a model's dense linear layers; return their names.

    Args:
        skipped: Names, or ends of names, of layers that stay dense.
    """
    names = _swap(
        model,
        lambda name: any(name == s or name.endswith(f".{s}") for s in skipped),
        lambda layer: NF4Linear.from_linear(layer, double_quant=double_quant),
    )
    model.quantization_config = nf4_config(double_quant, list(skipped))  # type: ignore[assignment]
    return names


def _swap(model: nn.Module, is_skipped: Callable[[str], bool], make: Callable[[nn.Linear], NF4Linear]) -> list[str]:
    replaced = []
    for name, layer in list(linears(model)):
        if type(layer) is nn.Linear and not is_skipped(name):
            replace_module(model, name, make(layer))
            replaced.append(name)
            is_real = layer.weight.device.type == "cpu" and not isinstance(layer.weight, FakeTensor)
            if is_real:  # a mapped file's pages would count as long as the map stands
                let_pages_go(layer.weight.data_ptr(), layer.weight.numel() * layer.weight.element_size())
    return replaced
