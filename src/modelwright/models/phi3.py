"""Phi-3: Llama's decoder, published with q, k, v in one matrix and gate, up in another.

Some of them rotate a part of each head only (Phi-4-mini), see a window, or reach 128k tokens by factors that change
with the length of the sequence (LongRoPE): past the original length the cached keys of a sequence that began below it
keep their short rotation, here as in transformers.

Source: Abdin et al. 2024, arXiv 2404.14219; Ding et al. 2024, arXiv 2402.13753 (LongRoPE). Not here: Phi-3-small's
block-sparse attention, images, mixtures of experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.models.decoder import Decoder, LayerCache
from modelwright.models.published import (
    check_heads,
    check_published,
    check_sizes,
    required,
    split_hidden,
    token_ids_from_hf,
    token_ids_to_hf,
)
from modelwright.nn.attention import Attention, AttentionOptions
from modelwright.nn.init import mark_residual_output
from modelwright.nn.mlp import GatedMlp
from modelwright.nn.norm import RMSNorm
from modelwright.nn.rope import Rope, RopeScaling, RotaryTable, rope_from_hf, scaling_to_hf


@dataclass(frozen=True)
class Phi3Config:
    """How a Phi-3 is built."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None  # None: as many as num_heads
    max_seq_len: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None  # longrope, or None: positions as trained
    rotary_fraction: float = 1.0  # of each head that is rotated
    sliding_window: int | None = None  # positions that a token sees, itself included; None: all before it
    norm_eps: float = 1e-5
    tie_embeddings: bool = False  # the output matrix is the embedding
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        assert self.num_kv_heads is not None
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        check_sizes(self, *sizes, "max_seq_len")
        split_hidden(self.hidden_size, self.num_heads)
        check_heads(self.num_heads, self.num_kv_heads)
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window is {self.sliding_window}; it must be at least 1, or left out.")
        if not 0 < self.rotary_fraction <= 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ConfigError(
                f"rotary_fraction is {self.rotary_fraction} of heads of {self.head_dim}; it must give an even number "
                "of at least 2."
            )
        if self.rope_scaling is not None and self.rope_scaling.kind != "longrope":
            raise ConfigError(f"rope scaling is {self.rope_scaling.kind!r}; the published Phi-3 has longrope only.")

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """Numbers of a head that are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "Phi3Config":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute, or sizes contradict each other.
        """
        check_published(values, "phi3", hidden_act="silu", attention_bias=False)
        rope = rope_from_hf(_with_name_of_today(values))
        return cls(
            vocab_size=required(values, "vocab_size"),
            hidden_size=required(values, "hidden_size"),
            intermediate_size=required(values, "intermediate_size"),
            num_layers=required(values, "num_hidden_layers"),
            num_heads=required(values, "num_attention_heads"),
            num_kv_heads=values.get("num_key_value_heads"),
            max_seq_len=values.get("max_position_embeddings", 4096),
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            rotary_fraction=rope.rotary_fraction,
            sliding_window=values.get("sliding_window"),
            norm_eps=values.get("rms_norm_eps", 1e-5),
            tie_embeddings=values.get("tie_word_embeddings", False),
            **token_ids_from_hf(values),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        scaling = scaling_to_hf(self.rope_scaling)
        original = self.max_seq_len
        if scaling is not None:  # these two stand beside the dictionary, or follow from what does
            original = scaling.pop("original_max_position_embeddings")
            if scaling.pop("factor") != max(self.max_seq_len / original, 1.0):
                raise ConfigError(
                    f"longrope has the factor {self.rope_scaling and self.rope_scaling.factor}; a published Phi-3 has "
                    f"max_seq_len / original_max_seq_len, {self.max_seq_len} / {original}. Set this one."
                )
        return {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "max_position_embeddings": self.max_seq_len,
            "original_max_position_embeddings": original,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "partial_rotary_factor": self.rotary_fraction,
            "sliding_window": self.sliding_window,
            "rms_norm_eps": self.norm_eps,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": 0.02,
            "use_cache": True,
            **token_ids_to_hf(self),
        }


def _with_name_of_today(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Call the scaling longrope where the first Phi-3 files call it yarn or su and mean the same."""
    scaling = values.get("rope_scaling")
    if not scaling or scaling.get("type", scaling.get("rope_type")) not in ("yarn", "su"):
        return values
    rest = {k: v for k, v in scaling.items() if k not in ("type", "rope_type")}
    return {**values, "rope_scaling": {**rest, "rope_type": "longrope"}}


class Phi3Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, config: Phi3Config, layer_index: int):
        super().__init__()
        c = config
        assert c.num_kv_heads is not None
        self.attention_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.attention = Attention(
            c.hidden_size,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            layer_index=layer_index,
            options=AttentionOptions(window=c.sliding_window),
        )
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = GatedMlp(c.hidden_size, c.intermediate_size)
        mark_residual_output(self.attention.o, c.num_layers)
        mark_residual_output(self.mlp.down, c.num_layers)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, state: Any) -> Tensor:
        """Map the stream (B, T, D) to (B, T, D)."""
        x = x + self.attention(self.attention_norm(x), rope, mask=mask, state=state)
        return x + self.mlp(self.mlp_norm(x))


class Phi3(Decoder):
    """A Phi-3 language model. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[type[Phi3Config]] = Phi3Config
    published_names: ClassVar[dict[str, str]] = {
        "embed": "model.embed_tokens",
        "layers.*.attention_norm": "model.layers.*.input_layernorm",
        "layers.*.attention.o": "model.layers.*.self_attn.o_proj",
        "layers.*.mlp_norm": "model.layers.*.post_attention_layernorm",
        "layers.*.mlp.down": "model.layers.*.mlp.down_proj",
        "norm": "model.norm",
        "lm_head": "lm_head",
    }
    published_fused: ClassVar[dict[str, tuple[str, ...]]] = {
        "model.layers.*.self_attn.qkv_proj": tuple(f"layers.*.attention.{name}" for name in "qkv"),
        "model.layers.*.mlp.gate_up_proj": ("layers.*.mlp.gate", "layers.*.mlp.up"),
    }

    def __init__(self, config: Phi3Config):
        blocks: list[nn.Module] = [Phi3Block(config, i) for i in range(config.num_layers)]
        super().__init__(config, blocks, RMSNorm(config.hidden_size, config.norm_eps))
        self.rope = RotaryTable(config.rotary_dim, config.max_seq_len, config.rope_theta, config.rope_scaling)
        self.tie_weights()

    def positional(self, x: Tensor, positions: Tensor | None, state: Any) -> Rope:
        """Return cos and sin for the positions."""
        return self.rope(x.shape[1], positions)

    def cache_layout(self) -> list[LayerCache]:
        """Return what each layer remembers of a sequence."""
        c = self.config
        return [LayerCache(c.num_kv_heads, c.head_dim, c.head_dim, c.sliding_window) for _ in self.layers]


ARCHITECTURES = {"Phi3ForCausalLM": Phi3}
