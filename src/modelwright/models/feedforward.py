"""The feed-forward neural language model: a fixed window of words, one hidden layer, a distribution over the next.

    y = b + W x + U tanh(d + H x)       x = [C(w_t-1); C(w_t-2); ...; C(w_t-n+1)]

C is the embedding that all positions share; W, the direct connections, may be left out. Before the beginning stands a
padding vector of its own.
Source: Bengio et al. 2003, "A neural probabilistic language model", section 2, with the symbols of its equation 1.
Not done: the asynchronous training of the paper, its mixture with an n-gram model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, RequestError
from modelwright.models.decoder import CausalOutput
from modelwright.models.own_format import OwnFormat, fields_from_hf, fields_to_hf
from modelwright.nn.decode_state import KVState


@dataclass(frozen=True)
class FeedForwardConfig:
    """How a feed-forward language model is built."""

    vocab_size: int
    order: int = 5  # n: the next word is predicted from the n - 1 before it
    embedding_size: int = 64  # m
    hidden_size: int = 128  # h
    has_direct: bool = False  # W: straight from the embeddings to the output
    max_seq_len: int = 4096
    eos_token_id: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("vocab_size", 1), ("order", 2), ("embedding_size", 1), ("hidden_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}.")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "FeedForwardConfig":
        """Read a ``config.json`` of ours."""
        return fields_from_hf(cls, values)

    def to_hf(self) -> dict[str, Any]:
        """Return the ``config.json``."""
        return fields_to_hf(self, "feedforward", "FeedForwardForCausalLM")


class FeedForwardLM(OwnFormat):
    """A language model that sees ``order - 1`` words."""

    config_class: ClassVar[type[FeedForwardConfig]] = FeedForwardConfig

    def __init__(self, config: FeedForwardConfig):
        super().__init__()
        self.config = config
        seen = (config.order - 1) * config.embedding_size
        self.embed = nn.Embedding(config.vocab_size + 1, config.embedding_size)  # C; the last row stands before all
        self.hidden_layer = nn.Linear(seen, config.hidden_size)  # H, d
        self.direct = nn.Linear(seen, config.vocab_size, bias=False) if config.has_direct else None  # W
        self.output = nn.Linear(config.hidden_size, config.vocab_size)  # U, b

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        state: Any = None,
        last_only: bool = False,
    ) -> CausalOutput:
        """Return the logits of the next token at every position, (B, T, V).

        Args:
            input_ids: (B, T).
            positions: Not used: a word's place is its distance.
            mask: Must be None; a window that crosses documents cannot be cut here.
            state: A `DecodeState` that keeps the last words, or None.
            last_only: Only of the last position, (B, 1, V).
        """
        if mask is not None:
            raise RequestError("The feed-forward model takes no attention mask. Give one document a row, unpadded.")
        memory = {} if state is None else state.memory(0)
        window = self.config.order - 1
        nothing = input_ids.new_full((input_ids.shape[0], window), self.config.vocab_size)
        ids = torch.cat([memory.get("ids", nothing), input_ids], 1)  # (B, n - 1 + T)
        if state is not None:
            memory["ids"] = ids[:, -window:]
            state.advance(input_ids.shape[1])
        ids = ids[:, -window:] if last_only else ids[:, 1:]
        x = self.embed(ids.unfold(1, window, 1).flip(-1)).flatten(-2)  # (B, T, (n - 1) m), the newest word first
        logits = self.output(torch.tanh(self.hidden_layer(x)))
        return CausalOutput(logits if self.direct is None else logits + self.direct(x))

    def new_state(self, batch_size: int, max_seq_len: int | None = None) -> KVState:
        """Return an empty decode state."""
        return KVState(batch_size=batch_size, max_seq_len=max_seq_len or self.config.max_seq_len)


ARCHITECTURES = {"FeedForwardForCausalLM": FeedForwardLM}
