"""Mixtral: Mistral's decoder with eight feed-forward halves a layer, of which every token takes two.

Source: Jiang et al. 2024, arXiv 2401.04088. Not here: noise on the router's input in training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.models.decoder import LayerCache
from modelwright.models.moe_decoder import MoeDecoder, make_half, training_options_from_hf, training_options_to_hf
from modelwright.models.published import (
    check_heads,
    check_published,
    check_sizes,
    required,
    split_hidden,
    token_ids_from_hf,
    token_ids_to_hf,
    whole_rope_from_hf,
)
from modelwright.nn.attention import Attention, AttentionOptions
from modelwright.nn.init import mark_residual_output
from modelwright.nn.moe import MoeOptions
from modelwright.nn.norm import RMSNorm
from modelwright.nn.rope import Rope, RopeScaling, RotaryTable, scaling_to_hf


@dataclass(frozen=True)
class MixtralConfig:
    """How a Mixtral is built."""

    vocab_size: int
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None  # None: as many as num_heads
    head_dim: int | None = None  # None: hidden_size / num_heads
    experts: MoeOptions = MoeOptions(num_experts=8, top_k=2, expert_size=704)
    max_seq_len: int = 2048
    rope_theta: float = 1000000.0
    rope_scaling: RopeScaling | None = None  # None: positions as trained
    sliding_window: int | None = None  # positions that a token sees, itself included; None: all before it
    norm_eps: float = 1e-5
    tie_embeddings: bool = False  # the output matrix is the embedding
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", split_hidden(self.hidden_size, self.num_heads))
        assert self.num_kv_heads is not None
        check_sizes(self, "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        check_sizes(self, "max_seq_len")
        check_heads(self.num_heads, self.num_kv_heads)
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window is {self.sliding_window}; it must be at least 1, or left out.")
        o = self.experts
        if o.score != "softmax" or not o.is_renormalised or o.scale != 1 or o.num_groups != 1 or o.shared_size:
            raise ConfigError(
                f"experts is {o}; a Mixtral chooses by softmax, renormalised, without groups, scale or shared expert."
            )

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "MixtralConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute, or sizes contradict each other.
        """
        check_published(values, "mixtral", hidden_act="silu", router_jitter_noise=0.0)
        rope = whole_rope_from_hf({"rope_theta": 1000000.0, **values})
        options = MoeOptions(
            num_experts=values.get("num_local_experts", 8),
            top_k=values.get("num_experts_per_tok", 2),
            expert_size=required(values, "intermediate_size"),
            **training_options_from_hf(values),
        )
        return cls(
            vocab_size=required(values, "vocab_size"),
            hidden_size=required(values, "hidden_size"),
            num_layers=required(values, "num_hidden_layers"),
            num_heads=required(values, "num_attention_heads"),
            num_kv_heads=values.get("num_key_value_heads"),
            head_dim=values.get("head_dim"),
            experts=options,
            max_seq_len=values.get("max_position_embeddings", 131072),
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            sliding_window=values.get("sliding_window"),
            norm_eps=values.get("rms_norm_eps", 1e-5),
            tie_embeddings=values.get("tie_word_embeddings", False),
            **token_ids_from_hf(values),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.experts.expert_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_local_experts": self.experts.num_experts,
            "num_experts_per_tok": self.experts.top_k,
            **training_options_to_hf(self.experts),
            "router_jitter_noise": 0.0,
            "max_position_embeddings": self.max_seq_len,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling_to_hf(self.rope_scaling),
            "sliding_window": self.sliding_window,
            "rms_norm_eps": self.norm_eps,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": 0.02,
            "use_cache": True,
            **token_ids_to_hf(self),
        }


class MixtralBlock(nn.Module):
    """Attention and a mixture of experts, each behind a norm and added to the stream."""

    def __init__(self, config: MixtralConfig, layer_index: int):
        super().__init__()
        c = config
        assert c.num_kv_heads is not None and c.head_dim is not None
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
        self.mlp = make_half(c.hidden_size, 0, c.experts, c.num_layers)
        mark_residual_output(self.attention.o, c.num_layers)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, state: Any) -> Tensor:
        """Map the stream (B, T, D) to (B, T, D)."""
        x = x + self.attention(self.attention_norm(x), rope, mask=mask, state=state)
        return x + self.mlp(self.mlp_norm(x))


class Mixtral(MoeDecoder):
    """A Mixtral language model. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[type[MixtralConfig]] = MixtralConfig
    published_names: ClassVar[dict[str, str]] = {
        "embed": "model.embed_tokens",
        "layers.*.attention_norm": "model.layers.*.input_layernorm",
        "layers.*.attention.q": "model.layers.*.self_attn.q_proj",
        "layers.*.attention.k": "model.layers.*.self_attn.k_proj",
        "layers.*.attention.v": "model.layers.*.self_attn.v_proj",
        "layers.*.attention.o": "model.layers.*.self_attn.o_proj",
        "layers.*.mlp_norm": "model.layers.*.post_attention_layernorm",
        "layers.*.mlp.router": "model.layers.*.block_sparse_moe.gate",
        "layers.*.mlp.experts.*.gate": "model.layers.*.block_sparse_moe.experts.*.w1",
        "layers.*.mlp.experts.*.up": "model.layers.*.block_sparse_moe.experts.*.w3",
        "layers.*.mlp.experts.*.down": "model.layers.*.block_sparse_moe.experts.*.w2",
        "norm": "model.norm",
        "lm_head": "lm_head",
    }

    def __init__(self, config: MixtralConfig):
        assert config.head_dim is not None
        blocks: list[nn.Module] = [MixtralBlock(config, i) for i in range(config.num_layers)]
        super().__init__(config, blocks, RMSNorm(config.hidden_size, config.norm_eps))
        self.rope = RotaryTable(config.head_dim, config.max_seq_len, config.rope_theta, config.rope_scaling)
        self.tie_weights()

    def positional(self, x: Tensor, positions: Tensor | None, state: Any) -> Rope:
        """Return cos and sin for the positions."""
        return self.rope(x.shape[1], positions)

    def cache_layout(self) -> list[LayerCache]:
        """Return what each layer remembers of a sequence."""
        c = self.config
        return [LayerCache(c.num_kv_heads, c.head_dim, c.head_dim, c.sliding_window) for _ in self.layers]


ARCHITECTURES = {"MixtralForCausalLM": Mixtral}
