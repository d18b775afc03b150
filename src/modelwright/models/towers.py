"""Towers that see and read: the sizes, layers and published names that ViT, CLIP, SigLIP and LLaVA share.

`VisionConfig` and `TextConfig` are the parts that these families nest in their own configs, and the whole config of a
tower that is published alone. A tower's names stand in a table once, without prefix; `prefix_names` puts them under
the name of the part.

Source: Dosovitskiy et al. 2020, arXiv 2010.11929; Radford et al. 2021, arXiv 2103.00020, section 2.4.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, RequestError
from modelwright.nn.attention import padding_mask
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
_VISION = _SIZES | {
    "family": "model_type",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "num_channels",
}
_TEXT = _SIZES | {
    "family": "model_type",
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

    family: str = "vit"  # the published model_type: vit, clip_vision_model or siglip_vision_model
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    image_size: int = 224  # height and width
    patch_size: int = 16
    num_channels: int = 3
    act: str = "gelu"
    norm_eps: float = 1e-12
    has_head: bool = True  # SigLIP: whether the attention that pools an image is there

    def __post_init__(self) -> None:
        _check(self, ("image_size", "patch_size", "num_channels"), VISION_DEFAULTS)
        if self.image_size < self.patch_size:
            raise ConfigError(
                f"image_size is {self.image_size} and patch_size is {self.patch_size}; an image holds at least a patch."
            )

    @property
    def num_patches(self) -> int:
        """Patches of an image of ``image_size``."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "VisionConfig":
        """Read a published vision config; what it leaves out is what is usual for its ``model_type``.

        Raises:
            ConfigError: The family is not known, images are not square, or sizes contradict each other.
        """
        default = _default(values, VISION_DEFAULTS)
        return replace(_read(values, default, _VISION), has_head=values.get("vision_use_head", default.has_head))

    def to_hf(self) -> dict[str, Any]:
        """Return the published fields."""
        values = {theirs: getattr(self, ours) for ours, theirs in _VISION.items()}
        return values | ({"vision_use_head": self.has_head} if self.family == "siglip_vision_model" else {})


@dataclass(frozen=True)
class TextConfig:
    """How a tower that reads is built; the defaults are those of CLIP base."""

    family: str = "clip_text_model"  # the published model_type: clip_text_model or siglip_text_model
    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_layers: int = 12
    num_heads: int = 8
    max_seq_len: int = 77
    act: str = "quick_gelu"
    norm_eps: float = 1e-5
    projection_size: int | None = None  # SigLIP: width of a text's vector; None: hidden_size
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    pad_token_id: int | None = 1

    def __post_init__(self) -> None:
        _check(self, ("vocab_size", "max_seq_len"), TEXT_DEFAULTS)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "TextConfig":
        """Read a published text config; what it leaves out is what is usual for its ``model_type``.

        Raises:
            ConfigError: The family is not known, or sizes contradict each other.
        """
        config = _read(values, _default(values, TEXT_DEFAULTS), _TEXT)
        is_siglip = config.family == "siglip_text_model"
        return replace(config, projection_size=values.get("projection_size") if is_siglip else None)

    def to_hf(self) -> dict[str, Any]:
        """Return the published fields."""
        values = {theirs: getattr(self, ours) for ours, theirs in _TEXT.items()}
        return values | ({} if self.projection_size is None else {"projection_size": self.projection_size})


# model_type -> fields that depart from the defaults above
VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": {},
    "clip_vision_model": {"patch_size": 32, "act": "quick_gelu", "norm_eps": 1e-5},
    "siglip_vision_model": {"act": "gelu_pytorch_tanh", "norm_eps": 1e-6},
}
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_text_model": {},
    "siglip_text_model": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_heads": 12,
        "max_seq_len": 64,
        "act": "gelu_pytorch_tanh",
        "norm_eps": 1e-6,
    },
}


def _default(values: Mapping[str, Any], defaults: Mapping[str, dict[str, Any]]) -> Any:
    make = VisionConfig if defaults is VISION_DEFAULTS else TextConfig
    family = values.get("model_type", make.family)
    return make(family=family, **defaults.get(family, {}))


def _check(config: Any, more: tuple[str, ...], families: Mapping[str, Any]) -> None:
    if config.family not in families:
        raise ConfigError(f"model_type is {config.family!r}; this tower is one of {', '.join(families)}.")
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


