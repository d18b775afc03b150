"""The sizes of towers that see and read, and what is common in their published form.

`VisionConfig` and `TextConfig` are the parts that ViT, CLIP, SigLIP and LLaVA nest in their own configs. A tower that
is published alone and as a part of another model has its names once, without prefix; `prefix_names` puts them under
the name of the part.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from modelwright.base.errors import ConfigError
from modelwright.nn.block import PreNormBlock
from modelwright.nn.mlp import activation
from modelwright.nn.patches import PatchEmbedding

# ours -> published, the same in every family here
_SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "act": "hidden_act",
    "norm_eps": "layer_norm_eps",
}
_VISION = _SIZES | {"image_size": "image_size", "patch_size": "patch_size", "num_channels": "num_channels"}
_TEXT = _SIZES | {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}

# Published names of a pre-norm block's parts, as CLIP, SigLIP and LLaVA write them.
BLOCK_NAMES = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.out_proj",
    "attention_norm": "layer_norm1",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
    "mlp_norm": "layer_norm2",
}


@dataclass(frozen=True)
class VisionConfig:
    """How a tower that sees is built; the defaults are those of ViT base."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    image_size: int = 224  # height and width
    patch_size: int = 16
    num_channels: int = 3
    act: str = "gelu"
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        _check(self, ("image_size", "patch_size", "num_channels"))
        if self.image_size < self.patch_size:
            raise ConfigError(
                f"image_size is {self.image_size} and patch_size is {self.patch_size}; an image holds at least a patch."
            )

    @property
    def num_patches(self) -> int:
        """Patches of an image of ``image_size``."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], default: "VisionConfig") -> "VisionConfig":
        """Read a published vision config; what it leaves out is taken from the family's default."""
        return _read(values, default, _VISION)

    def to_hf(self) -> dict[str, Any]:
        """Return the published fields."""
        return {theirs: getattr(self, ours) for ours, theirs in _VISION.items()}


@dataclass(frozen=True)
class TextConfig:
    """How a tower that reads is built; the defaults are those of CLIP base."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_layers: int = 12
    num_heads: int = 8
    max_seq_len: int = 77
    act: str = "quick_gelu"
    norm_eps: float = 1e-5
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    pad_token_id: int | None = 1

    def __post_init__(self) -> None:
        _check(self, ("vocab_size", "max_seq_len"))

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], default: "TextConfig") -> "TextConfig":
        """Read a published text config; what it leaves out is taken from the family's default."""
        return _read(values, default, _TEXT)

    def to_hf(self) -> dict[str, Any]:
        """Return the published fields."""
        return {theirs: getattr(self, ours) for ours, theirs in _TEXT.items()}


def _check(config: Any, more: tuple[str, ...]) -> None:
    for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", *more):
        value = getattr(config, name)
        if not (isinstance(value, int) and value >= 1):
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1 (images are square).")
    if config.hidden_size % config.num_heads:
        raise ConfigError(
            f"hidden_size is {config.hidden_size} and num_heads is {config.num_heads}; the heads must divide it evenly."
        )
    activation(config.act)


def _read(values: Mapping[str, Any], default: Any, names: Mapping[str, str]) -> Any:
    """Return ``default`` with what a published config says; a square given as two equal sides is one size."""
    found = {}
    for ours, theirs in names.items():
        if theirs in values:
            value = values[theirs]
            is_square = isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]
            found[ours] = value[0] if is_square else value
    return replace(default, **found)


def read_parts(values: Mapping[str, Any], part: str, family: str) -> Mapping[str, Any]:
    """Return the ``text_config`` or ``vision_config`` of a published config.

    Old exports have ``text_config_dict`` beside it, whose values win.

    Raises:
        ConfigError: The part is not an object.
    """
    found = {**(values.get(part) or {}), **(values.get(f"{part}_dict") or {})}
    if not isinstance(values.get(part) or {}, Mapping):
        raise ConfigError(f"{part} of this {family} is {values[part]!r}; expected an object with its settings.")
    return found


def make_blocks(config: VisionConfig | TextConfig, bias: bool = True) -> nn.ModuleList:
    """Return a tower's blocks."""
    c = config
    return nn.ModuleList(
        PreNormBlock(
            c.hidden_size,
            c.num_heads,
            c.intermediate_size,
            act=c.act,
            norm_eps=c.norm_eps,
            place=(i, c.num_layers),
            bias=bias,
        )
        for i in range(c.num_layers)
    )


def make_patches(
    config: VisionConfig, *, bias: bool, class_shape: tuple[int, ...] | None, num_leading_axes: int = 0
) -> PatchEmbedding:
    """Return a tower's first layer; the arguments are those of `PatchEmbedding`."""
    return PatchEmbedding(
        config.hidden_size,
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_channels=config.num_channels,
        bias=bias,
        class_shape=class_shape,
        num_leading_axes=num_leading_axes,
    )


def block_names(ours: str, theirs: str, names: Mapping[str, str] = BLOCK_NAMES) -> dict[str, str]:
    """Return the published names of blocks: ``ours`` and ``theirs`` end in ``*``."""
    return {f"{ours}.{mine}": f"{theirs}.{published}" for mine, published in names.items()}


def prefix_names(names: Mapping[str, str], ours: str, theirs: str) -> dict[str, str]:
    """Put a part's names under its name, ours and the published one.

    >>> prefix_names({"norm": "post_layernorm"}, "vision", "vision_model")
    {'vision.norm': 'vision_model.post_layernorm'}
    """
    return {f"{ours}.{mine}": f"{theirs}.{published}" for mine, published in names.items()}
