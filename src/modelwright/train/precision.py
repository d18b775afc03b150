"""Number formats of training: weights stay float32, products are computed in what the machine does fast.

bf16 has the range of float32 and needs nothing else. fp16 does not: small gradients would become zero, so the loss is
multiplied by a scale before the backward pass and the gradients divided by it after; a gradient that overflows halves
the scale and skips the update, and after a while without one the scale doubles. fp8 computes the products of large
linear layers in 8 bits on a GPU that has them (`modelwright.nn.float8`).

Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2 (loss scaling); Micikevicius et al. 2022,
arXiv:2209.05433 (fp8). Not here: weights kept in 16 bits.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.device import has_fast_bf16
from modelwright.base.errors import ConfigError, DeviceError
from modelwright.base.logs import get_logger
from modelwright.nn.float8 import MULTIPLE, use_float8

logger = get_logger(__name__)
PRECISIONS = ("bf16", "fp16", "fp32", "fp8")
FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000  # steps without an overflow after which the scale doubles
MIN_SCALE = 2.0**-14  # below it, the gradients themselves are not finite
# fp8 products: NVIDIA Ada (8.9), Hopper (9.0) and later.
FIRST_FP8_CAPABILITY = (8, 9)


class Precision:
    """One number format on one device: the context of a forward pass, and the scale of its loss."""

    def __init__(self, name: str | None, device: torch.device):
        self.name = name or ("bf16" if has_fast_bf16(device) else "fp32")
        self.device = device
        if self.name == "fp8":
            _refuse_without_fp8(device)
        self.scale = FIRST_SCALE if self.name == "fp16" else 1.0
        self.num_good = 0  # updates since the last overflow or growth

    def convert(self, model: nn.Module) -> nn.Module:
        """Return the model with trained weights in float32, and its large linear layers in fp8 where that is asked for.

        An update below 1/256 of a bfloat16 weight is rounded away: at a rate of 1e-5 such a weight would never move.
        """
        if any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
            logger.info("the weights stand in 16 bits and are trained: they are put into float32")
            model = model.float()
        if self.name == "fp8" and not use_float8(model):
            raise ConfigError(
                f"loop.precision is 'fp8', but {type(model).__name__} has no linear layer whose sides are multiples of "
                f"{MULTIPLE}. Use bf16."
            )
        return model

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the loss is computed."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        dtype = torch.float16 if self.name == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype)

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide the gradients by the scale of the loss, in place."""
        if self.name == "fp16" and gradients:
            torch._foreach_mul_(gradients, 1.0 / self.scale)

    def has_overflowed(self, norm: float) -> bool:
        """Tell whether the update must be skipped because the scale was too large, and move the scale."""
        if self.name != "fp16":
            return False
        if norm - norm != 0 and self.scale > MIN_SCALE:  # infinite or NaN
            self.scale, self.num_good = self.scale / 2, 0
            return True
        self.num_good += 1
        if self.num_good >= GROWTH_STEPS:
            self.scale, self.num_good = self.scale * 2, 0
        return False

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {"scale": self.scale, "num_good": self.num_good}

    def load_state(self, state: dict[str, float]) -> None:
        """Go to what `state` returned."""
        self.scale, self.num_good = float(state["scale"]), int(state["num_good"])


def check_precision(name: str | None) -> None:
    """Refuse a number format that does not exist.

    Raises:
        ConfigError: It is none of bf16, fp16, fp32 and fp8.
    """
    if name is not None and name not in PRECISIONS:
        raise ConfigError(
            f"loop.precision is {name!r}; known: {', '.join(PRECISIONS)}. Leave it out for the best here."
        )


def _refuse_without_fp8(device: torch.device) -> None:
    if device.type != "cuda":
        raise DeviceError(
            f"loop.precision is 'fp8', and the device is {device.type}: 8-bit products need an NVIDIA GPU of "
            "compute capability 8.9 or more (Ada, Hopper, Blackwell). Use bf16."
        )
    found = torch.cuda.get_device_capability(device)
    if found < FIRST_FP8_CAPABILITY:
        raise DeviceError(
            f"loop.precision is 'fp8', and {torch.cuda.get_device_name(device)} has compute capability "
            f"{found[0]}.{found[1]}; 8-bit products need 8.9 or more. Use bf16."
        )
