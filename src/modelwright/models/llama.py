"""Llama: the pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU.

One file for the families that are the same computation: Llama 1-3.x, Mistral without a sliding window, and Qwen2 /
Qwen2.5 (biases on q, k, v alone). The model never computes a loss and never builds a tokenizer; logits come in the
dtype of the weights. Dropout is not here.

Source: Touvron et al. 2023, arXiv 2302.13971; Grattafiori et al. 2024, arXiv 2407.21783 (3.x);
Jiang et al. 2023, arXiv 2310.06825 (Mistral); Yang et al. 2024, arXiv 2407.10671 (Qwen2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, RequestError
from modelwright.nn.attention import Attention, padding_mask
from modelwright.nn.decode_state import KVState
from modelwright.nn.init import mark_residual_output
from modelwright.nn.mlp import SwiGLU
from modelwright.nn.norm import RMSNorm
from modelwright.nn.rope import Rope, RopeScaling, RotaryTable, scaling_from_hf, scaling_to_hf

ARCHITECTURE_OF = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


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
    family: str = "llama"  # llama, mistral or qwen2: the name under which the weights are published
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

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute, or sizes contradict each other.
        """
        family = values.get("model_type", "llama")
        _refuse_what_differs(values, family)
        rope = values.get("rope_parameters") or {}  # transformers 5; before it: rope_theta and rope_scaling
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
            max_seq_len=values.get("max_position_embeddings", 2048),
            rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
            rope_scaling=scaling_from_hf(rope or values.get("rope_scaling")),
            norm_eps=values.get("rms_norm_eps", 1e-6),
            tie_embeddings=values.get("tie_word_embeddings", False),
            attention_bias=family == "qwen2" or values.get("attention_bias", False),
            mlp_bias=values.get("mlp_bias", False),
            family=family,
            bos_token_id=values.get("bos_token_id"),
            eos_token_id=() if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,),
            pad_token_id=values.get("pad_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        eos: Any = list(self.eos_token_id)
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
            "max_position_embeddings": self.max_seq_len,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling_to_hf(self.rope_scaling),
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
        if self.family == "mistral":
            values |= {"sliding_window": None}
        if self.family == "qwen2":
            values |= {"use_sliding_window": False}
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
    is_windowed = values.get("sliding_window") is not None and (
        family == "mistral" or values.get("use_sliding_window", False)
    )
    if is_windowed:
        raise ConfigError(
            f"sliding_window is {values['sliding_window']}; attention here sees every earlier position. "
            "Use a version of the model without a window (Mistral 0.2 or later)."
        )
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor is {values['partial_rotary_factor']}; only 1.0 is computed here.")


class CausalOutput(NamedTuple):
    """What a language model returns."""

    logits: Tensor  # (B, T, V), or (B, 1, V) for last_only, in the dtype of the weights


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
        )
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        mark_residual_output(self.attention.o, c.num_layers)
        mark_residual_output(self.mlp.down, c.num_layers)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, state: Any) -> Tensor:
        """Map the stream (B, T, D) to (B, T, D)."""
        x = x + self.attention(self.attention_norm(x), rope, mask=mask, state=state)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """A decoder language model of the Llama family. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[type[LlamaConfig]] = LlamaConfig
    published_names: ClassVar[dict[str, str]] = {
        "embed": "model.embed_tokens",
        "layers.*.attention_norm": "model.layers.*.input_layernorm",
        "layers.*.attention.q": "model.layers.*.self_attn.q_proj",
        "layers.*.attention.k": "model.layers.*.self_attn.k_proj",
        "layers.*.attention.v": "model.layers.*.self_attn.v_proj",
        "layers.*.attention.o": "model.layers.*.self_attn.o_proj",
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
        super().__init__()
        assert config.head_dim is not None
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = RotaryTable(config.head_dim, config.max_seq_len, config.rope_theta, config.rope_scaling)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the output matrix the embedding itself, where the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def tied_names(self) -> dict[str, str]:
        """Return which parameter is another one under a second name: {second: first}."""
        return {"lm_head.weight": "embed.weight"} if self.config.tie_embeddings else {}

    def _apply(self, fn: Any, recurse: bool = True) -> "Llama":
        super()._apply(fn, recurse)
        self.tie_weights()  # moving off the meta device makes a new parameter per module
        return self

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        state: Any = None,
    ) -> Tensor:
        """Return the stream after the last norm, (B, T, D).

        Args:
            input_ids: (B, T) token ids.
            positions: (B, T); None means 0 .. T-1. Needed with a state.
            mask: Boolean, True where attention is allowed, broadcast to (B, 1, T, T); it narrows the causal mask.
            state: A `DecodeState` that holds the past and does the masking, or None.
        """
        length = input_ids.shape[1]
        if length > self.config.max_seq_len:
            raise RequestError(
                f"The input has {length} tokens; this model reads at most {self.config.max_seq_len}. Shorten it.",
                code="context_length_exceeded",
            )
        if state is not None and (positions is None or mask is not None):
            raise RequestError("With a decode state, give positions and no mask: the state knows what may be seen.")
        rope = self.rope(length, positions)
        x = self.embed(input_ids)  # (B, T, D)
        for layer in self.layers:
            x = layer(x, rope, mask, state)
        return self.norm(x)

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        state: Any = None,
        last_only: bool = False,
    ) -> CausalOutput:
        """Return the logits of the next token at every position, or at the last one for ``last_only``.

        ``attention_mask`` (B, T) marks tokens with 1 and padding with 0; the other arguments are those of `hidden`.
        """
        if attention_mask is not None:
            padding = padding_mask(attention_mask)  # (B, 1, T, T)
            mask = padding if mask is None else mask & padding
        h = self.hidden(input_ids, positions, mask, state)
        return CausalOutput(self.lm_head(h[:, -1:] if last_only else h))

    def num_parameters(self) -> int:
        """Count parameters, a tied one once."""
        return sum(p.numel() for p in self.parameters())

    def new_state(self, batch_size: int, max_seq_len: int | None = None, dtype: torch.dtype | None = None) -> Any:
        """Return an empty dense `KVState` that fits this model."""
        c, weight = self.config, self.embed.weight
        assert c.num_kv_heads is not None and c.head_dim is not None
        return KVState(
            num_layers=c.num_layers,
            batch_size=batch_size,
            max_seq_len=max_seq_len or c.max_seq_len,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            dtype=dtype or weight.dtype,
            device=weight.device,
        )
