"""Llama: the pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU.

One file for the families that are the same computation: Llama 1-3.x, Mistral (a sliding window in every layer of the
first versions), Qwen2 / Qwen2.5 (biases on q, k, v alone; a window in the later layers where the config asks for it)
and dense Qwen3 (a norm on each query and key head).

Source: Touvron et al. 2023, arXiv 2302.13971; Grattafiori et al. 2024, arXiv 2407.21783 (3.x);
Jiang et al. 2023, arXiv 2310.06825 (Mistral); Yang et al. 2024, arXiv 2407.10671 (Qwen2);
Yang et al. 2025, arXiv 2505.09388 (Qwen3).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.models.decoder import CausalOutput as CausalOutput
from modelwright.models.decoder import Decoder, LayerCache
from modelwright.models.published import whole_rope_from_hf
from modelwright.nn.attention import Attention, AttentionOptions
from modelwright.nn.init import mark_residual_output
from modelwright.nn.mlp import GatedMlp
from modelwright.nn.norm import RMSNorm
from modelwright.nn.rope import Rope, RopeScaling, RotaryTable, rope_to_hf, scaling_to_hf

ARCHITECTURE_OF = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True)
class LlamaConfig:
    """How a Llama is built. Sizes left at None follow from the others."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None  # None: as many as num_heads
    head_dim: int | None = None  # None: hidden_size / num_heads
    max_seq_len: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None  # None: positions as trained
    norm_eps: float = 1e-5
    tie_embeddings: bool = False  # the output matrix is the embedding
    attention_bias: bool = False  # biases on q, k, v, and on o too unless the family is qwen2
    mlp_bias: bool = False
    sliding_window: int | None = None  # positions that a token sees, itself included; None: all before it
    num_full_layers: int = 0  # the first so many layers see all positions even where there is a window
    family: str = "llama"  # llama, mistral, qwen2 or qwen3: the name under which the weights are published
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "max_seq_len"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise ConfigError(
                    f"hidden_size is {self.hidden_size} and num_heads is {self.num_heads}; the heads must divide it "
                    "evenly, or head_dim be given."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        assert self.head_dim is not None and self.num_kv_heads is not None
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary positions need an even number of at least 2.")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads is {self.num_heads} and num_kv_heads is {self.num_kv_heads}; the key/value heads must "
                "divide the query heads evenly."
            )
        if self.family not in ARCHITECTURE_OF:
            raise ConfigError(f"family is {self.family!r}; known: {', '.join(ARCHITECTURE_OF)}.")
        if self.sliding_window is not None and (self.sliding_window < 1 or self.family == "llama"):
            raise ConfigError(
                f"sliding_window is {self.sliding_window!r} for the family {self.family!r}; it must be at least 1, "
                "and the published Llama has none (mistral, qwen2 and qwen3 have)."
            )

    def window(self, layer_index: int) -> int | None:
        """Return the positions that a token sees in a layer; None: all before it."""
        return None if layer_index < self.num_full_layers else self.sliding_window

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute, or sizes contradict each other.
        """
        family = values.get("model_type", "llama")
        _refuse_what_differs(values, family)
        rope = whole_rope_from_hf(values)
        max_seq_len = values.get("max_position_embeddings", 2048)
        if rope.scaling is not None and rope.scaling.kind == "dynamic":  # published: the length before the extension
            max_seq_len = int(max_seq_len * rope.scaling.factor)
        eos = values.get("eos_token_id")
        hidden_size, num_heads = _required(values, "hidden_size"), _required(values, "num_attention_heads")
        return cls(
            vocab_size=_required(values, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_required(values, "intermediate_size"),
            num_layers=_required(values, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=values.get("num_key_value_heads"),
            head_dim=values.get("head_dim"),
            max_seq_len=max_seq_len,
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            norm_eps=values.get("rms_norm_eps", 1e-6),
            tie_embeddings=values.get("tie_word_embeddings", False),
            attention_bias=family == "qwen2" or values.get("attention_bias", False),
            mlp_bias=values.get("mlp_bias", False),
            **_window_from_hf(values, family),
            family=family,
            bos_token_id=values.get("bos_token_id"),
            eos_token_id=() if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,),
            pad_token_id=values.get("pad_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        eos: Any = list(self.eos_token_id)
        assert self.head_dim is not None
        scaling = self.rope_scaling
        kind, original = (None, 0) if scaling is None else (scaling.kind, scaling.original_max_seq_len)
        values = {
            "architectures": [ARCHITECTURE_OF[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": original if kind == "dynamic" else self.max_seq_len,
            "rope_theta": rope_to_hf(self.rope_theta, scaling, self.head_dim)["rope_theta"],
            "rope_scaling": None if kind == "ntk" else scaling_to_hf(scaling),
            "rms_norm_eps": self.norm_eps,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tie_embeddings,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else eos,
            "pad_token_id": self.pad_token_id,
        }
        if self.family == "llama":
            values |= {"attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias}
        if self.family == "qwen3":
            values |= {"attention_bias": self.attention_bias}
        if self.family != "llama":
            values |= {"sliding_window": self.sliding_window}
        if self.family in ("qwen2", "qwen3"):
            is_windowed = self.sliding_window is not None
            values |= {"use_sliding_window": is_windowed, "max_window_layers": self.num_full_layers}
        return values


def _required(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; the config must give it as a whole number.")
    return value


def _refuse_what_differs(values: Mapping[str, Any], family: str) -> None:
    if family not in ARCHITECTURE_OF:
        raise ConfigError(f"model_type is {family!r}; this file builds {', '.join(ARCHITECTURE_OF)}.")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"hidden_act is {values['hidden_act']!r}; the Llama family here computes silu only.")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor is {values['partial_rotary_factor']}; only 1.0 is computed here.")


def _window_from_hf(values: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Read where a sliding window applies: to all layers (Mistral), or to those from max_window_layers on (Qwen)."""
    window = values.get("sliding_window")
    if window is None or family == "llama" or (family != "mistral" and not values.get("use_sliding_window", False)):
        return {}
    num_layers = _required(values, "num_hidden_layers")
    num_full = 0 if family == "mistral" else values.get("max_window_layers", 28)
    types = values.get("layer_types")
    if types is not None and family != "mistral":
        num_full = next((i for i, kind in enumerate(types) if kind == "sliding_attention"), num_layers)
        if types != ["full_attention"] * num_full + ["sliding_attention"] * (num_layers - num_full):
            raise ConfigError(f"layer_types is {types}; the full layers of this family come first.")
    return {"sliding_window": window, "num_full_layers": min(num_full, num_layers)}


class LlamaBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, config: LlamaConfig, layer_index: int):
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
            output_bias=c.attention_bias and c.family != "qwen2",
            options=AttentionOptions(
                window=c.window(layer_index),
                qk_norm=partial(RMSNorm, eps=c.norm_eps) if c.family == "qwen3" else None,
            ),
        )
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = GatedMlp(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        mark_residual_output(self.attention.o, c.num_layers)
        mark_residual_output(self.mlp.down, c.num_layers)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, state: Any) -> Tensor:
        """Map the stream (B, T, D) to (B, T, D)."""
        x = x + self.attention(self.attention_norm(x), rope, mask=mask, state=state)
        return x + self.mlp(self.mlp_norm(x))


class Llama(Decoder):
    """A decoder language model of the Llama family. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[type[LlamaConfig]] = LlamaConfig
    published_names: ClassVar[dict[str, str]] = {
        "embed": "model.embed_tokens",
        "layers.*.attention_norm": "model.layers.*.input_layernorm",
        "layers.*.attention.q": "model.layers.*.self_attn.q_proj",
        "layers.*.attention.k": "model.layers.*.self_attn.k_proj",
        "layers.*.attention.v": "model.layers.*.self_attn.v_proj",
        "layers.*.attention.o": "model.layers.*.self_attn.o_proj",
        "layers.*.attention.q_norm": "model.layers.*.self_attn.q_norm",
        "layers.*.attention.k_norm": "model.layers.*.self_attn.k_norm",
        "layers.*.mlp_norm": "model.layers.*.post_attention_layernorm",
        "layers.*.mlp.gate": "model.layers.*.mlp.gate_proj",
        "layers.*.mlp.up": "model.layers.*.mlp.up_proj",
        "layers.*.mlp.down": "model.layers.*.mlp.down_proj",
        "norm": "model.norm",
        "lm_head": "lm_head",
    }
    # Tables that old exports carry along; they are computed here.
    ignored_names: ClassVar[tuple[str, ...]] = ("model.layers.*.self_attn.rotary_emb.inv_freq",)

    def __init__(self, config: LlamaConfig):
        assert config.head_dim is not None
        blocks: list[nn.Module] = [LlamaBlock(config, i) for i in range(config.num_layers)]
        super().__init__(config, blocks, RMSNorm(config.hidden_size, config.norm_eps))
        self.rope = RotaryTable(config.head_dim, config.max_seq_len, config.rope_theta, config.rope_scaling)
        self.tie_weights()

    def positional(self, x: Tensor, positions: Tensor | None, state: Any) -> Rope:
        """Return cos and sin for the positions."""
        return self.rope(x.shape[1], positions)

    def cache_layout(self) -> list[LayerCache]:
        """Return what each layer remembers of a sequence."""
        c = self.config
        return [LayerCache(c.num_kv_heads, c.head_dim, c.head_dim, c.window(i)) for i in range(c.num_layers)]


ARCHITECTURES = dict.fromkeys(ARCHITECTURE_OF.values(), Llama)
