"""ModernBERT: an encoder with rotary positions, pre-norm blocks, GeGLU, and windows in two layers of three.

Every third layer sees the whole row and turns its heads by one base, the others see ``local_attention`` // 2 positions
to each side and turn by another. The first layer has no norm before its attention: the embedding's norm is there.
The published files hold q, k and v in one matrix, and the two halves of the GeGLU in one.

Source: Warner et al. 2024, arXiv 2412.13663. Not here: unpadded batches (rows are padded, or packed with a mask).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.models.encoder import (
    EncoderOutput,
    check_length,
    check_sizes,
    read_fields,
    token_mask,
    write_fields,
)
from modelwright.models.heads import HeadShape, Labels, Pool, task_models
from modelwright.nn.attention import Attention, AttentionOptions, padding_mask
from modelwright.nn.init import mark_residual_output
from modelwright.nn.mlp import GatedMlp, activation
from modelwright.nn.rope import Rope, RopeScaling, RotaryTable, rope_from_hf, rope_to_hf

FULL, SLIDING = "full_attention", "sliding_attention"
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "norm_eps",
    "norm_bias": "norm_bias",
    "act": "hidden_activation",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "local_attention": "local_attention",
    "pad_token_id": "pad_token_id",
    "tie_embeddings": "tie_word_embeddings",
}
POOLS: dict[str, Pool] = {"cls": "first", "mean": "mean"}


@dataclass(frozen=True)
class ModernBertHead:
    """How the heads are made."""

    pooling: str = "cls"  # what a sequence classifier reads: cls or mean
    act: str = "gelu"
    bias: bool = False  # of the dense layer
    decoder_bias: bool = True  # of the output of a masked language model


@dataclass(frozen=True)
class ModernBertConfig:
    """How a ModernBERT is built; the defaults are those of ModernBERT base."""

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_layers: int = 22
    num_heads: int = 12
    max_seq_len: int = 8192
    norm_eps: float = 1e-5
    norm_bias: bool = False
    act: str = "gelu"
    attention_bias: bool = False
    mlp_bias: bool = False
    local_attention: int = 128  # width of the window: half of it to each side
    layer_types: tuple[str, ...] = ()  # full_attention or sliding_attention, a layer each; empty: every third is full
    full_theta: float = 160_000.0  # base of the rotation in full layers
    full_scaling: RopeScaling | None = None  # None: positions as trained
    local_theta: float = 10_000.0  # base of the rotation in layers with a window
    pad_token_id: int = 50283
    tie_embeddings: bool = True  # of a masked language model: the output matrix is the embedding
    head: ModernBertHead = ModernBertHead()
    labels: Labels = Labels()

    def __post_init__(self) -> None:
        check_sizes(self)
        activation(self.act)
        if not self.layer_types:
            types = tuple(SLIDING if i % 3 else FULL for i in range(self.num_layers))
            object.__setattr__(self, "layer_types", types)
        if len(self.layer_types) != self.num_layers or set(self.layer_types) - {FULL, SLIDING}:
            raise ConfigError(
                f"layer_types is {self.layer_types}; expected {FULL} or {SLIDING} for each of {self.num_layers} layers."
            )
        if self.head.pooling not in POOLS:
            raise ConfigError(f"classifier_pooling is {self.head.pooling!r}; known: {', '.join(POOLS)}. Use one.")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "ModernBertConfig":
        """Read a published ``config.json``, of transformers 5 or before.

        Raises:
            ConfigError: A field has a value that this code does not compute.
        """
        read = read_fields(values, FIELDS, {})
        types = values.get("layer_types")
        if types is None:
            every = values.get("global_attn_every_n_layers", 3)
            num_layers = read.get("num_layers", cls.num_layers)
            types = [SLIDING if i % every else FULL for i in range(num_layers)]
        ropes = dict(values.get("rope_parameters") or {})
        for kind, name, theta in ((FULL, "global", cls.full_theta), (SLIDING, "local", cls.local_theta)):
            given = values.get(f"{name}_rope_theta")
            ropes[kind] = {"rope_theta": theta if given is None else given, **(ropes.get(kind) or {})}
        plain = {k: v for k, v in values.items() if k != "rope_theta"} | {"rope_parameters": ropes}
        full, local = rope_from_hf(plain, FULL), rope_from_hf(plain, SLIDING)
        if local.scaling is not None or (full.rotary_fraction, local.rotary_fraction) != (1.0, 1.0):
            raise ConfigError(f"rope_parameters is {ropes}; scaling is computed for {FULL} alone, over whole heads.")
        head = ModernBertHead(
            pooling=values.get("classifier_pooling", "cls"),
            act=values.get("classifier_activation", "gelu"),
            bias=values.get("classifier_bias", False),
            decoder_bias=values.get("decoder_bias", True),
        )
        return cls(
            **read,
            layer_types=tuple(types),
            full_theta=full.theta,
            full_scaling=full.scaling,
            local_theta=local.theta,
            head=head,
            labels=Labels.from_hf(values),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        head_dim = self.hidden_size // self.num_heads
        return {
            "architectures": ["ModernBertModel"],
            "model_type": "modernbert",
            **write_fields(self, FIELDS, {}),
            "layer_types": list(self.layer_types),
            "rope_parameters": {
                FULL: rope_to_hf(self.full_theta, self.full_scaling, head_dim),
                SLIDING: rope_to_hf(self.local_theta, None, head_dim),
            },
            "classifier_pooling": self.head.pooling,
            "classifier_activation": self.head.act,
            "classifier_bias": self.head.bias,
            "decoder_bias": self.head.decoder_bias,
            **self.labels.to_hf(),
        }


class ModernBertBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, config: ModernBertConfig, layer_index: int):
        super().__init__()
        c = config
        self.is_local = c.layer_types[layer_index] == SLIDING
        norm = nn.LayerNorm(c.hidden_size, c.norm_eps, bias=c.norm_bias)
        self.attention_norm = nn.Identity() if layer_index == 0 else norm
        self.attention = Attention(
            c.hidden_size,
            c.num_heads,
            c.num_heads,
            c.hidden_size // c.num_heads,
            layer_index=layer_index,
            bias=c.attention_bias,
            options=AttentionOptions(window=c.local_attention // 2 + 1 if self.is_local else None),
        )
        self.mlp_norm = nn.LayerNorm(c.hidden_size, c.norm_eps, bias=c.norm_bias)
        self.mlp = GatedMlp(c.hidden_size, c.intermediate_size, act=c.act, bias=c.mlp_bias)
        mark_residual_output(self.attention.o, c.num_layers)
        mark_residual_output(self.mlp.down, c.num_layers)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        """Map the stream (B, T, D) to (B, T, D)."""
        x = x + self.attention(self.attention_norm(x), rope, mask=mask, is_causal=False)
        return x + self.mlp(self.mlp_norm(x))


class ModernBert(nn.Module):
    """A ModernBERT encoder. Fresh weights come from `modelwright.nn.init.init_weights`."""

    is_encoder: ClassVar[bool] = True
    config_class: ClassVar[Any] = ModernBertConfig
    published_names: ClassVar[dict[str, str]] = {
        "embed": "embeddings.tok_embeddings",
        "embed_norm": "embeddings.norm",
        "layers.*.attention_norm": "layers.*.attn_norm",
        "layers.*.attention.o": "layers.*.attn.Wo",
        "layers.*.mlp_norm": "layers.*.mlp_norm",
        "layers.*.mlp.down": "layers.*.mlp.Wo",
        "norm": "final_norm",
    }
    published_fused: ClassVar[dict[str, tuple[str, ...]]] = {
        "layers.*.attn.Wqkv": ("layers.*.attention.q", "layers.*.attention.k", "layers.*.attention.v"),
        "layers.*.mlp.Wi": ("layers.*.mlp.gate", "layers.*.mlp.up"),
    }
    optional_prefix: ClassVar[str] = "model."
    ignored_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        c = config
        self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.embed_norm = nn.LayerNorm(c.hidden_size, c.norm_eps, bias=c.norm_bias)
        self.layers = nn.ModuleList(ModernBertBlock(c, i) for i in range(c.num_layers))
        self.norm = nn.LayerNorm(c.hidden_size, c.norm_eps, bias=c.norm_bias)
        head_dim = c.hidden_size // c.num_heads
        self.full_rope = RotaryTable(head_dim, c.max_seq_len, c.full_theta, c.full_scaling)
        self.local_rope = RotaryTable(head_dim, c.max_seq_len, c.local_theta)

    @staticmethod
    def head_shape(task: str, config: ModernBertConfig) -> HeadShape:
        """Return how the head for a task is made and published."""
        h = config.head
        return HeadShape(
            "decoder" if task == "masked_lm" else "classifier",
            dense="head.dense",
            norm="head.norm",
            act=h.act,
            pool=POOLS[h.pooling] if task == "sequence_classification" else "none",
            dense_bias=h.bias,
            norm_bias=config.norm_bias,
            has_out_bias=task != "masked_lm" or h.decoder_bias,
        )

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> EncoderOutput:
        """Encode ``input_ids`` (B, T); there is no pooler.

        Args:
            input_ids: Token ids.
            attention_mask: (B, T), 1 for tokens and 0 for padding; None when there is no padding (faster).
            positions: (B, T); None means 0 .. T-1.
            mask: Boolean, True where attention is allowed, broadcast to (B, N, T, T): packed documents.
        """
        length = input_ids.shape[1]
        check_length(input_ids, self.config.max_seq_len)
        full, local = self.full_rope(length, positions), self.local_rope(length, positions)
        everywhere, nearby = token_mask(attention_mask, mask), mask
        if attention_mask is not None:  # a window may hold nothing but padding, which then sees itself
            nearby = padding_mask(attention_mask) if mask is None else padding_mask(attention_mask) & mask
        x = self.embed_norm(self.embed(input_ids))  # (B, T, D)
        for layer in self.layers:
            x = layer(x, local if layer.is_local else full, nearby if layer.is_local else everywhere)
        return EncoderOutput(self.norm(x), None)


ARCHITECTURES = task_models(ModernBert, "ModernBert", "model.")
