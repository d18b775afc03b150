"""Rotary position embedding: turn each pair of a query's or key's numbers by an angle that grows with its position.

Pairs are number i and number i + R/2 of a head (`rotate`: "half-split", the layout of the published Hugging Face
weights) or numbers 2i and 2i + 1 (`rotate_interleaved`: the layout of the paper, of the original Llama files and of
DeepSeek); `half_split_order` goes from the second to the first. Where R is less than the head size, the rest of the
head is not turned. Angles, and the product with them, are float32.

Scalings make a model reach beyond the length it was trained at. `linear`, `ntk`, `yarn`, `llama3` and `proportional`
fix the frequencies once; `dynamic` and `longrope` choose them by how long the sequence is now, so what is cached from
before such a change was turned otherwise than what comes after it (so it is in transformers, too; there a dynamic table
also stays stretched until a short sequence comes, here it depends on the present call alone).

Source: Su et al. 2021, "RoFormer", section 3.2.2; Chen et al. 2023, arXiv 2306.15595 (linear); bloc97 and emozilla 2023
(ntk, dynamic); Peng et al. 2023, arXiv 2309.00071 (yarn); the Llama 3.1 model code (llama3); Ding et al. 2024, arXiv
2402.13753, as in Phi-3 (longrope). Not here: multimodal sections ("mrope").
R: rotated numbers of a head; S: positions in the table.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, RequestError

Rope = tuple[Tensor, Tensor]  # cos and sin, float32, each (B or 1, T, 1, R/2), attention factor included
RopeKind = Literal["linear", "ntk", "dynamic", "yarn", "llama3", "longrope", "proportional"]
KINDS: tuple[str, ...] = get_args(RopeKind)


@dataclass(frozen=True)
class RopeScaling:
    """How the rotation is slowed down so that a model reaches beyond the length it was trained at.

    A field that the kind does not read must be left at its default.
    """

    kind: RopeKind
    factor: float = 1.0  # how many times longer; at least 1
    low_freq_factor: float = 1.0  # llama3: wavelengths longer than original_max_seq_len / this are slowed in full
    high_freq_factor: float = 4.0  # llama3: wavelengths shorter than original_max_seq_len / this are left alone
    original_max_seq_len: int = 8192  # llama3, yarn, dynamic, longrope: the length before the extension
    beta_fast: float = 32.0  # yarn: pairs that turn more often than this within the original length are left alone
    beta_slow: float = 1.0  # yarn: pairs that turn less often than this are slowed in full
    truncate: bool = True  # yarn: round the bounds between them to whole pairs
    attention_factor: float | None = None  # yarn, longrope: factor on cos and sin; None: by the paper
    mscale: float | None = None  # yarn, DeepSeek: weight of log(factor) in the attention factor
    mscale_all_dim: float | None = None  # yarn, DeepSeek: the same in its divisor
    short_factor: tuple[float, ...] = ()  # longrope: divisor of each pair's frequency up to the original length
    long_factor: tuple[float, ...] = ()  # longrope: the same beyond it
    rotated_fraction: float = 1.0  # proportional: part of the pairs that turn; the others stand still

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"rope scaling is {self.kind!r}; known: {', '.join(KINDS)}. Use one of these.")
        if not self.factor >= 1:
            raise ConfigError(f"rope scaling factor is {self.factor!r}; it must be at least 1.")
        if self.original_max_seq_len < 1:
            raise ConfigError(f"original_max_seq_len is {self.original_max_seq_len}; it must be at least 1.")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"rope scaling has low_freq_factor {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor}; the low one must be above 0 and below the high one."
            )
        if not 0 < self.beta_slow <= self.beta_fast:
            raise ConfigError(
                f"rope scaling has beta_slow {self.beta_slow} and beta_fast {self.beta_fast}; the slow one must be "
                "above 0 and at most the fast one."
            )
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise ConfigError(f"attention_factor is {self.attention_factor}; it must be above 0, or left out.")
        object.__setattr__(self, "short_factor", tuple(self.short_factor))
        object.__setattr__(self, "long_factor", tuple(self.long_factor))
        if self.kind == "longrope" and not (self.short_factor and len(self.short_factor) == len(self.long_factor)):
            raise ConfigError(
                f"longrope has {len(self.short_factor)} short and {len(self.long_factor)} long factors; it needs one "
                "of each for every rotated pair."
            )

    @property
    def is_length_dependent(self) -> bool:
        """Whether the frequencies change with the length of the sequence at hand."""
        return self.kind in ("dynamic", "longrope")


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """Return YaRN's temperature for a factor: 0.1 * weight * ln(factor) + 1. DeepSeek squares it into the scale.

    >>> yarn_mscale(1.0), round(yarn_mscale(4.0), 4)
    (1.0, 1.1386)
    """
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def attention_factor(scaling: RopeScaling | None) -> float:
    """Return the factor on cos and sin: it sharpens the softmax, whose entropy grows with the length."""
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    factor = scaling.factor
    if scaling.kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(scaling.original_max_seq_len)) if factor > 1 else 1.0
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(factor, scaling.mscale) / yarn_mscale(factor, scaling.mscale_all_dim)
    return yarn_mscale(factor)


def ntk_theta(theta: float, factor: float, rotary_dim: int) -> float:
    """Return the base that slows the slowest pair by ``factor`` and leaves the fastest alone."""
    return float(theta * factor ** (rotary_dim / (rotary_dim - 2)))


def inverse_frequencies(
    rotary_dim: int, theta: float, scaling: RopeScaling | None = None, seq_len: int | None = None
) -> Tensor:
    """Return the angle, in radians, by which each pair turns per position: (R/2,), float32.

    ``seq_len`` matters to `dynamic` and `longrope` alone; None means at most the original length.

    >>> inverse_frequencies(4, 100.0)
    tensor([1.0000, 0.1000])
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(f"{rotary_dim} numbers of a head are to be rotated; pairs need an even number, at least 2.")
    # The order of the operations is the published one throughout: another rounding of a frequency would show at
    # position 100,000.
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
    if scaling is None:
        return 1.0 / theta**exponent
    match scaling.kind:
        case "linear":
            return 1.0 / theta**exponent / scaling.factor
        case "ntk":
            return 1.0 / _raised(theta, scaling.factor, rotary_dim) ** exponent
        case "dynamic":
            original = scaling.original_max_seq_len
            stretch = scaling.factor * max(seq_len or 0, original) / original - (scaling.factor - 1)
            return 1.0 / _raised(theta, stretch, rotary_dim) ** exponent
        case "yarn":
            return _yarn(rotary_dim, theta, scaling)
        case "llama3":
            return _llama3(1.0 / theta**exponent, scaling)
        case "longrope":
            return _longrope(theta**exponent, scaling, seq_len or 0)
    turning = int(scaling.rotated_fraction * rotary_dim // 2)  # proportional
    return (
        torch.where(torch.arange(rotary_dim // 2, device="cpu") < turning, 1.0 / theta**exponent, 0.0) / scaling.factor
    )


def _raised(theta: float, factor: float, rotary_dim: int) -> float:
    if rotary_dim == 2 and factor != 1:
        raise ConfigError("NTK scaling of 2 rotated numbers divides by zero; it needs at least 4, or linear scaling.")
    return theta if factor == 1 else ntk_theta(theta, factor, rotary_dim)


def _yarn(rotary_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Slow the pairs that turn less than beta_slow times in the original length, blend up to beta_fast turns."""

    def pair_that_turns(times: float) -> float:
        length = scaling.original_max_seq_len
        return rotary_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:  # a ramp of no width would divide by zero
        high += 0.001
    wavelength = theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim)  # / 2 pi
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * wavelength) * (1 - kept) + 1.0 / wavelength * kept


def _llama3(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow a pair of long wavelength, keep one of short wavelength, blend those between."""
    wavelength = 2 * math.pi / frequency  # in positions
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_seq_len
    kept = (length / wavelength - low) / (high - low)
    blended = (1 - kept) * frequency / scaling.factor + kept * frequency
    slowed = torch.where(wavelength > length / low, frequency / scaling.factor, blended)
    return torch.where(wavelength < length / high, frequency, slowed)


def _longrope(wavelength: Tensor, scaling: RopeScaling, seq_len: int) -> Tensor:
    factors = scaling.long_factor if seq_len > scaling.original_max_seq_len else scaling.short_factor
    if len(factors) != len(wavelength):
        raise ConfigError(
            f"longrope has {len(factors)} factors and the heads {len(wavelength)} rotated pairs; give one for each."
        )
    return 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * wavelength)


class RotaryTable(nn.Module):
    """cos and sin of every position, computed once.

    The tables are buffers that are not saved. They are made anew whenever the module is moved or cast: so they are
    right after ``to_empty`` (models are built on the meta device before loading) and stay float32 after
    ``model.to(torch.bfloat16)``, where a rounded angle would be wrong by whole turns at far positions.

    ``rotary_dim`` is the head size, or the part of it that is rotated. Sequences beyond the original length of a
    scaling that depends on the length are computed when they come, however long.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, rotary_dim: int, max_seq_len: int, theta: float, scaling: RopeScaling | None = None):
        super().__init__()
        self.rotary_dim, self.max_seq_len, self.theta, self.scaling = rotary_dim, max_seq_len, theta, scaling
        self.num_positions = max_seq_len  # rows of the table
        if scaling is not None and scaling.is_length_dependent:
            self.num_positions = min(max_seq_len, scaling.original_max_seq_len)
        place = torch.empty(0)
        self.register_buffer("cos", place, persistent=False)
        self.register_buffer("sin", place, persistent=False)
        self.reset_buffers(place.device)

    def reset_buffers(self, device: torch.device) -> None:
        """Fill the tables, (S, R/2) float32, on ``device``."""
        if device.type == "meta":
            self.cos = self.sin = torch.empty(self.num_positions, self.rotary_dim // 2, device=device)
            return
        self.cos, self.sin = self._turn(torch.arange(self.num_positions, device="cpu"), None, device)

    def _turn(self, positions: Tensor, seq_len: int | None, device: torch.device) -> Rope:
        """Return cos and sin of ``positions`` (...), each (..., R/2)."""
        frequency = inverse_frequencies(self.rotary_dim, self.theta, self.scaling, seq_len).to(positions.device)
        angle = positions[..., None].float() * frequency
        factor = attention_factor(self.scaling)
        cos, sin = angle.cos(), angle.sin()
        return (cos if factor == 1 else cos * factor).to(device), (sin if factor == 1 else sin * factor).to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> "RotaryTable":
        super()._apply(fn, recurse)
        self.reset_buffers(self.cos.device)
        return self

    def forward(self, seq_len: int, positions: Tensor | None = None) -> Rope:
        """Return cos and sin for ``positions`` (B, T), or for 0 .. seq_len - 1 when they are None.

        Raises:
            RequestError: More positions than the table was built for.
        """
        if self.scaling is not None and self.scaling.is_length_dependent:
            # The longest row decides for all, as in transformers.
            total = seq_len if positions is None else int(positions.max()) + 1
            if total > self.scaling.original_max_seq_len and not self.cos.is_meta:
                at = torch.arange(seq_len, device=self.cos.device)[None] if positions is None else positions
                cos, sin = self._turn(at, total, self.cos.device)  # (B or 1, T, R/2)
                return cos[:, :, None], sin[:, :, None]
        if positions is None:
            if seq_len > self.num_positions:
                raise RequestError(
                    f"{seq_len} positions are asked of a rotary table of {self.num_positions}. Shorten the input, or "
                    "build the model with a larger max_seq_len.",
                    code="context_length_exceeded",
                )
            return self.cos[None, :seq_len, None], self.sin[None, :seq_len, None]  # (1, T, 1, R/2)
        return self.cos[positions][:, :, None], self.sin[positions][:, :, None]  # (B, T, 1, R/2)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn ``x`` (B, T, N, H), half-split, by its positions' angles; the result has the dtype of ``x``.

    A table of fewer than H/2 pairs turns the first numbers of each head and leaves the others.
    """
    cos, sin = rope
    size = 2 * cos.shape[-1]
    first, second = x[..., :size].chunk(2, dim=-1)  # (B, T, N, R/2) each; times a float32 table gives float32
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), dim=-1)


def rotate_interleaved(x: Tensor, rope: Rope) -> Tensor:
    """Turn ``x`` (B, T, N, H) whose pairs are neighbours (2i, 2i + 1); otherwise as `rotate`."""
    cos, sin = rope
    size = 2 * cos.shape[-1]
    first, second = x[..., 0:size:2], x[..., 1:size:2]  # (B, T, N, R/2)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2).to(x.dtype)
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), dim=-1)


