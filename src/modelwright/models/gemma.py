"""Gemma 1, 2 and 3 (text): Llama's shape with norms that scale by (1 + w), a scaled embedding and GeGLU.

Gemma 2 norms what attention and feed-forward write as well as what they read, caps scores and logits, and lets every
second layer see a window only. Gemma 3 has a norm on each query and key head instead of the caps, five windowed
layers to each full one, and two rotations: a slow one, which may be stretched, for the full layers.

Source: Gemma Team 2024, arXiv 2403.08295 (1) and arXiv 2408.00118 (2); 2025, arXiv 2503.19786 (3). Not here: images,
attention that looks ahead (EmbeddingGemma), biases.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.models.decoder import Decoder, LayerCache, SoftcapLinear
from modelwright.models.published import (
    check_heads,
    check_published,
    check_sizes,
    required,
    token_ids_from_hf,
    token_ids_to_hf,
    whole_rope_from_hf,
)
from modelwright.nn.attention import Attention, AttentionOptions
from modelwright.nn.init import mark_residual_output
from modelwright.nn.mlp import GatedMlp
from modelwright.nn.norm import ShiftedRMSNorm
from modelwright.nn.rope import Rope, RopeScaling, RotaryTable, scaling_to_hf

ARCHITECTURE_OF = {"gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
SLIDING, FULL = "sliding_attention", "full_attention"
WINDOW_EVERY = {"gemma2": 2, "gemma3_text": 6}  # where the config names no layers, every so-manieth is a full one


@dataclass(frozen=True)
class GemmaRope:
    """The rotations of full and windowed layers."""

    theta: float = 10000.0  # of the layers that see everything
    local_theta: float = 10000.0  # of the layers with a window; gemma3_text alone may differ in this
    scaling: RopeScaling | None = None  # of the layers that see everything; None: positions as trained


@dataclass(frozen=True)
class GemmaConfig:
    """How a Gemma is built."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 1
    head_dim: int = 64
    max_seq_len: int = 8192
    query_size: float | None = None  # scores are divided by its square root; None: head_dim
    rope: GemmaRope = GemmaRope()
    norm_eps: float = 1e-6
    attention_softcap: float | None = None  # gemma2; None: off
    logit_softcap: float | None = None  # None: off
    sliding_window: int | None = None  # positions that a token sees in the windowed layers; None: there are none
    full_layers: tuple[int, ...] = ()  # layers that see everything, where there is a window
    family: str = "gemma2"  # gemma, gemma2 or gemma3_text
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.query_size is None:
            object.__setattr__(self, "query_size", self.head_dim)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        check_sizes(self, *sizes, "head_dim", "max_seq_len")
        check_heads(self.num_heads, self.num_kv_heads)
        if self.family not in ARCHITECTURE_OF:
            raise ConfigError(f"family is {self.family!r}; known: {', '.join(ARCHITECTURE_OF)}.")
        for name in ("query_size", "attention_softcap", "logit_softcap", "sliding_window"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value!r}; it must be above 0, or left out.")
        wrong = [i for i in self.full_layers if not 0 <= i < self.num_layers]
        if wrong or (self.full_layers and self.sliding_window is None):
            raise ConfigError(
                f"full_layers is {self.full_layers} with sliding_window {self.sliding_window}; it names layers from 0 "
                f"to {self.num_layers - 1}, and only where there is a window."
            )
        if self.family == "gemma" and (self.sliding_window or self.attention_softcap or self.logit_softcap):
            raise ConfigError("The first Gemma has no window and no soft-caps; choose family 'gemma2' for these.")
        if self.family == "gemma3_text" and self.attention_softcap is not None:
            raise ConfigError("attention_softcap is given; Gemma 3 has none (a norm on queries and keys instead).")
        if self.family != "gemma3_text" and self.rope.theta != self.rope.local_theta:
            raise ConfigError(
                f"rope has theta {self.rope.theta} and local_theta {self.rope.local_theta}; they differ in "
                "gemma3_text alone."
            )

    @property
    def tie_embeddings(self) -> bool:
        """The output matrix is the embedding, always."""
        return True

    def window(self, layer_index: int) -> int | None:
        """Return the positions that a token sees in a layer; None: all before it."""
        return None if layer_index in self.full_layers else self.sliding_window

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "GemmaConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute, or sizes contradict each other.
        """
        family = values.get("model_type", "gemma2")
        _refuse_what_differs(values, family)
        num_heads = required(values, "num_attention_heads")
        gemma2 = family == "gemma2"
        return cls(
            vocab_size=required(values, "vocab_size"),
            hidden_size=required(values, "hidden_size"),
            intermediate_size=required(values, "intermediate_size"),
            num_layers=required(values, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=values.get("num_key_value_heads", num_heads),
            head_dim=values.get("head_dim", 256),
            max_seq_len=values.get("max_position_embeddings", 8192),
            query_size=None if family == "gemma" else values.get("query_pre_attn_scalar", 256),
            rope=_rope_from_hf(values, family),
            norm_eps=values.get("rms_norm_eps", 1e-6),
            attention_softcap=values.get("attn_logit_softcapping", 50.0 if gemma2 else None),
            logit_softcap=values.get("final_logit_softcapping", 30.0 if gemma2 else None),
            **_windows_from_hf(values, family),
            family=family,
            **token_ids_from_hf(values),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        values: dict[str, Any] = {
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
            "rope_theta": self.rope.theta,
            "rms_norm_eps": self.norm_eps,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "use_cache": True,
            **token_ids_to_hf(self),
        }
        if self.rope.scaling is not None:
            values["rope_scaling"] = scaling_to_hf(self.rope.scaling)
        if self.family != "gemma":
            size = self.query_size
            values |= {
                "query_pre_attn_scalar": int(size) if size is not None and size == int(size) else size,
                "attn_logit_softcapping": self.attention_softcap,
                "final_logit_softcapping": self.logit_softcap,
                "sliding_window": self.sliding_window,
                "layer_types": [FULL if self.window(i) is None else SLIDING for i in range(self.num_layers)],
            }
        if self.family == "gemma3_text":
            values |= {"rope_local_base_freq": self.rope.local_theta}
        return values


def _refuse_what_differs(values: Mapping[str, Any], family: str) -> None:
    if family not in ARCHITECTURE_OF:
        raise ConfigError(f"model_type is {family!r}; this file builds {', '.join(ARCHITECTURE_OF)}.")
    fixed = {"attention_bias": False, "tie_word_embeddings": True}
    check_published(values, family, **fixed)
    # The first Gemma's hidden_act says gelu and means the tanh approximation, as hidden_activation of later files does.
    act = values.get("hidden_activation") or "gelu_pytorch_tanh"
    if act not in ("gelu_pytorch_tanh", "gelu_new"):
        raise ConfigError(f"hidden_activation is {act!r}; the Gemma family here computes gelu_pytorch_tanh only.")
    if values.get("use_bidirectional_attention"):
        raise ConfigError(
            f"use_bidirectional_attention is {values['use_bidirectional_attention']!r}; only causal is computed here."
        )


def _rope_from_hf(values: Mapping[str, Any], family: str) -> GemmaRope:
    if family != "gemma3_text":
        settings = whole_rope_from_hf(values)
        return GemmaRope(settings.theta, settings.theta, settings.scaling)
    given = values.get("rope_parameters") or {}
    local = given.get(SLIDING) or {}
    local_theta = float(local.get("rope_theta", values.get("rope_local_base_freq", 10000.0)))
    if (kind := local.get("rope_type", "default")) != "default":
        raise ConfigError(f"rope scaling of the {SLIDING} layers is {kind!r}; only the others' is computed here.")
    settings = whole_rope_from_hf({"rope_theta": 1_000_000.0, **values}, FULL)
    return GemmaRope(settings.theta, local_theta, settings.scaling)


def _windows_from_hf(values: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Read which layers have a window: named one by one, or every so-manieth has none."""
    if family == "gemma":
        return {}
    num_layers = required(values, "num_hidden_layers")
    every = values.get("sliding_window_pattern", WINDOW_EVERY[family])
    types = values.get("layer_types") or [FULL if (i + 1) % every == 0 else SLIDING for i in range(num_layers)]
    if len(types) != num_layers or not set(types) <= {SLIDING, FULL}:
        raise ConfigError(f"layer_types is {types}; it must name {SLIDING} or {FULL} for each of {num_layers} layers.")
    full = tuple(i for i, kind in enumerate(types) if kind == FULL)
    if len(full) == num_layers:
        return {}
    return {"sliding_window": values.get("sliding_window", 4096), "full_layers": full}


