"""Rotary position embedding: turn each pair of a query's or key's numbers by an angle that grows with its position.

Pairs are number i and number i + H/2 of a head ("half-split", the layout of the published Hugging Face weights); the
interleaved layout of the original Llama files needs its q and k rows permuted first. Angles, and the product with
them, are float32. The scalings `linear` (position interpolation) and `llama3` are here; others are refused by name.

Source: Su et al. 2021, "RoFormer", section 3.2.2; Chen et al. 2023, arXiv 2306.15595 (linear); the Llama 3.1 model
code (llama3). H: head size; S: positions in the table.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError

Rope = tuple[Tensor, Tensor]  # cos and sin, float32, each (B or 1, T, 1, H/2)


@dataclass(frozen=True)
class RopeScaling:
    """How the rotation is slowed down so that a model reaches beyond the length it was trained at."""

    kind: Literal["linear", "llama3"]
    factor: float  # how many times longer; at least 1
    low_freq_factor: float = 1.0  # llama3: wavelengths longer than original_max_seq_len / this are slowed in full
    high_freq_factor: float = 4.0  # llama3: wavelengths shorter than original_max_seq_len / this are left alone
    original_max_seq_len: int = 8192  # llama3: the length before the extension

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ConfigError(f"rope scaling is {self.kind!r}; known: linear, llama3. Use a model with one of these.")
        if not self.factor >= 1:
            raise ConfigError(f"rope scaling factor is {self.factor!r}; it must be at least 1.")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"rope scaling has low_freq_factor {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor}; the low one must be above 0 and below the high one."
            )


def scaling_from_hf(values: dict[str, Any] | None) -> RopeScaling | None:
    """Read ``rope_scaling`` (or ``rope_parameters``) of a published config.

    Raises:
        ConfigError: A kind of scaling that is not implemented, or a field it needs is not there.
    """
    values = values or {}
    kind = values.get("rope_type", values.get("type", "default"))
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"partial_rotary_factor is {values['partial_rotary_factor']}; only whole heads are rotated here (1.0)."
        )
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ConfigError(f"rope scaling is {kind!r}; known: default, linear, llama3. Use a model with one of these.")
    try:
        if kind == "linear":
            return RopeScaling("linear", float(values["factor"]))
        return RopeScaling(
            "llama3",
            float(values["factor"]),
            float(values["low_freq_factor"]),
            float(values["high_freq_factor"]),
            int(values["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise ConfigError(f"rope scaling {kind!r} needs the field {error}, which the config does not have.") from None


def scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Write a scaling as the ``rope_scaling`` of a published config."""
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
    }


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Return the angle, in radians, by which each pair turns per position: (H/2,), float32.

    >>> inverse_frequencies(4, 100.0)
    tensor([1.0000, 0.1000])
    """
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    # A pair of long wavelength is slowed, one of short wavelength kept, those between are blended. The order of the
    # operations is the published one: another rounding of a frequency would show at position 100,000.
    wavelength = 2 * math.pi / frequency  # in positions
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_seq_len
    kept = (length / wavelength - low) / (high - low)
    blended = (1 - kept) * frequency / scaling.factor + kept * frequency
    slowed = torch.where(wavelength > length / low, frequency / scaling.factor, blended)
    return torch.where(wavelength < length / high, frequency, slowed)


class RotaryTable(nn.Module):
    """cos and sin of every position, computed once.

    The tables are buffers that are not saved. They are made anew whenever the module is moved or cast: so they are
    right after ``to_empty`` (models are built on the meta device before loading) and stay float32 after
    ``model.to(torch.bfloat16)``, where a rounded angle would be wrong by whole turns at far positions.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_seq_len: int, theta: float, scaling: RopeScaling | None = None):
        super().__init__()
        self.head_dim, self.max_seq_len, self.theta, self.scaling = head_dim, max_seq_len, theta, scaling
        place = torch.empty(0)
        self.register_buffer("cos", place, persistent=False)
        self.register_buffer("sin", place, persistent=False)
        self.reset_buffers(place.device)

    def reset_buffers(self, device: torch.device) -> None:
        """Fill the tables, (S, H/2) float32, on ``device``."""
        if device.type == "meta":
            self.cos = self.sin = torch.empty(self.max_seq_len, self.head_dim // 2, device=device)
            return
        frequency = inverse_frequencies(self.head_dim, self.theta, self.scaling)
        angle = torch.arange(self.max_seq_len, dtype=torch.float32, device="cpu")[:, None] * frequency  # (S, H/2)
        self.cos, self.sin = angle.cos().to(device), angle.sin().to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> "RotaryTable":
        super()._apply(fn, recurse)
        self.reset_buffers(self.cos.device)
        return self

    def forward(self, seq_len: int, positions: Tensor | None = None) -> Rope:
        """Return cos and sin for ``positions`` (B, T), or for 0 .. seq_len - 1 when they are None."""
        if positions is None:
            return self.cos[None, :seq_len, None], self.sin[None, :seq_len, None]  # (1, T, 1, H/2)
        return self.cos[positions][:, :, None], self.sin[positions][:, :, None]  # (B, T, 1, H/2)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn ``x`` (B, T, N, H) by its positions' angles; the result has the dtype of ``x``."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)  # (B, T, N, H/2) each; times a float32 table gives float32
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