def read_part(values: Mapping[str, Any], part: str, family: str) -> dict[str, Any]:
    """Return the ``text_config`` or ``vision_config`` of a published config, with its ``model_type``.

    Old exports have ``text_config_dict`` beside it, which then stands for the whole part, as in the reference.

    Raises:
        ConfigError: The part is not an object.
    """
    found = values.get(f"{part}_dict") or values.get(part) or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"{part} is {found!r}; expected an object with the settings of the part.")
    return {"model_type": family, **found}


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


class ImageOutput(NamedTuple):
    """What a tower that sees returns."""

    last_hidden_state: Tensor  # (B, patches [+ 1], D), the class token first where there is one
    pooled: Tensor | None  # (B, D), one vector for the image; None where the weights have no pooler


class TextOutput(NamedTuple):
    """What a tower that reads returns."""

    last_hidden_state: Tensor  # (B, T, D)
    pooled: Tensor  # (B, D), one vector for the text


class PairOutput(NamedTuple):
    """What a model of images and texts returns; the vectors have length 1."""

    logits_per_image: Tensor  # (images, texts)
    logits_per_text: Tensor  # (texts, images)
    image_embeds: Tensor  # (images, E)
    text_embeds: Tensor  # (texts, E)


class VisionTower(nn.Module):
    """Patches and blocks; a family adds the norms and how one vector is made."""

    def __init__(self, config: VisionConfig, *, has_class_token: bool):
        super().__init__()
        self.config = config
        shape = (config.hidden_size,) if has_class_token else None
        self.patches = make_patches(config, bias=not has_class_token, class_shape=shape)
        self.pre_norm = nn.LayerNorm(config.hidden_size, config.norm_eps) if has_class_token else None
        self.layers = make_blocks(config)
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def features(self, pixel_values: Tensor, layer: int = -1, *, interpolate_positions: bool = False) -> Tensor:
        """Return the stream (B, patches [+ 1], D) after a block, before the last norm.

        Args:
            pixel_values: Images (B, C, H, W), prepared as `modelwright.models.pixels.to_pixel_values` does.
            layer: 0 is what goes into the first block, L what comes out of the last; below 0 counted from the end:
                -1 the last, -2 the one before it.
            interpolate_positions: Take images of other sizes.

        Raises:
            RequestError: There is no such layer.
        """
        stop = layer if layer >= 0 else len(self.layers) + 1 + layer
        if not 0 <= stop <= len(self.layers):
            raise RequestError(
                f"layer is {layer}; this tower has {len(self.layers)} blocks: 0 to {len(self.layers)}, or "
                f"-1 to {-len(self.layers) - 1}."
            )
        x = self.patches(pixel_values, interpolate_positions)  # (B, patches [+ 1], D)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        for block in self.layers[:stop]:
            x = block(x)
        return x


class TextTower(nn.Module):
    """Embeddings, learned positions, blocks and a last norm; a family adds how one vector is made."""

    def __init__(self, config: TextConfig, *, is_causal: bool):
        super().__init__()
        self.config, self.is_causal = config, is_causal
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_seq_len, config.hidden_size)
        self.layers = make_blocks(config)
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the stream (B, T, D) after the last norm; ``attention_mask`` (B, T) is 0 at padding.

        Raises:
            RequestError: The texts are longer than the tower reads.
        """
        length = input_ids.shape[1]
        if length > self.config.max_seq_len:
            raise RequestError(
                f"The texts have {length} tokens; this model reads at most {self.config.max_seq_len}. Shorten them.",
                code="context_length_exceeded",
            )
        mask = None
        if attention_mask is not None:
            # Looking back only, the first of left padding would see nothing at all; there it may see itself.
            is_token = attention_mask.to(torch.bool)[:, None, None, :]  # (B, 1, 1, S)
            mask = padding_mask(attention_mask) if self.is_causal else is_token
        x = self.embed(input_ids) + self.positions.weight[:length]  # (B, T, D)
        for layer in self.layers:
            x = layer(x, mask, is_causal=self.is_causal)
        return self.norm(x)


# Published names of the two towers, as CLIP and SigLIP write them.
VISION_NAMES = {
    "patches.project": "embeddings.patch_embedding",
    "patches.class_token": "embeddings.class_embedding",
    "patches.positions": "embeddings.position_embedding.weight",
    "pre_norm": "pre_layrnorm",  # so spelled
    **block_names("layers.*", "encoder.layers.*"),
    "norm": "post_layernorm",
}
TEXT_NAMES = {
    "embed": "embeddings.token_embedding",
    "positions": "embeddings.position_embedding",
    **block_names("layers.*", "encoder.layers.*"),
    "norm": "final_layer_norm",
}
POSITION_IDS = ("*.embeddings.position_ids",)  # 0, 1, 2, ..., once saved by mistake
