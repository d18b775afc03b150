"""BERT: the bidirectional encoder with post-norm blocks and learned positions; MiniLM is one of these.

Here the encoder, its optional pooler, and where its task heads are published. `modelwright.models.roberta`,
`longformer` and `bigbird` are this encoder with other positions or another attention. Embedding a sentence (which of
the states to average) is `modelwright.models.sentence`.

Source: Devlin et al. 2019, arXiv 1810.04805; Wang et al. 2020, arXiv 2002.10957 (MiniLM).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modelwright.models.encoder import (
    EncoderOutput,
    check_length,
    check_sizes,
    read_fields,
    token_mask,
    write_fields,
)
from modelwright.models.heads import HeadShape, Labels, task_models
from modelwright.nn.attention import Attention
from modelwright.nn.mlp import Mlp, activation

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_seq_len": "max_position_embeddings",
    "num_token_types": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
    "act": "hidden_act",
    "pad_token_id": "pad_token_id",
    "tie_embeddings": "tie_word_embeddings",
}
FIXED = {"position_embedding_type": "absolute", "is_decoder": False}


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
    act: str = "gelu"
    pad_token_id: int = 0
    tie_embeddings: bool = True  # of a masked language model: the output matrix is the embedding
    labels: Labels = Labels()

    def __post_init__(self) -> None:
        check_sizes(self)
        activation(self.act)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "BertConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute.
        """
        return cls(**read_fields(values, FIELDS, FIXED), labels=Labels.from_hf(values))

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        values = write_fields(self, FIELDS, FIXED) | self.labels.to_hf()
        return {"architectures": ["BertModel"], "model_type": "bert"} | values


class BertBlock(nn.Module):
    """Attention and feed-forward, each added to the stream and normed after."""

    def __init__(self, config: Any, attention: nn.Module):
        super().__init__()
        self.attention = attention
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, act=config.act)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, visible: Any) -> Tensor:
        """Map the stream (B, T, D) to (B, T, D); ``visible`` is what the family's attention takes as its mask."""
        x = self.attention_norm(x + self.attention(x, mask=visible, is_causal=False))
        return self.mlp_norm(x + self.mlp(x))


class Bert(nn.Module):
    """A BERT-family encoder. Fresh weights come from `modelwright.nn.init.init_weights`."""

    is_encoder: ClassVar[bool] = True
    config_class: ClassVar[Any] = BertConfig
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

    def __init__(self, config: Any):
        super().__init__()
        c = config
        self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embed = nn.Embedding(self.num_positions(c), c.hidden_size)
        self.type_embed = nn.Embedding(c.num_token_types, c.hidden_size)
        self.embed_norm = nn.LayerNorm(c.hidden_size, c.norm_eps)
        self.layers = nn.ModuleList(BertBlock(c, self.make_attention(c, i)) for i in range(c.num_layers))
        self.pooler: nn.Linear | None = nn.Linear(c.hidden_size, c.hidden_size)

    @staticmethod
    def head_shape(task: str, config: Any) -> HeadShape:
        """Return how the head for a task is made and published."""
        mlm = "cls.predictions"
        shapes = {
            "masked_lm": HeadShape(
                f"{mlm}.decoder",
                out_bias=f"{mlm}.bias",
                dense=f"{mlm}.transform.dense",
                norm=f"{mlm}.transform.LayerNorm",
                act=config.act,
            ),
            "sequence_classification": HeadShape("classifier", pool="pooler", has_pooler=True),
            "token_classification": HeadShape("classifier"),
            "question_answering": HeadShape("qa_outputs"),
        }
        return shapes[task]

    @staticmethod
    def num_positions(config: Any) -> int:
        """Return the rows of the position table."""
        return int(config.max_seq_len)

    @staticmethod
    def make_attention(config: Any, layer_index: int) -> nn.Module:
        """Return the attention of one block."""
        c = config
        head_dim = c.hidden_size // c.num_heads
        return Attention(c.hidden_size, c.num_heads, c.num_heads, head_dim, layer_index=layer_index, bias=True)

    def place(self, input_ids: Tensor) -> Tensor:
        """Return the rows of the position table for each token, (T,) or (B, T)."""
        return torch.arange(input_ids.shape[1], device=input_ids.device)

    def embed_tokens(self, input_ids: Tensor, token_type_ids: Tensor | None, positions: Tensor | None) -> Tensor:
        """Return the stream before the first block, (B, T, D)."""
        types = self.type_embed.weight[0] if token_type_ids is None else self.type_embed(token_type_ids)
        places = self.place(input_ids) if positions is None else positions
        return self.embed_norm(self.embed(input_ids) + types + self.position_embed(places))

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> EncoderOutput:
        """Encode ``input_ids`` (B, T).

        Args:
            input_ids: Token ids.
            attention_mask: (B, T), 1 for tokens and 0 for padding; None when there is no padding (faster).
            token_type_ids: (B, T), 0 for the first text and 1 for the second; None means all 0.
            positions: (B, T) rows of the position table; None: as the family counts them.
            mask: Boolean, True where attention is allowed, broadcast to (B, N, T, T): packed documents.
        """
        check_length(input_ids, self.config.max_seq_len)
        x = self.embed_tokens(input_ids, token_type_ids, positions)
        return self.encode(x, token_mask(attention_mask, mask))

    def encode(self, x: Tensor, visible: Any) -> EncoderOutput:
        """Run the blocks and the pooler over the embedded input (B, T, D)."""
        for layer in self.layers:
            x = layer(x, visible)
        return EncoderOutput(x, None if self.pooler is None else torch.tanh(self.pooler(x[:, 0])))


ARCHITECTURES = task_models(Bert, "Bert", "bert.")
