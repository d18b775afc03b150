"""SigLIP: two towers trained by asking of every image and text alone whether they belong together.

The image's vector is made by one learned query that attends over all patches, the text's from its last token. The text
tower looks both ways, and its last token may be padding: texts are to be padded to the trained length.

Source: Zhai et al. 2023, arXiv 2303.15343, algorithm 1; Zhai et al. 2021, arXiv 2106.04560, section 2.3 (the head).
"""

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
from modelwright.nn.attention import attend
from modelwright.nn.init import STD
from modelwright.nn.mlp import Mlp

FIRST_SCALE, FIRST_BIAS = 2.302585, -10.0  # ln 10 and the share of true pairs, section 3.2


@dataclass(frozen=True)
class SiglipConfig:
    """How a SigLIP is built; the defaults are those of base with patches of 16."""

    text: TextConfig = field(default_factory=lambda: TextConfig.from_hf({"model_type": "siglip_text_model"}))
    vision: VisionConfig = field(default_factory=lambda: VisionConfig.from_hf({"model_type": "siglip_vision_model"}))

    def __post_init__(self) -> None:
        size = self.text.projection_size or self.text.hidden_size
        if size != self.vision.hidden_size or not self.vision.has_head:
            raise ConfigError(
                f"A text's vector has {size} numbers and an image's {self.vision.hidden_size} "
                f"(vision_use_head: {self.vision.has_head}); the two must be equal, and the image's tower needs a head."
            )

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "SiglipConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute.
        """
        return cls(
            text=TextConfig.from_hf(read_part(values, "text_config", "siglip_text_model")),
            vision=VisionConfig.from_hf(read_part(values, "vision_config", "siglip_vision_model")),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        return {
            "architectures": ["SiglipModel"],
            "model_type": "siglip",
            "text_config": self.text.to_hf(),
            "vision_config": self.vision.to_hf(),
        }


class AttentionPool(nn.Module):
    """One learned query attends over all patches; a feed-forward follows."""

    vector_names: ClassVar[tuple[str, ...]] = ("query",)

    def __init__(self, config: VisionConfig):
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.query = nn.Parameter(torch.empty(1, 1, size))
        # q, k and v one under the other, as they are published
        self.in_weight = nn.Parameter(torch.empty(3 * size, size))
        self.in_bias = nn.Parameter(torch.empty(3 * size))
        self.o = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size, config.norm_eps)
        self.mlp = Mlp(size, config.intermediate_size, act=config.act)

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Draw the query and the matrix from a normal distribution of deviation 0.02; the biases are zero."""
        for parameter in (self.query, self.in_weight):
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, STD, generator=generator))
        self.in_bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map states (B, S, D) to one vector each, (B, D)."""
        size = x.shape[-1]
        weights, biases = self.in_weight.split(size), self.in_bias.split(size)
        sources = (self.query.expand(len(x), 1, -1), x, x)
        q, k, v = (
            F.linear(source, weight, bias).unflatten(-1, (self.num_heads, -1))  # (B, 1 or S, N, H)
            for source, weight, bias in zip(sources, weights, biases, strict=True)
        )
        y = self.o(attend(q, k, v, scale=q.shape[-1] ** -0.5).flatten(2))  # (B, 1, D)
        return (y + self.mlp(self.norm(y)))[:, 0]


HEAD_NAMES = {
    "head.query": "head.probe",
    "head.in_weight": "head.attention.in_proj_weight",
    "head.in_bias": "head.attention.in_proj_bias",
    "head.o": "head.attention.out_proj",
    "head.norm": "head.layernorm",
    "head.mlp.up": "head.mlp.fc1",
    "head.mlp.down": "head.mlp.fc2",
}


class SiglipVision(VisionTower):
    """The tower that sees."""

    config_class: ClassVar[type[VisionConfig]] = VisionConfig
    published_names: ClassVar[dict[str, str]] = {n: f"vision_model.{v}" for n, v in (VISION_NAMES | HEAD_NAMES).items()}
    other_prefixes: ClassVar[dict[str, str]] = {"vision_model.": "vision_model.", "": "vision_model."}
    ignored_names: ClassVar[tuple[str, ...]] = POSITION_IDS

    def __init__(self, config: VisionConfig):
        super().__init__(config, has_class_token=False)
        self.head = AttentionPool(config) if config.has_head else None

    def forward(self, pixel_values: Tensor, *, interpolate_positions: bool = False) -> ImageOutput:
        """Encode images (B, C, H, W)."""
        x = self.norm(self.features(pixel_values, interpolate_positions=interpolate_positions))
        return ImageOutput(x, None if self.head is None else self.head(x))


class SiglipText(TextTower):
    """The tower that reads; its vector is that of the last token, padding or not."""

    config_class: ClassVar[type[TextConfig]] = TextConfig
    published_names: ClassVar[dict[str, str]] = {
        n: f"text_model.{v}" for n, v in (TEXT_NAMES | {"head": "head"}).items()
    }
    other_prefixes: ClassVar[dict[str, str]] = {"text_model.": "text_model.", "": "text_model."}
    ignored_names: ClassVar[tuple[str, ...]] = POSITION_IDS

    def __init__(self, config: TextConfig):
        super().__init__(config, is_causal=False)
        self.head = nn.Linear(config.hidden_size, config.projection_size or config.hidden_size)

    def forward(self, input_ids: Tensor, *, attention_mask: Tensor | None = None) -> TextOutput:
        """Encode ``input_ids`` (B, T); ``attention_mask`` (B, T) is 0 at padding, None where padding is to be read.

        The published models were trained reading padding, and their processor gives no mask.
        """
        x = self.hidden(input_ids, attention_mask)
        return TextOutput(x, self.head(x[:, -1]))


class Siglip(nn.Module):
    """The two towers. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[type[SiglipConfig]] = SiglipConfig
    published_names: ClassVar[dict[str, str]] = {
        **prefix_names(VISION_NAMES | HEAD_NAMES, "vision", "vision_model"),
        **prefix_names(TEXT_NAMES | {"head": "head"}, "text", "text_model"),
        "logit_scale": "logit_scale",
        "logit_bias": "logit_bias",
    }
    ignored_names: ClassVar[tuple[str, ...]] = POSITION_IDS

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        self.vision = SiglipVision(config.vision)
        self.text = SiglipText(config.text)
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1))

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Start from the paper's scale and bias."""
        self.logit_scale.fill_(FIRST_SCALE)
        self.logit_bias.fill_(FIRST_BIAS)

    def embed_images(self, pixel_values: Tensor, *, interpolate_positions: bool = False) -> Tensor:
        """Return the vectors (B, D), of length 1, of images (B, C, H, W)."""
        return F.normalize(self.vision(pixel_values, interpolate_positions=interpolate_positions).pooled, dim=-1)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the vectors (B, D), of length 1, of texts (B, T); the mask is that of `SiglipText`."""
        return F.normalize(self.text(input_ids, attention_mask=attention_mask).pooled, dim=-1)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, *, attention_mask: Tensor | None = None) -> PairOutput:
        """Score every image (B, C, H, W) with every text (B', T); a sigmoid of the score is a probability."""
        images, texts = self.embed_images(pixel_values), self.embed_texts(input_ids, attention_mask)
        logits = images @ texts.T * self.logit_scale.exp() + self.logit_bias  # (images, texts)
        return PairOutput(logits, logits.T, images, texts)


def sigmoid_loss(logits_per_image: Tensor) -> Tensor:
    """Return the sum over all B x B pairs of -log sigmoid(+-score), divided by B; pair i stands in row and column i.

    >>> float(sigmoid_loss(torch.zeros(3, 3)))  # 3 ln 2
    2.079441547393799
    """
    if logits_per_image.dim() != 2 or logits_per_image.shape[0] != logits_per_image.shape[1]:
        raise RequestError(
            f"The scores have shape {tuple(logits_per_image.shape)}; the loss needs as many texts as images, in pairs."
        )
    is_pair = 2 * torch.eye(len(logits_per_image), device=logits_per_image.device) - 1  # +1 and -1
    return -F.logsigmoid(is_pair * logits_per_image).sum() / len(logits_per_image)


ARCHITECTURES = {"SiglipModel": Siglip}
VISION_ARCHITECTURES = {"SiglipVisionModel": SiglipVision}
TEXT_ARCHITECTURES = {"SiglipTextModel": SiglipText}
