"""CLIP: two towers, one that sees and one that reads, whose vectors are close where a text describes an image.

The image's vector is that of the class token, the text's that of its end token; both are mapped into one space and
brought to length 1. The scores are their products times a learned scale. The text tower looks back only.

Source: Radford et al. 2021, arXiv 2103.00020, section 2.3 and figure 3. Not here: the convolutional image towers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, RequestError
from modelwright.models.towers import (
    POSITION_IDS,
    TEXT_NAMES,
    VISION_NAMES,
    ImageOutput,
    PairOutput,
    TextConfig,
    TextOutput,
    TextTower,
    VisionConfig,
    VisionTower,
    prefix_names,
    read_part,
)

MAX_SCALE = 100.0  # beyond it training is unstable, section 2.5
# In the configs of the first release the end token has this id, which is not the id it has in the texts.
WRONG_EOS = 2


@dataclass(frozen=True)
class ClipConfig:
    """How a CLIP is built; the defaults are those of base with patches of 32."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=lambda: VisionConfig.from_hf({"model_type": "clip_vision_model"}))
    projection_size: int = 512  # of the common space
    first_scale: float = math.log(1 / 0.07)  # the logarithm of the scale that training starts with

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "ClipConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute.
        """
        return cls(
            text=TextConfig.from_hf(read_part(values, "text_config", "clip_text_model")),
            vision=VisionConfig.from_hf(read_part(values, "vision_config", "clip_vision_model")),
            projection_size=values.get("projection_dim", 512),
            first_scale=values.get("logit_scale_init_value", cls.first_scale),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "text_config": self.text.to_hf(),
            "vision_config": self.vision.to_hf(),
            "projection_dim": self.projection_size,
            "logit_scale_init_value": self.first_scale,
        }


class ClipVision(VisionTower):
    """The tower that sees; its vector is that of the class token."""

    config_class: ClassVar[type[VisionConfig]] = VisionConfig
    published_names: ClassVar[dict[str, str]] = {n: f"vision_model.{v}" for n, v in VISION_NAMES.items()}
    other_prefixes: ClassVar[dict[str, str]] = {"vision_model.": "vision_model.", "": "vision_model."}
    ignored_names: ClassVar[tuple[str, ...]] = POSITION_IDS

    def __init__(self, config: VisionConfig):
        super().__init__(config, has_class_token=True)

    def forward(self, pixel_values: Tensor, *, interpolate_positions: bool = False) -> ImageOutput:
        """Encode images (B, C, H, W); the states are not normed, the pooled vector is (as published)."""
        x = self.features(pixel_values, interpolate_positions=interpolate_positions)
        return ImageOutput(x, self.norm(x[:, 0]))


class ClipText(TextTower):
    """The tower that reads; its vector is that of the end token."""

    config_class: ClassVar[type[TextConfig]] = TextConfig
    published_names: ClassVar[dict[str, str]] = {n: f"text_model.{v}" for n, v in TEXT_NAMES.items()}
    other_prefixes: ClassVar[dict[str, str]] = {"text_model.": "text_model.", "": "text_model."}
    ignored_names: ClassVar[tuple[str, ...]] = POSITION_IDS

    def __init__(self, config: TextConfig):
        super().__init__(config, is_causal=True)
        if not isinstance(config.eos_token_id, int):
            raise ConfigError(f"eos_token_id is {config.eos_token_id!r}; CLIP's text tower needs one id to pool at.")
        self.eos_token_id = config.eos_token_id

    def forward(self, input_ids: Tensor, *, attention_mask: Tensor | None = None) -> TextOutput:
        """Encode ``input_ids`` (B, T); ``attention_mask`` (B, T) is 0 at padding."""
        x = self.hidden(input_ids, attention_mask)
        return TextOutput(x, x[torch.arange(len(x), device=x.device), self._ends(input_ids)])

    def _ends(self, input_ids: Tensor) -> Tensor:
        """Return where each text ends, (B,)."""
        if self.eos_token_id == WRONG_EOS:
            return input_ids.argmax(-1)  # the end token has the highest id; wrong once tokens are added after it
        is_end = input_ids.eq(self.eos_token_id)  # (B, T)
        if not torch.compiler.is_compiling() and not bool(is_end.any(-1).all()):
            raise RequestError(
                f"A text has no end token ({self.eos_token_id}), so there is no state to take its vector from. "
                "Let the tokenizer add it, and cut long texts before it, not after."
            )
        return is_end.int().argmax(-1)  # the first one: padding may be the same token


class Clip(nn.Module):
    """The two towers and the common space. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[type[ClipConfig]] = ClipConfig
    published_names: ClassVar[dict[str, str]] = {
        **prefix_names(VISION_NAMES, "vision", "vision_model"),
        **prefix_names(TEXT_NAMES, "text", "text_model"),
        "image_projection": "visual_projection",
        "text_projection": "text_projection",
        "logit_scale": "logit_scale",
    }
    ignored_names: ClassVar[tuple[str, ...]] = POSITION_IDS

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.vision = ClipVision(config.vision)
        self.text = ClipText(config.text)
        self.image_projection = nn.Linear(config.vision.hidden_size, config.projection_size, bias=False)
        self.text_projection = nn.Linear(config.text.hidden_size, config.projection_size, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.first_scale))

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Start from the scale that the config gives."""
        self.logit_scale.fill_(self.config.first_scale)

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the scale at most at 100; to be called after each step of training, not before it."""
        self.logit_scale.clamp_(0.0, math.log(MAX_SCALE))

    def embed_images(self, pixel_values: Tensor, *, interpolate_positions: bool = False) -> Tensor:
        """Return the vectors (B, E), of length 1, of images (B, C, H, W)."""
        pooled = self.vision(pixel_values, interpolate_positions=interpolate_positions).pooled
        return F.normalize(self.image_projection(pooled), dim=-1)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the vectors (B, E), of length 1, of texts (B, T); ``attention_mask`` is 0 at padding."""
        return F.normalize(self.text_projection(self.text(input_ids, attention_mask=attention_mask).pooled), dim=-1)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, *, attention_mask: Tensor | None = None) -> PairOutput:
        """Score every image (B, C, H, W) with every text (B', T)."""
        images, texts = self.embed_images(pixel_values), self.embed_texts(input_ids, attention_mask)
        logits = images @ texts.T * self.logit_scale.exp()  # (images, texts)
        return PairOutput(logits, logits.T, images, texts)


def contrastive_loss(logits_per_image: Tensor) -> Tensor:
    """Return the mean cross-entropy of choosing an image's text and a text's image; pair i stands in row and column i.

    Guessing costs ln B: a loss that stays there means that pairs do not belong together. With one pair it is 0.

    >>> float(contrastive_loss(torch.zeros(4, 4)))  # ln 4
    1.3862943649291992
    """
    if logits_per_image.dim() != 2 or logits_per_image.shape[0] != logits_per_image.shape[1]:
        raise RequestError(
            f"The scores have shape {tuple(logits_per_image.shape)}; the loss needs as many texts as images, in pairs."
        )
    pairs = torch.arange(len(logits_per_image), device=logits_per_image.device)
    return (F.cross_entropy(logits_per_image, pairs) + F.cross_entropy(logits_per_image.T, pairs)) / 2


ARCHITECTURES = {"CLIPModel": Clip}
VISION_ARCHITECTURES = {"CLIPVisionModel": ClipVision}
TEXT_ARCHITECTURES = {"CLIPTextModel": ClipText}