def half_split_order(head_dim: int, rotary_dim: int | None = None) -> Tensor:
    """Return where each number of a half-split head lies in an interleaved one: ``half = interleaved[..., order]``.

    For a weight of shape (N * H, D): ``weight.view(N, H, D)[:, order].reshape(N * H, D)``; ``order.argsort()`` goes
    the other way. Rows of q and k alone are reordered, and their biases.

    >>> half_split_order(8, 6).tolist()
    [0, 2, 4, 1, 3, 5, 6, 7]
    """
    size = head_dim if rotary_dim is None else rotary_dim
    return torch.cat((torch.arange(0, size, 2), torch.arange(1, size, 2), torch.arange(size, head_dim)))


# --- published configs ------------------------------------------------------------------------------------------

# our field -> published field, for each kind; a published name that another kind reads is refused, not ignored
_PUBLISHED: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor", "original_max_seq_len": "original_max_position_embeddings"},
    "yarn": {
        "factor": "factor",
        "original_max_seq_len": "original_max_position_embeddings",
        **{name: name for name in ("beta_fast", "beta_slow", "truncate", "attention_factor")},
        **{name: name for name in ("mscale", "mscale_all_dim")},
    },
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_seq_len": "original_max_position_embeddings",
    },
    "longrope": {
        "factor": "factor",
        "original_max_seq_len": "original_max_position_embeddings",
        **{name: name for name in ("short_factor", "long_factor", "attention_factor")},
    },
    "proportional": {"factor": "factor", "rotated_fraction": "partial_rotary_factor"},
}
_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "proportional": (),
}
_SECTIONS = ("mrope_section", "short_mscale", "long_mscale")  # change the result and are not computed here


