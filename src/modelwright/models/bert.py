"""BERT: the bidirectional encoder with post-norm blocks and learned positions; MiniLM is one of these.

Here the encoder and its optional pooler; task heads are not. Embedding a sentence (which of the states to average)
is the business of whoever asks.

Source: Devlin et al. 2019, arXiv 1810.04805; Wang et al. 2020, arXiv 2002.10957 (MiniLM).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, RequestError
from modelwright.nn.attention import Attention
from modelwright.nn.mlp import Mlp


@dataclass(frozen=True)
class BertConfig:
    """How a BERT encoder is built; the defaults are those of BERT base."""

    vocab_size: int = 30522
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_seq_len: int = 512
    num_token_types: int = 2
    norm_eps: float = 1e-12
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "max_seq_len"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size is {self.hidden_size} and num_heads is {self.num_heads}; the heads must divide it evenly."
            )

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "BertConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute.
        """
        fixed = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
        for name, expected in fixed.items():
            if values.get(name, expected) != expected:
                raise ConfigError(f"{name} is {values[name]!r}; the BERT encoder here computes {expected!r} only.")
        default = cls()
        return cls(
            vocab_size=values.get("vocab_size", default.vocab_size),
            hidden_size=values.get("hidden_size", default.hidden_size),
            intermediate_size=values.get("intermediate_size", default.intermediate_size),
            num_layers=values.get("num_hidden_layers", default.num_layers),
            num_heads=values.get("num_attention_heads", default.num_heads),
            max_seq_len=values.get("max_position_embeddings", default.max_seq_len),
            num_token_types=values.get("type_vocab_size", default.num_token_types),
            norm_eps=values.get("layer_norm_eps", default.norm_eps),
            pad_token_id=values.get("pad_token_id", default.pad_token_id),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        return {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "max_position_embeddings": self.max_seq_len,
            "type_vocab_size": self.num_token_types,
            "layer_norm_eps": self.norm_eps,
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
            "pad_token_id": self.pad_token_id,
        }


class EncoderOutput(NamedTuple):
    """What an encoder returns."""

    last_hidden_state: Tensor  # (B, T, D)
    pooled: Tensor | None  # (B, D), the first token through the pooler; None where the weights have no pooler


class BertBlock(nn.Module):
    """Attention and feed-forward, each added to the stream and normed after."""

    def __init__(self, config: BertConfig, layer_index: int):
        super().__init__()
        c = config
        head_dim = c.hidden_size // c.num_heads
        self.attention = Attention(
            c.hidden_size, c.num_heads, c.num_heads, head_dim, layer_index=layer_index, bias=True
        )
        self.attention_norm = nn.LayerNorm(c.hidden_size, c.norm_eps)
        self.mlp = Mlp(c.hidden_size, c.intermediate_size)
        self.mlp_norm = nn.LayerNorm(c.hidden_size, c.norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map the stream (B, T, D) to (B, T, D)."""
        x = self.attention_norm(x + self.attention(x, mask=mask, is_causal=False))
        return self.mlp_norm(x + self.mlp(x))


class Bert(nn.Module):
    """A BERT-family encoder. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[type[BertConfig]] = BertConfig
    published_names: ClassVar[dict[str, str]] = {
        "embed": "embeddings.word_embeddings",
        "position_embed": "embeddings.position_embeddings",
        "type_embed": "embeddings.token_type_embeddings",
        "embed_norm": "embeddings.LayerNorm",
        "layers.*.attention.q": "encoder.layer.*.attention.self.query",
        "layers.*.attention.k": "encoder.layer.*.attention.self.key",
        "layers.*.attention.v": "encoder.layer.*.attention.self.value",
        "layers.*.attention.o": "encoder.layer.*.attention.output.dense",
        "layers.*.attention_norm": "encoder.layer.*.attention.output.LayerNorm",
        "layers.*.mlp.up": "encoder.layer.*.intermediate.dense",
        "layers.*.mlp.down": "encoder.layer.*.output.dense",
        "layers.*.mlp_norm": "encoder.layer.*.output.LayerNorm",
        "pooler": "pooler.dense",
    }
    optional_prefix: ClassVar[str] = "bert."  # in front of every name, in checkpoints that had a task head
    optional_modules: ClassVar[tuple[str, ...]] = ("pooler",)  # left out when the file has none of its tensors
    ignored_names: ClassVar[tuple[str, ...]] = ("embeddings.position_ids",)  # 0 .. 511, once saved by mistake

    def __init__(self, config: BertConfig):
        super().__init__()
        c = config
        self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embed = nn.Embedding(c.max_seq_len, c.hidden_size)
        self.type_embed = nn.Embedding(c.num_token_types, c.hidden_size)
        self.embed_norm = nn.LayerNorm(c.hidden_size, c.norm_eps)
        self.layers = nn.ModuleList(BertBlock(c, i) for i in range(c.num_layers))
        self.pooler: nn.Linear | None = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(
        self, input_ids: Tensor, *, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> EncoderOutput:
        """Encode ``input_ids`` (B, T).

        Args:
            input_ids: Token ids.
            attention_mask: (B, T), 1 for tokens and 0 for padding; None when there is no padding (faster).
            token_type_ids: (B, T), 0 for the first text and 1 for the second; None means all 0.
        """
        length = input_ids.shape[1]
        if length > self.config.max_seq_len:
            raise RequestError(
                f"The input has {length} tokens; this encoder reads at most {self.config.max_seq_len}. Shorten it.",
                code="context_length_exceeded",
            )
        types = self.type_embed.weight[0] if token_type_ids is None else self.type_embed(token_type_ids)
        x = self.embed_norm(self.embed(input_ids) + types + self.position_embed.weight[:length])  # (B, T, D)
        mask = None if attention_mask is None else attention_mask.to(torch.bool)[:, None, None, :]  # (B, 1, 1, S)
        for layer in self.layers:
            x = layer(x, mask)
        return EncoderOutput(x, None if self.pooler is None else torch.tanh(self.pooler(x[:, 0])))


ARCHITECTURES = {"BertModel": Bert}
