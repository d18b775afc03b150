"""Qwen MoE: many small experts a layer. Qwen2's has a shared expert behind a gate and biases on q, k, v; Qwen3's
neither, but a norm on each query and key head. Layers may be left dense.

Source: Yang et al. 2024, arXiv 2407.10671 (Qwen2, section 2.2.2); Yang et al. 2025, arXiv 2505.09388 (Qwen3). Not here:
sliding windows, which no published one uses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
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

ARCHITECTURE_OF = {"qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


@dataclass(frozen=True)
class QwenMoeConfig:
    """How a Qwen with experts is built."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 704  # of the dense layers
    num_layers: int = 4
    dense_layers: tuple[int, ...] = ()  # layers without experts
    num_heads: int = 4
    num_kv_heads: int | None = None  # None: as many as num_heads
    head_dim: int | None = None  # None: hidden_size / num_heads
    experts: MoeOptions = MoeOptions(num_experts=16, top_k=4, expert_size=128)
    max_seq_len: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None  # None: positions as trained
    norm_eps: float = 1e-6
    tie_embeddings: bool = False  # the output matrix is the embedding
    attention_bias: bool = False  # on q, k, v, and on o too in qwen3_moe
    family: str = "qwen3_moe"  # or qwen2_moe: the name under which the weights are published
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", split_hidden(self.hidden_size, self.num_heads))
        assert self.num_kv_heads is not None
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        check_sizes(self, *sizes, "head_dim", "max_seq_len")
        check_heads(self.num_heads, self.num_kv_heads)
        if self.family not in ARCHITECTURE_OF:
            raise ConfigError(f"family is {self.family!r}; known: {', '.join(ARCHITECTURE_OF)}.")
        wrong = [i for i in self.dense_layers if not 0 <= i < self.num_layers]
        if wrong:
            raise ConfigError(f"dense_layers names {wrong}; the layers are 0 .. {self.num_layers - 1}.")
        o, has_shared = self.experts, self.family == "qwen2_moe"
        if o.score != "softmax" or o.scale != 1 or o.num_groups != 1:
            raise ConfigError(f"experts is {o}; a Qwen chooses by softmax, without groups or scale.")
        if bool(o.shared_size) != has_shared or o.has_shared_gate != has_shared:
            raise ConfigError(
                f"experts has shared_size {o.shared_size} and has_shared_gate {o.has_shared_gate}; qwen2_moe has a "
                "shared expert behind a gate, qwen3_moe has none."
            )

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "QwenMoeConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute, or sizes contradict each other.
        """
        family = values.get("model_type", "qwen3_moe")
        _refuse_what_differs(values, family)
        rope = whole_rope_from_hf(values)
        num_layers = required(values, "num_hidden_layers")
        step = values.get("decoder_sparse_step", 1)
        plain = values.get("mlp_only_layers") or ()
        is_old = family == "qwen2_moe"
        options = MoeOptions(
            num_experts=required(values, "num_experts" if "num_experts" in values else "num_local_experts"),
            top_k=required(values, "num_experts_per_tok"),
            expert_size=required(values, "moe_intermediate_size"),
            is_renormalised=values.get("norm_topk_prob", False),
            shared_size=required(values, "shared_expert_intermediate_size") if is_old else 0,
            has_shared_gate=is_old,
            **training_options_from_hf(values),
        )
        return cls(
            vocab_size=required(values, "vocab_size"),
            hidden_size=required(values, "hidden_size"),
            intermediate_size=required(values, "intermediate_size"),
            num_layers=num_layers,
            dense_layers=tuple(i for i in range(num_layers) if i in plain or (i + 1) % step),
            num_heads=required(values, "num_attention_heads"),
            num_kv_heads=values.get("num_key_value_heads"),
            head_dim=values.get("head_dim"),
            experts=options,
            max_seq_len=values.get("max_position_embeddings", 32768),
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            norm_eps=values.get("rms_norm_eps", 1e-6),
            tie_embeddings=values.get("tie_word_embeddings", False),
            attention_bias=values.get("qkv_bias", True) if is_old else values.get("attention_bias", False),
            family=family,
            **token_ids_from_hf(values),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        o = self.experts
        values = {
            "architectures": [ARCHITECTURE_OF[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "mlp_only_layers": list(self.dense_layers),
            "decoder_sparse_step": 1,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_experts": o.num_experts,
            "num_experts_per_tok": o.top_k,
            "moe_intermediate_size": o.expert_size,
            "norm_topk_prob": o.is_renormalised,
            **training_options_to_hf(o),
            "max_position_embeddings": self.max_seq_len,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling_to_hf(self.rope_scaling),
            "rms_norm_eps": self.norm_eps,
            "use_sliding_window": False,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": 0.02,
            "use_cache": True,
            **token_ids_to_hf(self),
        }
        if self.family == "qwen2_moe":
            values |= {"qkv_bias": self.attention_bias, "shared_expert_intermediate_size": o.shared_size}
        else:
            values |= {"attention_bias": self.attention_bias}
        return values


def _refuse_what_differs(values: Mapping[str, Any], family: str) -> None:
    if family not in ARCHITECTURE_OF:
        raise ConfigError(f"model_type is {family!r}; this file builds {', '.join(ARCHITECTURE_OF)}.")
    check_published(values, family, hidden_act="silu", use_sliding_window=False)


class QwenMoeBlock(nn.Module):
    """Attention and a feed-forward half, a mixture or dense, each behind a norm and added to the stream."""

    def __init__(self, config: QwenMoeConfig, layer_index: int):
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
            bias=c.attention_bias,
            output_bias=c.attention_bias and c.family == "qwen3_moe",
            options=AttentionOptions(qk_norm=partial(RMSNorm, eps=c.norm_eps) if c.family == "qwen3_moe" else None),
        )
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps)
        options = None if layer_index in c.dense_layers else c.experts
        self.mlp = make_half(c.hidden_size, c.intermediate_size, options, c.num_layers)
        mark_residual_output(self.attention.o, c.num_layers)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, state: Any) -> Tensor:
        """Map the stream (B, T, D) to (B, T, D)."""
        x = x + self.attention(self.attention_norm(x), rope, mask=mask, state=state)
        return x + self.mlp(self.mlp_norm(x))


class QwenMoe(MoeDecoder):
    """A Qwen2 or Qwen3 language model with experts. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[type[QwenMoeConfig]] = QwenMoeConfig
    published_names: ClassVar[dict[str, str]] = {
        "embed": "model.embed_tokens",
        "layers.*.attention_norm": "model.layers.*.input_layernorm",
        **{f"layers.*.attention.{name}": f"model.layers.*.self_attn.{name}_proj" for name in "qkvo"},
        "layers.*.attention.q_norm": "model.layers.*.self_attn.q_norm",
        "layers.*.attention.k_norm": "model.layers.*.self_attn.k_norm",
        "layers.*.mlp_norm": "model.layers.*.post_attention_layernorm",
        "layers.*.mlp.router": "model.layers.*.mlp.gate",
        "layers.*.mlp.shared_gate": "model.layers.*.mlp.shared_expert_gate",
        **{
            f"layers.*.mlp.{ours}{part}": f"model.layers.*.mlp.{theirs}{part}_proj"
            for ours, theirs in (("", ""), ("experts.*.", "experts.*."), ("shared.", "shared_expert."))
            for part in ("gate", "up", "down")
        },
        "norm": "model.norm",
        "lm_head": "lm_head",
    }

    def __init__(self, config: QwenMoeConfig):
        assert config.head_dim is not None
        blocks: list[nn.Module] = [QwenMoeBlock(config, i) for i in range(config.num_layers)]
        super().__init__(config, blocks, RMSNorm(config.hidden_size, config.norm_eps))
        self.rope = RotaryTable(config.head_dim, config.max_seq_len, config.rope_theta, config.rope_scaling)
        self.tie_weights()

    def positional(self, x: Tensor, positions: Tensor | None, state: Any) -> Rope:
        """Return cos and sin for the positions."""
        return self.rope(x.shape[1], positions)

    def cache_layout(self) -> list[LayerCache]:
        """Return what each layer remembers of a sequence."""
        c = self.config
        return [LayerCache(c.num_kv_heads, c.head_dim, c.head_dim) for _ in self.layers]


ARCHITECTURES = dict.fromkeys(ARCHITECTURE_OF.values(), QwenMoe)
