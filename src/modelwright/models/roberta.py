"""RoBERTa and XLM-RoBERTa: BERT with positions that count from the padding id, one token type, and heads of its own.

A token's position is its number among the tokens that are not padding, plus ``pad_token_id``; padding itself stands
at ``pad_token_id``. So rows padded on the left and on the right agree, and the table has ``pad_token_id + 1`` rows
more than the longest input. What is padding is read off the ids, not off the attention mask, as published.

Source: Liu et al. 2019, arXiv 1907.11692; Conneau et al. 2020, arXiv 1911.02116 (XLM-RoBERTa).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from modelwright.base.errors import ConfigError
from modelwright.models.bert import FIELDS, FIXED, Bert
from modelwright.models.encoder import check_sizes, read_fields, write_fields
from modelwright.models.heads import HeadShape, Labels, task_models
from modelwright.nn.mlp import activation

ARCHITECTURE_OF = {"roberta": "RobertaModel", "xlm-roberta": "XLMRobertaModel"}


@dataclass(frozen=True)
class RobertaConfig:
    """How a RoBERTa encoder is built; the defaults are those of RoBERTa base."""

    vocab_size: int = 50265
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_seq_len: int = 512  # tokens; the published number of positions is pad_token_id + 1 more
    num_token_types: int = 1
    norm_eps: float = 1e-5
    act: str = "gelu"
    pad_token_id: int = 1
    tie_embeddings: bool = True  # of a masked language model: the output matrix is the embedding
    family: str = "roberta"  # or xlm-roberta: the name under which the weights are published
    labels: Labels = Labels()

    def __post_init__(self) -> None:
        check_sizes(self)
        activation(self.act)
        if self.family not in ARCHITECTURE_OF:
            raise ConfigError(f"family is {self.family!r}; known: {', '.join(ARCHITECTURE_OF)}. Use one of these.")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "RobertaConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute.
        """
        read = read_fields(values, FIELDS | {"family": "model_type"}, FIXED)
        if "max_seq_len" in read:
            read["max_seq_len"] -= read.get("pad_token_id", cls.pad_token_id) + 1
        return cls(**read, labels=Labels.from_hf(values))

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        values = write_fields(self, FIELDS | {"family": "model_type"}, FIXED) | self.labels.to_hf()
        values["max_position_embeddings"] += self.pad_token_id + 1
        return {"architectures": [ARCHITECTURE_OF[self.family]]} | values


def roberta_head(task: str, lm_norm: str = "lm_head.layer_norm") -> HeadShape:
    """Return the heads of RoBERTa, which Longformer shares."""
    shapes = {
        "masked_lm": HeadShape("lm_head.decoder", out_bias="lm_head.bias", dense="lm_head.dense", norm=lm_norm),
        "sequence_classification": HeadShape("classifier.out_proj", dense="classifier.dense", act="tanh", pool="first"),
        "token_classification": HeadShape("classifier"),
        "question_answering": HeadShape("qa_outputs"),
    }
    return shapes[task]


class Roberta(Bert):
    """A RoBERTa encoder. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[Any] = RobertaConfig
    optional_prefix: ClassVar[str] = "roberta."

    @staticmethod
    def head_shape(task: str, config: Any) -> HeadShape:
        """Return how the head for a task is made and published."""
        return roberta_head(task)

    @staticmethod
    def num_positions(config: Any) -> int:
        """Return the rows of the position table."""
        return int(config.max_seq_len + config.pad_token_id + 1)

    def place(self, input_ids: Tensor) -> Tensor:
        """Return the rows of the position table for each token, (B, T)."""
        return count_tokens(input_ids, self.config.pad_token_id)


def count_tokens(input_ids: Tensor, pad_token_id: int) -> Tensor:
    """Number the tokens that are not padding from ``pad_token_id + 1`` on; padding stands at ``pad_token_id``.

    >>> import torch
    >>> count_tokens(torch.tensor([[1, 1, 7, 8, 9]]), 1).tolist()
    [[1, 1, 2, 3, 4]]
    """
    is_token = (input_ids != pad_token_id).long()
    return is_token.cumsum(1) * is_token + pad_token_id


ARCHITECTURES = task_models(Roberta, "Roberta", "roberta.") | task_models(Roberta, "XLMRoberta", "roberta.")