class RopeSettings(NamedTuple):
    """What a published config says of the rotation of one kind of layer."""

    theta: float
    scaling: RopeScaling | None
    rotary_fraction: float  # part of each head that is rotated


def rope_from_hf(values: Mapping[str, Any], layer_type: str | None = None) -> RopeSettings:
    """Read the rotation from a whole published config, as transformers 5 and its forerunners spell it.

    Args:
        values: The config: ``rope_parameters``, or ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor``.
        layer_type: Where ``rope_parameters`` holds a dictionary for each kind of layer: which one.

    Raises:
        ConfigError: A scaling that is not known, a field that is missing, or fields that contradict each other.
    """
    new, old = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    if layer_type is not None and isinstance(new.get(layer_type), dict):
        new = new[layer_type]
    elif any(isinstance(value, dict) for value in new.values()):
        raise ConfigError(f"rope_parameters has a part for each of {sorted(new)}; layer_type is {layer_type!r}.")
    if new and old:
        for name in new.keys() & old.keys():
            if new[name] != old[name]:
                raise ConfigError(
                    f"rope_parameters has {name} {new[name]!r} and rope_scaling {old[name]!r}; remove one of the two."
                )
    rope = {**old, **new}
    theta = rope.get("rope_theta", values.get("rope_theta"))
    fraction = float(rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) or 1.0)
    if not 0 < fraction <= 1:
        raise ConfigError(f"partial_rotary_factor is {fraction}; it must be above 0 and at most 1.")
    if _kind_of(rope) != "proportional":
        rope.pop("partial_rotary_factor", None)
    scaling = scaling_from_hf(
        rope, values.get("max_position_embeddings"), values.get("original_max_position_embeddings")
    )
    if scaling is not None and scaling.kind == "proportional":
        fraction = 1.0
    return RopeSettings(10000.0 if theta is None else float(theta), scaling, fraction)


