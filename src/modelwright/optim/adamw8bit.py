"""AdamW that keeps its two moments in 8 bits, or out of the way of the device, or both.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    w <- w - lr decay w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

In 8 bits a weight's state is 2 bytes and two scales a block of 256 instead of 8 bytes. The update is computed in
float32 from the moments before they are rounded again; tensors of fewer than 4,096 numbers keep float32, as in
bitsandbytes.

Paged state stands where it can be put aside: in the page-locked memory of the host when the weights are on a GPU, in a
file mapped into memory when they are on the CPU (the system writes pages out when memory is short). It is brought in
piece by piece, so that at no time more than a piece of it is on the device.

Source: Loshchilov & Hutter 2019, arXiv:1711.05101; Dettmers et al. 2022, arXiv:2110.02861 (8 bits); Dettmers et al.
2023, arXiv:2305.14314, section 3 (paged). Not here: CUDA's unified memory, which moves pages on demand.
"""

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelwright.optim.dynamic8 import BLOCK, dequantize, quantize

MIN_8BIT = 4096  # smaller tensors keep float32
PIECE = 2**20  # numbers updated at once, a multiple of the block


class LeanAdamW(torch.optim.Optimizer):
    """AdamW with state of 8 or 32 bits, paged or not."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        num_bits: int = 8,
        is_paged: bool = False,
    ):
        """Make the optimizer; ``num_bits`` is 8 or 32."""
        if num_bits not in (8, 32):
            raise ValueError(f"num_bits is {num_bits}; moments are kept in 8 or 32 bits.")
        self.num_bits, self.is_paged = num_bits, is_paged
        self._pages = tempfile.TemporaryDirectory(prefix="moments-") if is_paged else None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        assert closure is None, "LeanAdamW takes no closure"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def state_bytes(self) -> int:
        """Return the size of all moments and scales."""
        tensors = (t for state in self.state.values() for t in state.values() if isinstance(t, Tensor))
        return sum(t.numel() * t.element_size() for t in tensors)

    def adopt(self, value: Any, weight: Tensor) -> Any:
        """Return a restored part of the state of ``weight`` where this optimizer keeps it."""
        if not isinstance(value, Tensor):
            return int(value)
        return self._make(value.numel(), value.dtype, weight).copy_(value)

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            self._begin(weight, state)
        state["step"] += 1
        flat, gradient = weight.view(-1), weight.grad
        assert gradient is not None
        gradient = gradient.reshape(-1)
        for start in range(0, flat.numel(), PIECE):
            part = slice(start, min(start + PIECE, flat.numel()))
            self._update_piece(flat[part], gradient[part].float(), state, start, group)

    def _begin(self, weight: Tensor, state: dict[str, Any]) -> None:
        num = weight.numel()
        state["step"] = 0
        if self.num_bits == 32 or num < MIN_8BIT:
            for name in ("mean", "square"):
                state[name] = self._make(num, torch.float32, weight)
            return
        num_blocks = -(-num // BLOCK)
        for name, is_signed in (("mean", True), ("square", False)):
            zero, _ = quantize(torch.zeros(BLOCK), is_signed)
            state[name] = self._make(num_blocks * BLOCK, torch.uint8, weight).fill_(int(zero[0]))
            state[f"{name}_scales"] = self._make(num_blocks, torch.float32, weight)

    def _make(self, num: int, dtype: torch.dtype, weight: Tensor) -> Tensor:
        if self._pages is None:
            return torch.zeros(num, dtype=dtype, device=weight.device)
        if weight.device.type == "cuda":
            return torch.zeros(num, dtype=dtype, pin_memory=True)
        name = Path(self._pages.name) / f"{len(list(Path(self._pages.name).iterdir()))}.moments"
        return torch.from_file(str(name), shared=True, size=num, dtype=dtype).zero_()

    def _update_piece(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], start: int, group: dict[str, Any]
    ) -> None:
        first, second = group["betas"]
        step, num = state["step"], weight.numel()
        mean, square = (self._read(state, name, start, num, weight.device) for name in ("mean", "square"))
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        if group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        divisor = square.sqrt().div_(math.sqrt(1 - second**step)).add_(group["eps"])
        weight.add_((mean / divisor).to(weight.dtype), alpha=-group["lr"] / (1 - first**step))
        for name, value in (("mean", mean), ("square", square)):
            self._write(state, name, start, value)

    def _read(self, state: dict[str, Any], name: str, start: int, num: int, device: torch.device) -> Tensor:
        kept: Tensor = state[name]
        if kept.dtype != torch.uint8:
            piece = kept[start : start + num]
            return piece if piece.device == device else piece.to(device, non_blocking=True)
        padded = -(-num // BLOCK) * BLOCK
        codes = kept[start : start + padded].to(device, non_blocking=True)
        scales = state[f"{name}_scales"][start // BLOCK : (start + padded) // BLOCK].to(device, non_blocking=True)
        return dequantize(codes, scales, name == "mean")[:num]

    def _write(self, state: dict[str, Any], name: str, start: int, value: Tensor) -> None:
        kept: Tensor = state[name]
        num = value.numel()
        if kept.dtype != torch.uint8:
            if kept.device != value.device:
                kept[start : start + num].copy_(value, non_blocking=True)
            return  # else the moment itself was changed
        padded = -(-num // BLOCK) * BLOCK
        whole = torch.nn.functional.pad(value, (0, padded - num))
        codes, scales = quantize(whole, name == "mean")
        kept[start : start + padded].copy_(codes, non_blocking=True)
        state[f"{name}_scales"][start // BLOCK : (start + padded) // BLOCK].copy_(scales, non_blocking=True)
