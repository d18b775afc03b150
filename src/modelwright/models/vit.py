"""ViT: an image cut into patches, read like a sentence by a pre-norm encoder.

`ViT` is the encoder with its pooler (the first token through a layer and tanh); `ViTClassifier` has a linear layer on
the first token instead. Images of other sizes than the trained one are taken when asked for: the positions are then
interpolated.

Source: Dosovitskiy et al. 2020, arXiv 2010.11929. Not here: dropout, masked image modelling.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.models.towers import ImageOutput, VisionConfig, block_names, make_blocks, make_patches, prefix_names

BLOCK = {
    "attention.q": "attention.attention.query",
    "attention.k": "attention.attention.key",
    "attention.v": "attention.attention.value",
    "attention.o": "attention.output.dense",
    "attention_norm": "layernorm_before",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "layernorm_after",
}


@dataclass(frozen=True)
class ViTConfig:
    """How a ViT is built; the defaults are those of ViT base with patches of 16."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    qkv_bias: bool = True
    pooler_size: int | None = None  # None: hidden_size
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")  # of the classifier, in the order of its outputs
    architecture: str = "ViTModel"  # or ViTForImageClassification

    def __post_init__(self) -> None:
        if self.pooler_size is None:
            object.__setattr__(self, "pooler_size", self.vision.hidden_size)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "ViTConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute.
        """
        if values.get("pooler_act", "tanh") != "tanh":
            raise ConfigError(f"pooler_act is {values['pooler_act']!r}; the pooler here computes 'tanh' only.")
        named = values.get("id2label") or {}
        labels = tuple(named[key] for key in sorted(named, key=int))
        return cls(
            vision=VisionConfig.from_hf({"model_type": "vit", **values}),
            qkv_bias=values.get("qkv_bias", True),
            pooler_size=values.get("pooler_output_size"),
            labels=labels or cls.labels,
            architecture=(values.get("architectures") or ["ViTModel"])[0],
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        return {
            "architectures": [self.architecture],
            **self.vision.to_hf(),
            "qkv_bias": self.qkv_bias,
            "pooler_output_size": self.pooler_size,
            "pooler_act": "tanh",
            "id2label": {str(i): name for i, name in enumerate(self.labels)},
            "label2id": {name: i for i, name in enumerate(self.labels)},
        }


class ClassifierOutput(NamedTuple):
    """What a classifier returns."""

    logits: Tensor  # (B, labels)


class ViT(nn.Module):
    """The encoder. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[type[ViTConfig]] = ViTConfig
    published_names: ClassVar[dict[str, str]] = {
        "patches.project": "embeddings.patch_embeddings.projection",
        "patches.class_token": "embeddings.cls_token",
        "patches.positions": "embeddings.position_embeddings",
        **block_names("layers.*", "encoder.layer.*", BLOCK),
        "norm": "layernorm",
        "pooler": "pooler.dense",
    }
    optional_prefix: ClassVar[str] = "vit."  # in front of every name, in checkpoints that had a task head
    optional_modules: ClassVar[tuple[str, ...]] = ("pooler",)

    def __init__(self, config: ViTConfig, has_pooler: bool = True):
        super().__init__()
        c = config.vision
        self.config = replace(config, architecture="ViTModel")
        self.patches = make_patches(c, bias=True, class_shape=(1, 1, c.hidden_size), num_leading_axes=1)
        self.layers = make_blocks(c, config.qkv_bias)
        self.norm = nn.LayerNorm(c.hidden_size, c.norm_eps)
        assert config.pooler_size is not None
        self.pooler: nn.Linear | None = nn.Linear(c.hidden_size, config.pooler_size) if has_pooler else None

    def forward(self, pixel_values: Tensor, *, interpolate_positions: bool = False) -> ImageOutput:
        """Encode images (B, C, H, W), normalised as `modelwright.models.pixels.to_pixel_values` does.

        ``interpolate_positions`` lets images of other sizes in.
        """
        x = self.patches(pixel_values, interpolate_positions)  # (B, patches + 1, D)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return ImageOutput(x, None if self.pooler is None else torch.tanh(self.pooler(x[:, 0])))


class ViTClassifier(nn.Module):
    """A ViT that says which of some labels an image has; ``config.labels`` names them."""

    config_class: ClassVar[type[ViTConfig]] = ViTConfig
    published_names: ClassVar[dict[str, str]] = {
        **prefix_names(ViT.published_names, "vit", "vit"),
        "classifier": "classifier",
    }
    ignored_names: ClassVar[tuple[str, ...]] = ("vit.pooler.*",)  # carried along, not used

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = replace(config, architecture="ViTForImageClassification")
        self.vit = ViT(config, has_pooler=False)
        self.classifier = nn.Linear(config.vision.hidden_size, len(config.labels))

    def forward(self, pixel_values: Tensor, *, interpolate_positions: bool = False) -> ClassifierOutput:
        """Return the scores of each label for images (B, C, H, W); the arguments are those of `ViT`."""
        x = self.vit(pixel_values, interpolate_positions=interpolate_positions).last_hidden_state
        return ClassifierOutput(self.classifier(x[:, 0]))


ARCHITECTURES = {"ViTModel": ViT, "ViTForImageClassification": ViTClassifier}