def rope_to_hf(
    theta: float, scaling: RopeScaling | None, rotary_dim: int, head_dim: int | None = None
) -> dict[str, Any]:
    """Write the rotation as the ``rope_parameters`` of transformers 5: kind, theta, fraction and scaling in one.

    NTK-aware scaling has no published name; it is written as what it is, a larger theta.
    """
    if scaling is not None and scaling.kind == "ntk":
        theta, scaling = _raised(theta, scaling.factor, rotary_dim), None
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if head_dim is not None and head_dim != rotary_dim:
        values["partial_rotary_factor"] = rotary_dim / head_dim
    return values | (scaling_to_hf(scaling) or {})


def _kind_of(values: Mapping[str, Any]) -> str:
    new, old = values.get("rope_type"), values.get("type")
    if new is not None and old is not None and new != old:
        raise ConfigError(f"rope scaling has rope_type {new!r} and type {old!r}; they must agree, or one be left out.")
    kind = str(new or old or "default")
    return "longrope" if kind == "su" else kind  # Phi-3's first name for it


def scaling_from_hf(
    values: Mapping[str, Any] | None, max_seq_len: int | None = None, original_max_seq_len: int | None = None
) -> RopeScaling | None:
    """Read ``rope_scaling`` (or ``rope_parameters``) of a published config.

    Args:
        values: The dictionary, or None.
        max_seq_len: The config's ``max_position_embeddings``: some kinds fall back to it.
        original_max_seq_len: ``original_max_position_embeddings`` where it stands beside the dictionary (Phi-3).

    Raises:
        ConfigError: A kind of scaling that is not known, a field it needs is not there, or one that it does not read.
    """
    values = values or {}
    kind = _kind_of(values)
    fraction = values.get("partial_rotary_factor", 1.0)
    if kind != "proportional" and fraction != 1.0:
        raise ConfigError(f"partial_rotary_factor is {fraction}; only whole heads are rotated by this model (1.0).")
    if kind != "default" and kind not in _PUBLISHED:
        known = ", ".join(("default", *_PUBLISHED))
        raise ConfigError(f"rope scaling is {kind!r}; known: {known}. Use a model with one of these.")
    _refuse_foreign_fields(kind, values)
    if kind == "default":
        return None
    given = {k: v for k, v in values.items() if v is not None}
    length = original_max_seq_len or given.get("original_max_position_embeddings") or max_seq_len
    if length is not None and kind != "llama3" or kind == "llama3" and original_max_seq_len:
        given["original_max_position_embeddings"] = length
    if kind in ("yarn", "longrope") and length is not None and max_seq_len is not None:
        given.setdefault("factor", max(max_seq_len / length, 1.0))
    for name in _NEEDED[kind]:
        if name not in given:
            raise ConfigError(f"rope scaling {kind!r} needs the field {name!r}, which the config does not have.")
    if kind == "dynamic" and max_seq_len is not None and given["original_max_position_embeddings"] != max_seq_len:
        raise ConfigError(
            f"rope scaling 'dynamic' has original_max_position_embeddings {length} and the config "
            f"max_position_embeddings {max_seq_len}; for this kind both are the length before the extension."
        )
    fields: dict[str, Any] = {}
    for ours, theirs in _PUBLISHED[kind].items():
        if theirs in given:
            fields[ours] = float(given[theirs]) if type(getattr(RopeScaling, ours, None)) is float else given[theirs]
    return RopeScaling(cast(RopeKind, kind), **fields)


def _refuse_foreign_fields(kind: str, values: Mapping[str, Any]) -> None:
    read = {*_PUBLISHED.get(kind, {}).values(), "original_max_position_embeddings", "partial_rotary_factor"}
    others = {name for fields in _PUBLISHED.values() for name in fields.values()} | set(_SECTIONS)
    for name in sorted(others - read):
        if values.get(name) is not None and not (name == "factor" and values[name] == 1):
            raise ConfigError(f"rope scaling {kind!r} has the field {name!r}, which it does not read; remove it.")


def scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Write a scaling as the ``rope_scaling`` of a published config.

    Raises:
        ConfigError: For `ntk`, which has no published name: `rope_to_hf` writes it as a larger theta.
    """
    if scaling is None:
        return None
    if scaling.kind == "ntk":
        raise ConfigError("rope scaling 'ntk' has no published name; write it as a larger rope_theta (rope_to_hf).")
    values: dict[str, Any] = {"rope_type": scaling.kind}
    for ours, theirs in _PUBLISHED[scaling.kind].items():
        value = getattr(scaling, ours)
        if value is not None:
            values[theirs] = list(value) if isinstance(value, tuple) else value
    return values
