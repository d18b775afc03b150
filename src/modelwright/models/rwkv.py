"""RWKV-4: a decoder of recurrences, time mix for attention and channel mix for the feed-forward half, with LayerNorm.

Memory while decoding is of one size: per layer the last token of both mixes and three numbers for each channel.

Source: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", arXiv 2305.13048. Against transformers:
padding is inert (there ``attention_mask`` is not used); steps of one token take several rows (there the rows mix, so
only a batch of one is right); nothing is halved every ``rescale_every`` layers in evaluation
mode, which there guards float16 against overflow and changes the weights in place. The last norm's epsilon is 1e-5
whatever the config says, as there. Not here: RWKV-5 and later.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from modelwright.models.decoder import LayerCache
from modelwright.models.published import check_published, check_sizes, token_ids_from_hf, token_ids_to_hf
from modelwright.models.state_decoder import StateDecoder
from modelwright.nn.past import Segments
from modelwright.nn.rwkv import ChannelMix, TimeMix


@dataclass(frozen=True)
class RwkvConfig:
    """How an RWKV is built. Sizes left at None follow from the others."""

    vocab_size: int
    hidden_size: int = 768
    num_layers: int = 12
    attention_size: int | None = None  # None: hidden_size
    intermediate_size: int | None = None  # None: 4 x hidden_size
    norm_eps: float = 1e-5
    tie_embeddings: bool = False  # the output matrix is the embedding
    max_seq_len: int = 1024  # trained at; the recurrence itself has no limit, and none is set
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "hidden_size", "num_layers", "max_seq_len")
        if self.attention_size is None:
            object.__setattr__(self, "attention_size", self.hidden_size)
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        check_sizes(self, "attention_size", "intermediate_size")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "RwkvConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: It is of another family.
        """
        check_published(values, "rwkv")
        return cls(
            vocab_size=values.get("vocab_size", 50277),
            hidden_size=values.get("hidden_size", 4096),
            num_layers=values.get("num_hidden_layers", 32),
            attention_size=values.get("attention_hidden_size"),
            intermediate_size=values.get("intermediate_size"),
            norm_eps=values.get("layer_norm_epsilon", 1e-5),
            tie_embeddings=values.get("tie_word_embeddings", False),
            max_seq_len=values.get("context_length", 1024),
            **token_ids_from_hf(values),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        return {
            "architectures": ["RwkvForCausalLM"],
            "model_type": "rwkv",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "attention_hidden_size": self.attention_size,
            "intermediate_size": self.intermediate_size,
            "layer_norm_epsilon": self.norm_eps,
            "rescale_every": 6,
            "tie_word_embeddings": self.tie_embeddings,
            "context_length": self.max_seq_len,
            "use_cache": True,
            **token_ids_to_hf(self),
        }


class RwkvBlock(nn.Module):
    """Time mix and channel mix, each behind a norm and added to the stream."""

    def __init__(self, config: RwkvConfig, layer_index: int):
        super().__init__()
        c = config
        assert c.attention_size is not None and c.intermediate_size is not None
        place = {"layer_index": layer_index, "num_layers": c.num_layers}
        # The embedding's own norm belongs to the first block in published weights.
        self.embed_norm = nn.LayerNorm(c.hidden_size, c.norm_eps) if layer_index == 0 else None
        self.time_norm = nn.LayerNorm(c.hidden_size, c.norm_eps)
        self.time_mix = TimeMix(c.hidden_size, c.attention_size, **place)
        self.channel_norm = nn.LayerNorm(c.hidden_size, c.norm_eps)
        self.channel_mix = ChannelMix(c.hidden_size, c.intermediate_size, **place)

    def forward(self, x: Tensor, places: Segments, mask: Tensor | None, state: Any) -> Tensor:
        """Map the stream (B, T, D) to (B, T, D)."""
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        x = x + self.time_mix(self.time_norm(x), state=state, segments=places)
        return x + self.channel_mix(self.channel_norm(x), state=state, segments=places)


class Rwkv(StateDecoder):
    """An RWKV-4 language model. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[type[RwkvConfig]] = RwkvConfig
    published_names: ClassVar[dict[str, str]] = {
        "embed": "rwkv.embeddings",
        "layers.*.embed_norm": "rwkv.blocks.*.pre_ln",
        "layers.*.time_norm": "rwkv.blocks.*.ln1",
        "layers.*.time_mix.time_decay": "rwkv.blocks.*.attention.time_decay",
        "layers.*.time_mix.time_first": "rwkv.blocks.*.attention.time_first",
        "layers.*.time_mix.mix_key": "rwkv.blocks.*.attention.time_mix_key",
        "layers.*.time_mix.mix_value": "rwkv.blocks.*.attention.time_mix_value",
        "layers.*.time_mix.mix_receptance": "rwkv.blocks.*.attention.time_mix_receptance",
        "layers.*.time_mix.key": "rwkv.blocks.*.attention.key",
        "layers.*.time_mix.value": "rwkv.blocks.*.attention.value",
        "layers.*.time_mix.receptance": "rwkv.blocks.*.attention.receptance",
        "layers.*.time_mix.output": "rwkv.blocks.*.attention.output",
        "layers.*.channel_norm": "rwkv.blocks.*.ln2",
        "layers.*.channel_mix.mix_key": "rwkv.blocks.*.feed_forward.time_mix_key",
        "layers.*.channel_mix.mix_receptance": "rwkv.blocks.*.feed_forward.time_mix_receptance",
        "layers.*.channel_mix.key": "rwkv.blocks.*.feed_forward.key",
        "layers.*.channel_mix.receptance": "rwkv.blocks.*.feed_forward.receptance",
        "layers.*.channel_mix.value": "rwkv.blocks.*.feed_forward.value",
        "norm": "rwkv.ln_out",
        "lm_head": "head",
    }

    def __init__(self, config: RwkvConfig):
        blocks: list[nn.Module] = [RwkvBlock(config, i) for i in range(config.num_layers)]
        super().__init__(config, blocks, nn.LayerNorm(config.hidden_size, 1e-5))
        self.tie_weights()

    def cache_layout(self) -> list[LayerCache]:
        """Return what each layer remembers of a sequence: the last token twice and the sums over the past."""
        c = self.config
        return [LayerCache(fixed_size=2 * c.hidden_size + 3 * c.attention_size)] * c.num_layers


ARCHITECTURES = {"RwkvForCausalLM": Rwkv}