class Rotations(NamedTuple):
    """cos and sin for both kinds of layers."""

    full: Rope
    local: Rope


class GemmaBlock(nn.Module):
    """Attention and feed-forward, each behind a norm, its result normed again (not in Gemma 1) and added."""

    def __init__(self, config: GemmaConfig, layer_index: int):
        super().__init__()
        c = config
        assert c.query_size is not None
        norm = partial(ShiftedRMSNorm, eps=c.norm_eps)
        self.has_window = c.window(layer_index) is not None
        self.attention_norm = norm(c.hidden_size)
        self.attention = Attention(
            c.hidden_size,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            layer_index=layer_index,
            options=AttentionOptions(
                scale=c.query_size**-0.5,
                window=c.window(layer_index),
                softcap=c.attention_softcap,
                qk_norm=norm if c.family == "gemma3_text" else None,
            ),
        )
        self.mlp_norm = norm(c.hidden_size)
        self.mlp = GatedMlp(c.hidden_size, c.intermediate_size, act="gelu_pytorch_tanh")
        has_post_norms = c.family != "gemma"
        self.attention_post_norm = norm(c.hidden_size) if has_post_norms else None
        self.mlp_post_norm = norm(c.hidden_size) if has_post_norms else None
        mark_residual_output(self.attention.o, c.num_layers)
        mark_residual_output(self.mlp.down, c.num_layers)

    def forward(self, x: Tensor, rope: Rotations, mask: Tensor | None, state: Any) -> Tensor:
        """Map the stream (B, T, D) to (B, T, D)."""
        turned = rope.local if self.has_window else rope.full
        y = self.attention(self.attention_norm(x), turned, mask=mask, state=state)
        x = x + (y if self.attention_post_norm is None else self.attention_post_norm(y))
        y = self.mlp(self.mlp_norm(x))
        return x + (y if self.mlp_post_norm is None else self.mlp_post_norm(y))


