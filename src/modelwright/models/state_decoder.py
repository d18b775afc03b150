"""Decoders whose layers carry a state from token to token: Mamba, Mamba-2, RWKV and hybrids with attention.

Attention is told by a mask what it may see; a recurrence has to be told where to forget and what to pass over. So a
position of 0 starts a document here (packed rows restart their positions), and padding is inert wherever it stands.
A row may be read in pieces with a decode state; padding may stand in any of them.

Not here: dropout. B, T, D as everywhere.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from modelwright.base.errors import RequestError
from modelwright.models.decoder import CausalOutput, Decoder
from modelwright.nn.attention import padding_mask
from modelwright.nn.decode_state import KVState
from modelwright.nn.past import Segments

NO_LIMIT = 1 << 31  # a recurrent state is of one size, whatever the length


class StateDecoder(Decoder):
    """A `Decoder` with recurrent layers; its blocks get a `Segments`, or what `places` makes of it."""

    reads_virtual_tokens: ClassVar[bool] = False
    has_attention: ClassVar[bool] = False  # whether some layers are attention, which needs masks and has a reach

    def places(self, x: Tensor, positions: Tensor | None, segments: Segments) -> Any:
        """Return what each block is told of the positions."""
        return segments

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        state: Any = None,
        is_token: Tensor | None = None,
    ) -> Tensor:
        """Return the stream after the last norm, (B, T, D).

        Args:
            input_ids: (B, T) token ids.
            positions: (B, T); None means 0 .. T-1, or those that follow with a state. Without a state, 0 starts a
                document, and nothing of what stands before it is remembered.
            mask: Boolean, True where attention is allowed, broadcast to (B, 1, T, T). Recurrent layers go by the
                positions instead, so it needs these.
            state: A `DecodeState` that holds the past, or None.
            is_token: (B, T) False at padding; None: there is none.

        Raises:
            RequestError: The arguments ask for something that a recurrence, or its state, cannot do.
        """
        self._check(input_ids.shape[1], positions, mask, state, is_token)
        starts = positions == 0 if positions is not None and state is None else None
        if state is not None and positions is None:
            positions = state.positions(input_ids.shape[1], device=input_ids.device)
        x = self.embed_tokens(input_ids, positions)  # (B, T, D)
        places = self.places(x, positions, Segments(starts, is_token))
        if is_token is not None and self.has_attention:
            padding = padding_mask(is_token)  # (B, 1, T, T)
            mask = padding if mask is None else mask & padding
        for layer in self.layers:
            x = layer(x, places, mask, state)
        if state is not None:
            state.advance(input_ids.shape[1])
        return self.norm(x.to(self.embed.weight.dtype))  # the stream may be float32 where the weights are not

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
        is_token = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        h = self.hidden(input_ids, positions, mask, state, is_token)
        if hidden_only:
            return CausalOutput(h[..., :0], h)
        return CausalOutput(self.lm_head(h[:, -1:] if last_only else h))

    def new_state(self, batch_size: int, max_seq_len: int | None = None, dtype: torch.dtype | None = None) -> KVState:
        """Return an empty `KVState`; without attention its length has no limit unless one is given."""
        longest = self.config.max_seq_len if self.has_attention else NO_LIMIT
        return KVState(batch_size=batch_size, max_seq_len=max_seq_len or longest, dtype=dtype)

    def _check(
        self, length: int, positions: Tensor | None, mask: Tensor | None, state: Any, is_token: Tensor | None
    ) -> None:
        if self.has_attention and length > self.config.max_seq_len:
            raise RequestError(
                f"The input has {length} tokens; this model reads at most {self.config.max_seq_len}. Shorten it.",
                code="context_length_exceeded",
            )
        if mask is not None and state is not None:
            raise RequestError("With a decode state, give no mask: the state knows what may be seen.")
        if mask is not None and positions is None:
            raise RequestError(
                "A mask was given without positions; a recurrent layer cannot follow a mask. Give positions that "
                "restart at 0 with each document, or an attention_mask for padding."
            )
        if self.has_attention and state is not None and is_token is not None:
            raise RequestError(
                "Padding was given together with a decode state; attention would see it later. Decode rows of equal "
                "length together, or each by itself."
            )
