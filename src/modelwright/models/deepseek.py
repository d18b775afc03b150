"""DeepSeek-V2 and V3: latent attention, and after some dense layers mixtures of many small experts and shared ones.

V2 chooses experts by softmax, V3 by sigmoid with a correction that balances without a loss; both may first choose
groups of experts. The rotated pairs are neighbours, as published. Where YaRN stretches the rotation, the square of its
temperature goes into the scale of the scores.

Source: DeepSeek-AI 2024, arXiv 2405.04434 (V2) and arXiv 2412.19437 (V3). Not here: the modules that predict a second
token (their tensors are passed over), losses that balance devices, 8-bit weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.models.decoder import LayerCache
from modelwright.models.moe_decoder import MoeDecoder, make_half, training_options_from_hf, training_options_to_hf
from modelwright.models.published import (
    check_published,
    check_sizes,
    required,
    token_ids_from_hf,
    token_ids_to_hf,
    whole_rope_from_hf,
)
from modelwright.nn.init import mark_residual_output
from modelwright.nn.latent_attention import LatentAttention, LatentShape
from modelwright.nn.moe import MoeOptions
from modelwright.nn.norm import RMSNorm
from modelwright.nn.rope import Rope, RopeScaling, RotaryTable, scaling_to_hf, yarn_mscale

ARCHITECTURE_OF = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}


@dataclass(frozen=True)
class DeepseekConfig:
    """How a DeepSeek-V2 or V3 is built."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 704  # of the dense layers
    num_layers: int = 4
    num_dense_layers: int = 1  # the first so many layers have no experts
    num_heads: int = 4
    heads: LatentShape = LatentShape(kv_rank=64, nope_dim=32, rope_dim=16, value_dim=32)
    experts: MoeOptions = MoeOptions(num_experts=16, top_k=4, expert_size=128, shared_size=128, is_renormalised=False)
    max_seq_len: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None  # None: positions as trained
    norm_eps: float = 1e-6
    tie_embeddings: bool = False  # the output matrix is the embedding
    attention_bias: bool = False
    family: str = "deepseek_v2"  # or deepseek_v3: the name under which the weights are published
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "max_seq_len")
        check_sizes(self, *sizes)
        if self.family not in ARCHITECTURE_OF:
            raise ConfigError(f"family is {self.family!r}; known: {', '.join(ARCHITECTURE_OF)}.")
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise ConfigError(f"num_dense_layers is {self.num_dense_layers}; it must be 0 .. {self.num_layers}.")
        o = self.experts
        wanted = "softmax" if self.family == "deepseek_v2" else "sigmoid"
        if o.score != wanted or o.has_shared_gate or (wanted == "softmax" and o.is_renormalised):
            raise ConfigError(
                f"experts is {o}; {self.family} chooses by {wanted}, has no gate on the shared expert, and V2 does "
                "not renormalise."
            )
        if o.shared_size % o.expert_size or not o.shared_size:
            raise ConfigError(
                f"shared_size is {o.shared_size} and expert_size {o.expert_size}; the shared experts are as wide as "
                "one, two, three ... of the others."
            )

    @property
    def scale(self) -> float:
        """Factor on the scores: 1 / sqrt(Hk), with YaRN's temperature where the config weighs it."""
        scale = self.heads.key_dim**-0.5
        s = self.rope_scaling
        if s is None or s.kind != "yarn" or not s.mscale_all_dim:
            return scale
        return scale * yarn_mscale(s.factor, s.mscale_all_dim) ** 2

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "DeepseekConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute, or sizes contradict each other.
        """
        family = values.get("model_type", "deepseek_v2")
        _refuse_what_differs(values, family)
        rope = whole_rope_from_hf(values)
        num_heads = required(values, "num_attention_heads")
        heads = LatentShape(
            kv_rank=required(values, "kv_lora_rank"),
            q_rank=values.get("q_lora_rank"),
            nope_dim=required(values, "qk_nope_head_dim"),
            rope_dim=required(values, "qk_rope_head_dim"),
            value_dim=required(values, "v_head_dim"),
        )
        return cls(
            vocab_size=required(values, "vocab_size"),
            hidden_size=required(values, "hidden_size"),
            intermediate_size=required(values, "intermediate_size"),
            num_layers=required(values, "num_hidden_layers"),
            num_dense_layers=values.get("first_k_dense_replace", 0),
            num_heads=num_heads,
            heads=heads,
            experts=_experts_from_hf(values, family),
            max_seq_len=values.get("max_position_embeddings", 4096),
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            norm_eps=values.get("rms_norm_eps", 1e-6),
            tie_embeddings=values.get("tie_word_embeddings", False),
            attention_bias=values.get("attention_bias", False),
            family=family,
            **token_ids_from_hf(values),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        return {
            "architectures": [ARCHITECTURE_OF[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "first_k_dense_replace": self.num_dense_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "kv_lora_rank": self.heads.kv_rank,
            "q_lora_rank": self.heads.q_rank,
            "qk_nope_head_dim": self.heads.nope_dim,
            "qk_rope_head_dim": self.heads.rope_dim,
            "v_head_dim": self.heads.value_dim,
            **_experts_to_hf(self.experts, self.family),
            "max_position_embeddings": self.max_seq_len,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling_to_hf(self.rope_scaling),
            "rms_norm_eps": self.norm_eps,
            "hidden_act": "silu",
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": 0.02,
            "use_cache": True,
            **token_ids_to_hf(self),
        }


def _refuse_what_differs(values: Mapping[str, Any], family: str) -> None:
    if family not in ARCHITECTURE_OF:
        raise ConfigError(f"model_type is {family!r}; this file builds {', '.join(ARCHITECTURE_OF)}.")
    fixed = {"hidden_act": "silu", "moe_layer_freq": 1, "mlp_bias": False, "rope_interleave": True}
    if family == "deepseek_v2":
        fixed |= {"norm_topk_prob": False, "scoring_func": "softmax"}
    else:
        fixed |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    check_published(values, family, **fixed)
    num_heads = values.get("num_attention_heads")
    if values.get("num_key_value_heads", num_heads) not in (None, num_heads):
        raise ConfigError(
            f"num_key_value_heads is {values['num_key_value_heads']} and num_attention_heads {num_heads}; latent "
            "attention has as many of both."
        )


def _experts_from_hf(values: Mapping[str, Any], family: str) -> MoeOptions:
    method = values.get("topk_method", "greedy")
    if family == "deepseek_v2" and method not in ("greedy", "group_limited_greedy"):
        raise ConfigError(f"topk_method is {method!r}; known for deepseek_v2: greedy, group_limited_greedy.")
    has_groups = family == "deepseek_v3" or method == "group_limited_greedy"
    size = required(values, "moe_intermediate_size")
    training = training_options_from_hf(values)
    if "router_aux_loss_coef" not in values:
        training["balance_coefficient"] = values.get("aux_loss_alpha", 0.001)
    return MoeOptions(
        num_experts=required(values, "n_routed_experts" if "n_routed_experts" in values else "num_local_experts"),
        top_k=required(values, "num_experts_per_tok"),
        expert_size=size,
        score="softmax" if family == "deepseek_v2" else "sigmoid",
        is_renormalised=family == "deepseek_v3" and values.get("norm_topk_prob", True),
        scale=float(values.get("routed_scaling_factor", 1.0 if family == "deepseek_v2" else 2.5)),
        num_groups=(values.get("n_group") or 1) if has_groups else 1,
        num_kept_groups=(values.get("topk_group") or 1) if has_groups else 1,
        shared_size=size * required(values, "n_shared_experts"),
        **training,
    )


def _experts_to_hf(options: MoeOptions, family: str) -> dict[str, Any]:
    o = options
    training = training_options_to_hf(o)
    values = {
        "moe_intermediate_size": o.expert_size,
        "moe_layer_freq": 1,
        "n_routed_experts": o.num_experts,
        "n_shared_experts": o.shared_size // o.expert_size,
        "num_experts_per_tok": o.top_k,
        "norm_topk_prob": o.is_renormalised,
        "routed_scaling_factor": o.scale,
        "n_group": o.num_groups,
        "topk_group": o.num_kept_groups,
        "scoring_func": o.score,
        "topk_method": "noaux_tc",
        "aux_loss_alpha": training.pop("router_aux_loss_coef"),
        "seq_aux": True,
        **training,
    }
    if family == "deepseek_v2":
        values["topk_method"] = "greedy" if o.num_groups == 1 else "group_limited_greedy"
    else:
        values["num_nextn_predict_layers"] = 0
    return values


class DeepseekBlock(nn.Module):
    """Latent attention and a feed-forward half, dense or a mixture, each behind a norm and added to the stream."""

    def __init__(self, config: DeepseekConfig, layer_index: int):
        super().__init__()
        c = config
        self.attention_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.attention = LatentAttention(
            c.hidden_size, c.num_heads, c.heads, layer_index=layer_index, scale=c.scale, bias=c.attention_bias
        )
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps)
        options = None if layer_index < c.num_dense_layers else c.experts
        self.mlp = make_half(c.hidden_size, c.intermediate_size, options, c.num_layers)
        mark_residual_output(self.attention.o, c.num_layers)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, state: Any) -> Tensor:
        """Map the stream (B, T, D) to (B, T, D)."""
        x = x + self.attention(self.attention_norm(x), rope, mask=mask, state=state)
        return x + self.mlp(self.mlp_norm(x))


class Deepseek(MoeDecoder):
    """A DeepSeek-V2 or V3 language model. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[type[DeepseekConfig]] = DeepseekConfig
    published_names: ClassVar[dict[str, str]] = {
        "embed": "model.embed_tokens",
        "layers.*.attention_norm": "model.layers.*.input_layernorm",
        "layers.*.attention.q": "model.layers.*.self_attn.q_proj",
        "layers.*.attention.q_down": "model.layers.*.self_attn.q_a_proj",
        "layers.*.attention.q_norm": "model.layers.*.self_attn.q_a_layernorm",
        "layers.*.attention.q_up": "model.layers.*.self_attn.q_b_proj",
        "layers.*.attention.kv_down": "model.layers.*.self_attn.kv_a_proj_with_mqa",
        "layers.*.attention.kv_norm": "model.layers.*.self_attn.kv_a_layernorm",
        "layers.*.attention.kv_up": "model.layers.*.self_attn.kv_b_proj",
        "layers.*.attention.o": "model.layers.*.self_attn.o_proj",
        "layers.*.mlp_norm": "model.layers.*.post_attention_layernorm",
        "layers.*.mlp.gate": "model.layers.*.mlp.gate_proj",
        "layers.*.mlp.up": "model.layers.*.mlp.up_proj",
        "layers.*.mlp.down": "model.layers.*.mlp.down_proj",
        "layers.*.mlp.router": "model.layers.*.mlp.gate",
        "layers.*.mlp.router.correction": "model.layers.*.mlp.gate.e_score_correction_bias",
        **{
            f"layers.*.mlp.{ours}.{part}": f"model.layers.*.mlp.{theirs}.{part}_proj"
            for ours, theirs in (("experts.*", "experts.*"), ("shared", "shared_experts"))
            for part in ("gate", "up", "down")
        },
        "norm": "model.norm",
        "lm_head": "lm_head",
    }

    def __init__(self, config: DeepseekConfig):
        blocks: list[nn.Module] = [DeepseekBlock(config, i) for i in range(config.num_layers)]
        super().__init__(config, blocks, RMSNorm(config.hidden_size, config.norm_eps))
        self.rope = RotaryTable(config.heads.rope_dim, config.max_seq_len, config.rope_theta, config.rope_scaling)
        # What predicts the token after the next stands as one more layer.
        self.ignored_names = (f"model.layers.{config.num_layers}.*",)
        self.tie_weights()

    def positional(self, x: Tensor, positions: Tensor | None, state: Any) -> Rope:
        """Return cos and sin for the positions."""
        return self.rope(x.shape[1], positions)

    def cache_layout(self) -> list[LayerCache]:
        """Return what each layer remembers of a sequence: expanded keys and values, of different sizes."""
        c = self.config
        return [LayerCache(c.num_heads, c.heads.key_dim, c.heads.value_dim) for _ in self.layers]


ARCHITECTURES = dict.fromkeys(ARCHITECTURE_OF.values(), Deepseek)