class Gemma(Decoder):
    """A Gemma 2 or 3 language model. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[type[GemmaConfig]] = GemmaConfig
    published_names: ClassVar[dict[str, str]] = {
        "embed": "model.embed_tokens",
        "layers.*.attention_norm": "model.layers.*.input_layernorm",
        "layers.*.attention.q": "model.layers.*.self_attn.q_proj",
        "layers.*.attention.k": "model.layers.*.self_attn.k_proj",
        "layers.*.attention.v": "model.layers.*.self_attn.v_proj",
        "layers.*.attention.o": "model.layers.*.self_attn.o_proj",
        "layers.*.attention.q_norm": "model.layers.*.self_attn.q_norm",
        "layers.*.attention.k_norm": "model.layers.*.self_attn.k_norm",
        "layers.*.attention_post_norm": "model.layers.*.post_attention_layernorm",
        "layers.*.mlp_norm": "model.layers.*.pre_feedforward_layernorm",
        "layers.*.mlp.gate": "model.layers.*.mlp.gate_proj",
        "layers.*.mlp.up": "model.layers.*.mlp.up_proj",
        "layers.*.mlp.down": "model.layers.*.mlp.down_proj",
        "layers.*.mlp_post_norm": "model.layers.*.post_feedforward_layernorm",
        "norm": "model.norm",
        "lm_head": "lm_head",
    }

    def __init__(self, config: GemmaConfig):
        c = config
        blocks: list[nn.Module] = [GemmaBlock(c, i) for i in range(c.num_layers)]
        head = None if c.logit_softcap is None else SoftcapLinear(c.hidden_size, c.vocab_size, c.logit_softcap)
        super().__init__(c, blocks, ShiftedRMSNorm(c.hidden_size, c.norm_eps), head)
        self.rope = RotaryTable(c.head_dim, c.max_seq_len, c.rope.theta, c.rope.scaling)
        has_two = c.family == "gemma3_text" and c.sliding_window is not None
        self.local_rope = RotaryTable(c.head_dim, c.max_seq_len, c.rope.local_theta) if has_two else None
        self.tie_weights()

    def embed_tokens(self, input_ids: Tensor, positions: Tensor | None) -> Tensor:
        """Return the embedding times the square root of the width, (B, T, D).

        The factor is rounded to the dtype of the weights, as the models were trained: 55.5 for 3072 in bfloat16.
        """
        x = self.embed(input_ids)
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype, device=x.device)

    def positional(self, x: Tensor, positions: Tensor | None, state: Any) -> Rotations:
        """Return cos and sin for the positions, for the full and for the windowed layers."""
        full = self.rope(x.shape[1], positions)
        return Rotations(full, full if self.local_rope is None else self.local_rope(x.shape[1], positions))

    def cache_layout(self) -> list[LayerCache]:
        """Return what each layer remembers of a sequence."""
        c = self.config
        return [LayerCache(c.num_kv_heads, c.head_dim, c.head_dim, c.window(i)) for i in range(c.num_layers)]


class Gemma1(Gemma):
    """A Gemma of the first release, whose norm before the feed-forward half has Llama's name."""

    published_names: ClassVar[dict[str, str]] = {
        ours: theirs for ours, theirs in Gemma.published_names.items() if "post_norm" not in ours
    } | {"layers.*.mlp_norm": "model.layers.*.post_attention_layernorm"}


ARCHITECTURES = {"GemmaForCausalLM": Gemma1, "Gemma2ForCausalLM": Gemma, "Gemma3ForCausalLM": Gemma}
