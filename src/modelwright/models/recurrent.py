"""Recurrent language models and classifiers: an RNN, LSTM or GRU between an embedding and an output matrix.

What a token leaves behind is a vector of fixed size, so a step costs the same at any length. The language model takes
the same input and gives the same output as the attention models here: it is trained by the same loop, steps through
the same decode state, and is saved in the same container.
Source: Mikolov et al. 2010 (RNN language model); Zaremba et al. 2014, arXiv:1409.2329 (LSTM, where dropout goes);
Press & Wolf 2017, arXiv:1608.05859 (tied output).
Not done: adaptive softmax, weight dropout, truncated backpropagation.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, RequestError
from modelwright.base.registry import lookup
from modelwright.models.decoder import Decoder, LayerCache
from modelwright.models.own_format import OwnFormat, fields_from_hf, fields_to_hf
from modelwright.nn import RECURRENT_CELLS
from modelwright.nn.recurrent import RecurrentLayer, make_recurrent, starts_from_mask

POOLINGS = ("last", "mean")


@dataclass(frozen=True)
class RecurrentConfig:
    """How a recurrent language model or classifier is built."""

    vocab_size: int
    hidden_size: int = 256  # of the embedding and the state
    num_layers: int = 1
    cell: str = "lstm"  # rnn, lstm or gru
    max_seq_len: int = 4096  # a bound on memory alone: the model itself knows none
    memory_len: int | None = None  # steps that gates should remember at first; None: see nn.recurrent
    dropout: float = 0.0  # in training: of the embedding and each layer's output, never from step to step
    tie_embeddings: bool = False  # the output matrix is the embedding
    num_labels: int | None = None  # None: a language model; else a classifier of so many classes
    pooling: str | None = None  # a classifier reads its last state ("last") or the mean of all; None: last
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        lookup(RECURRENT_CELLS, self.cell, "cell")
        for name in ("vocab_size", "hidden_size", "num_layers", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; expected a fraction from 0 to below 1.")
        if self.pooling not in (None, *POOLINGS):
            raise ConfigError(f"pooling is {self.pooling!r}; known: {', '.join(POOLINGS)}.")
        if self.num_labels is None and self.pooling is not None:
            raise ConfigError("pooling is given without num_labels; only a classifier pools. Set num_labels too.")
        if self.num_labels is not None and (self.num_labels < 2 or self.tie_embeddings):
            raise ConfigError(
                f"num_labels is {self.num_labels}, tie_embeddings {self.tie_embeddings}; a classifier has two "
                "classes or more and no output matrix to tie."
            )

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "RecurrentConfig":
        """Read a ``config.json`` of ours."""
        return fields_from_hf(cls, values)

    def to_hf(self) -> dict[str, Any]:
        """Return the ``config.json``."""
        name = "RecurrentForCausalLM" if self.num_labels is None else "RecurrentForSequenceClassification"
        return fields_to_hf(self, "recurrent", name)


class RecurrentBlock(nn.Module):
    """One layer as a `Decoder` calls it, with dropout on what goes into it."""

    def __init__(self, layer: RecurrentLayer, dropout: float):
        super().__init__()
        self.cell = layer
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, places: Any, mask: Tensor | None, state: Any) -> Tensor:
        """Map (B, T, D) to (B, T, D). The past is forgotten where ``mask`` hides the token before."""
        starts = None
        if mask is not None:
            starts = starts_from_mask(mask.expand(x.shape[0], 1, x.shape[1], x.shape[1]))
        return self.cell(self.dropout(x), state, starts)


def _make_blocks(config: RecurrentConfig) -> list[nn.Module]:
    size = config.hidden_size
    layers = make_recurrent(config.cell, size, size, config.num_layers, memory_len=config.memory_len)
    return [RecurrentBlock(layer, config.dropout) for layer in layers]


class RecurrentLM(Decoder, OwnFormat):
    """A language model; `forward`, `hidden` and `new_state` are those of `Decoder`.

    A ``mask`` hides whole documents from each other (packing) or padding; other patterns mean nothing to it.

    >>> from modelwright.nn.init import init_weights
    >>> model = init_weights(RecurrentLM(RecurrentConfig(vocab_size=10, hidden_size=8)), seed=0)
    >>> model(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 10])
    """

    config_class = RecurrentConfig
    published_names = OwnFormat.published_names  # type: ignore[assignment]

    def __init__(self, config: RecurrentConfig):
        if config.num_labels is not None:
            raise ConfigError(f"num_labels is {config.num_labels}; a language model has none. Use RecurrentClassifier.")
        super().__init__(config, _make_blocks(config), nn.Dropout(config.dropout))
        self.tie_weights()

    def cache_layout(self) -> list[LayerCache]:
        """Return what each layer remembers: its state."""
        blocks = cast("Iterable[RecurrentBlock]", self.layers)
        return [LayerCache(fixed_size=self.config.hidden_size * len(block.cell.carries)) for block in blocks]


class ClassifierOutput(NamedTuple):
    """What a classifier returns."""

    logits: Tensor  # (B, number of labels)


class RecurrentClassifier(OwnFormat):
    """A classifier of texts: embed, read, pool, decide."""

    config_class: ClassVar[type[RecurrentConfig]] = RecurrentConfig

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        if config.num_labels is None:
            raise ConfigError("num_labels is None; a classifier needs the number of classes. Use RecurrentLM without.")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_make_blocks(config))
        self.classify = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, input_ids: Tensor, *, attention_mask: Tensor | None = None) -> ClassifierOutput:
        """Return the classes' logits of each row.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 1 for tokens and 0 for padding, on either side; every row needs a token.
        """
        is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_token = is_token.bool()
        if not is_token.any(1).all():
            raise RequestError("A row of attention_mask marks no token; a text to classify needs at least one.")
        starts = torch.zeros_like(is_token)
        starts[:, 1:] = is_token[:, 1:] & ~is_token[:, :-1]  # padding on the left leaves nothing behind
        x = self.embed(input_ids)  # (B, T, D)
        for block in cast("Iterable[RecurrentBlock]", self.layers):
            x = block.cell(block.dropout(x), None, starts)
        if self.config.pooling == "mean":
            weights = is_token.to(x.dtype)
            pooled = (x * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)  # (B, D)
        else:
            steps = torch.arange(1, x.shape[1] + 1, device=x.device)
            last = (is_token * steps).argmax(1)  # (B,)
            pooled = x[torch.arange(len(x), device=x.device), last]  # (B, D)
        return ClassifierOutput(self.classify(pooled))


ARCHITECTURES = {"RecurrentForCausalLM": RecurrentLM, "RecurrentForSequenceClassification": RecurrentClassifier}
