"""LLaVA: a language model of the Llama family that sees, through the patches of a CLIP or SigLIP tower.

The patches' states of a layer near the tower's end (the last but one, class token left out) go through a projector of
two layers, and take the places of image tokens in the text. From there on they are tokens like others. The ids of
these tokens come from the config; the tokenizer, which writes as many of them as an image has patches, is not the
model's affair.

Source: Liu et al. 2023, arXiv 2304.08485, section 4.1; Liu et al. 2023, arXiv 2310.03744, section 3.3 (1.5: the
projector). Not here: tiles of large images (LLaVA-NeXT), several feature layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, RequestError
from modelwright.models.clip import ClipVision
from modelwright.models.decoder import CausalOutput, LayerCache
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.siglip import HEAD_NAMES, SiglipVision
from modelwright.models.towers import POSITION_IDS, VISION_NAMES, VisionConfig, prefix_names, read_part
from modelwright.nn.attention import padding_mask
from modelwright.nn.decode_state import KVState
from modelwright.nn.mlp import activation

TOWERS: dict[str, type[ClipVision] | type[SiglipVision]] = {
    "clip_vision_model": ClipVision,
    "siglip_vision_model": SiglipVision,
}
# What published text configs leave out where it is usual for Llama, and the tower where none is described.
LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True)
class LlavaConfig:
    """How a LLaVA is built."""

    text: LlamaConfig
    vision: VisionConfig
    image_token_id: int = 32000  # stands in the text once for each patch
    feature_layer: int = -2  # of the tower: 0 goes into its first block, -1 comes out of its last
    is_class_token_kept: bool = False
    projector_act: str = "gelu"
    projector_bias: bool = True

    def __post_init__(self) -> None:
        activation(self.projector_act)
        if self.vision.family not in TOWERS:
            raise ConfigError(f"vision_config is of the family {self.vision.family!r}; known: {', '.join(TOWERS)}.")
        if not 0 <= self.image_token_id < self.text.vocab_size:
            raise ConfigError(
                f"image_token_id is {self.image_token_id}; it must be one of the {self.text.vocab_size} ids of the "
                "vocabulary. Extend the vocabulary, or name the id that the tokenizer writes."
            )

    @property
    def max_seq_len(self) -> int:
        """Tokens a text may have, images included."""
        return self.text.max_seq_len

    @property
    def num_image_tokens(self) -> int:
        """Image tokens that stand for one image of the trained size."""
        has_class = self.is_class_token_kept and self.vision.family == "clip_vision_model"
        first = int(not self.is_class_token_kept and self.vision.family != "clip_vision_model")
        return self.vision.num_patches + has_class - first

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "LlavaConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute.
        """
        layer = values.get("vision_feature_layer", -2)
        if not isinstance(layer, int):
            raise ConfigError(f"vision_feature_layer is {layer!r}; the features of one layer are used here.")
        select = values.get("vision_feature_select_strategy", "default")
        if select not in ("default", "full"):
            raise ConfigError(f"vision_feature_select_strategy is {select!r}; known: default, full.")
        text = read_part(values, "text_config", "llama")
        if text["model_type"] == "llama":
            text = LLAMA_7B | text
        if values.get("tie_word_embeddings", False):
            text["tie_word_embeddings"] = True
        vision = read_part(values, "vision_config", "clip_vision_model")
        if not values.get("vision_config"):  # a part that is there leaves out what is usual for CLIP
            vision |= CLIP_LARGE_336
        return cls(
            text=LlamaConfig.from_hf(text),
            vision=VisionConfig.from_hf(vision),
            image_token_id=values.get("image_token_index", values.get("image_token_id", cls.image_token_id)),
            feature_layer=layer,
            is_class_token_kept=select == "full",
            projector_act=values.get("projector_hidden_act", "gelu"),
            projector_bias=values.get("multimodal_projector_bias", True),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        text = self.text.to_hf()
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "text_config": text,
            "vision_config": self.vision.to_hf(),
            "image_token_index": self.image_token_id,
            "image_seq_length": self.num_image_tokens,
            "vision_feature_layer": self.feature_layer,
            "vision_feature_select_strategy": "full" if self.is_class_token_kept else "default",
            "projector_hidden_act": self.projector_act,
            "multimodal_projector_bias": self.projector_bias,
            "tie_word_embeddings": self.text.tie_embeddings,
            **{name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        }


class Projector(nn.Module):
    """From the width of the tower to that of the language model: linear, activation, linear."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        size, bias = config.text.hidden_size, config.projector_bias
        self.up = nn.Linear(config.vision.hidden_size, size, bias=bias)
        self.down = nn.Linear(size, size, bias=bias)
        self.act = activation(config.projector_act)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D of the tower) to (..., D of the language model)."""
        return self.down(self.act(self.up(x)))


class Llava(nn.Module):
    """A tower, a projector and a language model. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[type[LlavaConfig]] = LlavaConfig
    published_names: ClassVar[dict[str, str]] = {
        **prefix_names(Llama.published_names, "language", "language_model"),
        **prefix_names(VISION_NAMES | HEAD_NAMES, "vision", "vision_tower.vision_model"),
        "projector.up": "multi_modal_projector.linear_1",
        "projector.down": "multi_modal_projector.linear_2",
    }
    other_prefixes: ClassVar[dict[str, str]] = {
        "vision_tower.vision_model.": "vision_tower.vision_model.",
        "vision_tower.": "vision_tower.vision_model.",
        "model.vision_tower.vision_model.": "vision_tower.vision_model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }
    ignored_names: ClassVar[tuple[str, ...]] = (*POSITION_IDS, "language_model.*.rotary_emb.inv_freq")

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision = TOWERS[config.vision.family](config.vision)
        self.projector = Projector(config)
        self.language = Llama(config.text)

    def tie_weights(self) -> None:
        """Make the output matrix the embedding itself, where the config says so."""
        self.language.tie_weights()

    def tied_names(self) -> dict[str, str]:
        """Return which parameter is another one under a second name: {second: first}."""
        return {f"language.{second}": f"language.{first}" for second, first in self.language.tied_names().items()}

    def new_state(self, batch_size: int, max_seq_len: int | None = None, dtype: torch.dtype | None = None) -> KVState:
        """Return an empty state; the model is called with it step by step."""
        return self.language.new_state(batch_size, max_seq_len, dtype)

    def cache_layout(self) -> list[LayerCache]:
        """Return what each layer of the language model remembers of a sequence."""
        return self.language.cache_layout()

    def num_parameters(self) -> int:
        """Count parameters, a tied one once."""
        return sum(p.numel() for p in self.parameters())

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """Return what stands in the text for images (I, C, H, W): (I, image tokens, D)."""
        x = self.vision.features(pixel_values, self.config.feature_layer)
        # "default" leaves out the first state, whatever the tower: SigLIP's first patch too, as published.
        return self.projector(x if self.config.is_class_token_kept else x[:, 1:])

    def embed(self, input_ids: Tensor, image_embeds: Tensor | None = None) -> Tensor:
        """Return the stream before the first block, (B, T, D), with the images where their tokens stand.

        Args:
            input_ids: (B, T); each image token is the place of one vector.
            image_embeds: (I, image tokens, D) from `embed_images`, in the order of their places, row by row.

        Raises:
            RequestError: There are more places than vectors, or fewer.
        """
        x = self.language.embed_tokens(input_ids, None)
        is_image = input_ids.eq(self.config.image_token_id)  # (B, T)
        num_places = int(is_image.sum())
        num_vectors = 0 if image_embeds is None else image_embeds.shape[0] * image_embeds.shape[1]
        if num_places != num_vectors:
            images = 0 if image_embeds is None else len(image_embeds)
            raise RequestError(
                f"The texts have {num_places} image tokens (id {self.config.image_token_id}), and {images} images give "
                f"{num_vectors} vectors ({self.config.num_image_tokens} each); the two must be equal. Write as many "
                "tokens as an image has vectors, and see that max_length cuts none of them off."
            )
        if image_embeds is None:
            return x
        return x.masked_scatter(is_image[..., None], image_embeds.to(x.dtype))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        state: Any = None,
        last_only: bool = False,
    ) -> CausalOutput:
        """Return the logits of the next token at every position, or at the last one for ``last_only``.

        Args:
            input_ids: (B, T), with image tokens.
            pixel_values: (I, C, H, W) all images of all rows, in the order of their places; None: there are none,
                as in the steps after the one that read them.
            attention_mask: (B, T) 1 for tokens and 0 for padding.
            positions: As in `modelwright.models.decoder.Decoder`, like the rest.
            mask: Boolean, True where attention is allowed.
            state: A `DecodeState`.
            last_only: Only the last position.
        """
        if attention_mask is not None:
            padding = padding_mask(attention_mask)  # (B, 1, T, T)
            mask = padding if mask is None else mask & padding
        embedded = self.embed(input_ids, None if pixel_values is None else self.embed_images(pixel_values))
        h = self.language.hidden(input_ids, positions, mask, state, embedded)
        return CausalOutput(self.language.lm_head(h[:, -1:] if last_only else h))


ARCHITECTURES = {"LlavaForConditionalGeneration": Llava}
