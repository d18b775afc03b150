"""What every decoder language model has in common: embed, a stack of blocks, a last norm, an output matrix.

A family's file gives its config, its block and what it adds to the positions; the loop over the layers, tying, the
decode state and padding are here once. The model never computes a loss and never builds a tokenizer; logits come in
the dtype of the weights. Dropout is not here.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from modelwright.base.errors import RequestError
from modelwright.nn.attention import padding_mask
from modelwright.nn.decode_state import KVState
from modelwright.nn.virtual_tokens import SoftPrompt, begin_state


class CausalOutput(NamedTuple):
    """What a language model returns."""

    logits: Tensor  # (B, T, V), or (B, 1, V) for last_only, in the dtype of the weights; empty for hidden_only
    hidden: Tensor | None = None  # (B, T, D) the input of the output matrix, for hidden_only


class LayerCache(NamedTuple):
    """What one layer remembers of a sequence, in numbers (not bytes)."""

    num_kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int | None = None  # positions kept; None: all
    fixed_size: int = 0  # numbers kept whatever the length: recurrent and convolution state

    def size(self, context_len: int) -> int:
        """Return the numbers kept of a sequence of ``context_len`` tokens."""
        kept = context_len if self.window is None else min(context_len, self.window)
        return self.fixed_size + kept * self.num_kv_heads * (self.key_dim + self.value_dim)


class SoftcapLinear(nn.Linear):
    """A linear layer whose outputs are capped: ``cap * tanh(y / cap)`` (Gemma 2's logits)."""

    def __init__(self, in_features: int, out_features: int, cap: float):
        super().__init__(in_features, out_features, bias=False)
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., V)."""
        return self.cap * torch.tanh(super().forward(x) / self.cap)


class Decoder(nn.Module):
    """A stack of blocks between an embedding and an output matrix; families subclass it.

    A subclass calls ``super().__init__(config, blocks, norm)`` and gives `positional`. Its config has vocab_size,
    hidden_size, max_seq_len, tie_embeddings, bos_token_id, eos_token_id and pad_token_id. A block is called as
    ``block(x, places, mask, state)`` with what `positional` returned.
    """

    config_class: ClassVar[type[Any]]
    published_names: ClassVar[dict[str, str]]
    reads_virtual_tokens: ClassVar[bool] = True

    def __init__(self, config: Any, blocks: list[nn.Module], norm: nn.Module, lm_head: nn.Linear | None = None):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.norm = norm
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if lm_head is None else lm_head
        self.virtual: nn.Module | None = None  # trained tokens before the text (`modelwright.nn.virtual_tokens`)

    def positional(self, x: Tensor, positions: Tensor | None, state: Any) -> Any:
        """Return what each block needs to know of the positions, for instance cos and sin of a rotation.

        Args:
            x: (B, T, D) the embedded input.
            positions: (B, T), or None for 0 .. T-1.
            state: The `DecodeState`, or None.
        """
        return None

    def embed_tokens(self, input_ids: Tensor, positions: Tensor | None) -> Tensor:
        """Return the stream before the first block, (B, T, D)."""
        return self.embed(input_ids)

    def tie_weights(self) -> None:
        """Make the output matrix the embedding itself, where the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def tied_names(self) -> dict[str, str]:
        """Return which parameter is another one under a second name: {second: first}."""
        return {"lm_head.weight": "embed.weight"} if self.config.tie_embeddings else {}

    def _apply(self, fn: Any, recurse: bool = True) -> "Decoder":
        super()._apply(fn, recurse)
        self.tie_weights()  # moving off the meta device makes a new parameter per module
        return self

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        state: Any = None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """Return the stream after the last norm, (B, T, D).

        Args:
            input_ids: (B, T) token ids.
            positions: (B, T); None means 0 .. T-1. Needed with a state.
            mask: Boolean, True where attention is allowed, broadcast to (B, 1, T, T); it narrows the causal mask.
            state: A `DecodeState` that holds the past and does the masking, or None.
            embedded: (B, T, D) what goes into the first block, from `embed_tokens` with a part replaced (images);
                None: `embed_tokens` of the ids.
        """
        length = input_ids.shape[1]
        if length > self.config.max_seq_len:
            raise RequestError(
                f"The input has {length} tokens; this model reads at most {self.config.max_seq_len}. Shorten it.",
                code="context_length_exceeded",
            )
        if state is not None and (positions is None or mask is not None):
            raise RequestError("With a decode state, give positions and no mask: the state knows what may be seen.")
        num_virtual = 0
        if self.virtual is not None and state is None:  # a decode state has seen them (`begin_state`)
            positions = self.virtual.shifted(input_ids, positions, self.config.max_seq_len)  # type: ignore[operator]
        x = self.embed_tokens(input_ids, positions) if embedded is None else embedded  # (B, T, D)
        if isinstance(self.virtual, SoftPrompt) and state is None:
            assert positions is not None
            num_virtual = self.virtual.num_tokens
            x, positions, mask = self.virtual.prepend(x, positions, mask)  # (B, N + T, D)
        places = self.positional(x, positions, state)
        for layer in self.layers:
            x = layer(x, places, mask, state)
        if state is not None:
            state.advance(length)
        return self.norm(x[:, num_virtual:])

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        state: Any = None,
        last_only: bool = False,
        hidden_only: bool = False,
    ) -> CausalOutput:
        """Return the logits of the next token at every position, or at the last one for ``last_only``.

        ``attention_mask`` (B, T) marks tokens with 1 and padding with 0. ``hidden_only`` leaves the output matrix to a
        loss that applies it piece by piece. The other arguments are those of `hidden`.
        """
        if attention_mask is not None:
            padding = padding_mask(attention_mask)  # (B, 1, T, T)
            mask = padding if mask is None else mask & padding
        h = self.hidden(input_ids, positions, mask, state)
        if hidden_only:
            return CausalOutput(h[..., :0], h)
        return CausalOutput(self.lm_head(h[:, -1:] if last_only else h))

    def num_parameters(self) -> int:
        """Count parameters, a tied one once."""
        return sum(p.numel() for p in self.parameters())

    def new_state(self, batch_size: int, max_seq_len: int | None = None, dtype: torch.dtype | None = None) -> KVState:
        """Return an empty dense `KVState`; the model is called with it step by step."""
        longest = (max_seq_len or self.config.max_seq_len) + getattr(self.virtual, "num_tokens", 0)
        state = KVState(batch_size=batch_size, max_seq_len=longest, dtype=dtype)
        begin_state(self, state)
        return state

    def cache_layout(self) -> list[LayerCache]:
        """Return what each layer remembers of a sequence."""
        c = self.config
        return [LayerCache(c.num_kv_heads, c.head_dim, c.head_dim) for _ in self.layers]
