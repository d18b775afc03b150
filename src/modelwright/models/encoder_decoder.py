"""What encoder-decoders (T5, Whisper) share: the encoded input, the outputs, and writing by greedy or beam search.

An encoder-decoder reads its input once (``model.encode(...)``) and then writes token by token
(``model.decode(ids, encoded, state=...)``): the state keeps the decoder's keys, and the encoder's, so that neither
is computed twice.

Source: Sutskever et al. 2014, arXiv 1409.3215, section 3.2 (beam search); Wu et al. 2016, arXiv 1609.08144, section 7
(length normalisation; here the sum of log-probabilities is divided by ``length ** length_penalty``).
Not here: sampling, grammars, batching of requests, which are the engine's.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from modelwright.base.errors import RequestError


class Encoded(NamedTuple):
    """What the encoder made of its input, for the decoder to look at."""

    hidden: Tensor  # (B, S, D)
    mask: Tensor | None = None  # (B, 1, 1, S) True at tokens; None: all are tokens

    def repeat(self, count: int) -> "Encoded":
        """Return each row ``count`` times, one after the other: (B * count, S, D)."""
        mask = None if self.mask is None else self.mask.repeat_interleave(count, dim=0)
        return Encoded(self.hidden.repeat_interleave(count, dim=0), mask)

    def row(self, index: int) -> "Encoded":
        """Return one row, (1, S, D)."""
        return Encoded(self.hidden[index : index + 1], None if self.mask is None else self.mask[index : index + 1])


class EncoderDecoderOutput(NamedTuple):
    """What an encoder-decoder returns."""

    logits: Tensor  # (B, T, V)
    encoder_last_hidden_state: Tensor  # (B, S, D)


class EncoderDecoder(Protocol):
    """A model that writes: T5, Whisper."""

    def decode(self, decoder_input_ids: Tensor, encoded: Encoded, *, state: Any = None) -> Tensor:
        """Return the logits (B, T, V) of the tokens after ``decoder_input_ids`` (B, T)."""
        ...

    def new_state(self, batch_size: int, max_seq_len: int | None = None) -> Any:
        """Return an empty state."""
        ...


class EncoderDecoderBlock(nn.Module):
    """A decoder's block: look back, look at the input, think; each behind a norm and added to the stream."""

    def __init__(self, attention: nn.Module, cross: nn.Module, mlp: nn.Module, norms: tuple[nn.Module, ...]):
        super().__init__()
        self.attention, self.cross, self.mlp = attention, cross, mlp
        self.attention_norm, self.cross_norm, self.mlp_norm = norms

    def forward(self, x: Tensor, encoded: Encoded, mask: Tensor | None, bias: Tensor | None, state: Any) -> Tensor:
        """Map the stream (B, T, D) to (B, T, D); ``mask`` and ``bias`` are those of the self-attention."""
        x = x + self.attention(self.attention_norm(x), mask=mask, bias=bias, state=state)
        x = x + self.cross(self.cross_norm(x), context=encoded.hidden, mask=encoded.mask, state=state)
        return x + self.mlp(self.mlp_norm(x))


@torch.no_grad()
def write_greedily(
    model: EncoderDecoder, encoded: Encoded, prefix: Tensor, *, max_new_tokens: int, eos_token_id: int
) -> list[list[int]]:
    """Return the most likely next tokens of each row, one at a time, up to and without the end token.

    Args:
        model: The model.
        encoded: From ``model.encode``, B rows.
        prefix: (B, T) what the decoder starts with.
        max_new_tokens: Where to stop at the latest.
        eos_token_id: Ends a row.
    """
    _check(prefix, encoded, max_new_tokens)
    state = model.new_state(len(prefix), prefix.shape[1] + max_new_tokens)
    rows: list[list[int]] = [[] for _ in range(len(prefix))]
    is_done = [False] * len(prefix)
    ids = prefix
    for _ in range(max_new_tokens):
        ids = model.decode(ids, encoded, state=state)[:, -1].argmax(-1, keepdim=True)  # (B, 1)
        for row, token in enumerate(ids[:, 0].tolist()):
            is_done[row] |= token == eos_token_id
            if not is_done[row]:
                rows[row].append(token)
        if all(is_done):
            break
    return rows


class Written(NamedTuple):
    """One finished hypothesis of a beam search."""

    score: float  # sum of log-probabilities / length ** length_penalty; the end token counts in both
    tokens: tuple[int, ...]  # without the prefix and the end token


@torch.no_grad()
def write_by_beam(
    model: EncoderDecoder,
    encoded: Encoded,
    prefix: Tensor,
    *,
    max_new_tokens: int,
    eos_token_id: int,
    num_beams: int = 4,
    length_penalty: float = 1.0,
) -> list[list[Written]]:
    """Return for each row the ``num_beams`` best hypotheses found, best first.

    A finished hypothesis leaves the beam, and the beam is filled up by the next best, so that ends do not narrow the
    search. It stops when no unfinished hypothesis can still beat the worst kept one; what "can" means depends on the
    sign of the penalty. A hypothesis at ``max_new_tokens`` counts as finished. Arguments are those of
    `write_greedily`; ``length_penalty`` above 0 favours longer texts, below 0 shorter ones.
    """
    _check(prefix, encoded, max_new_tokens)
    found = []
    for row in range(len(prefix)):
        one = encoded.row(row).repeat(num_beams)
        state = model.new_state(num_beams, prefix.shape[1] + max_new_tokens)
        beam = _Beam(num_beams, max_new_tokens, eos_token_id, length_penalty)
        ids = prefix[row : row + 1].expand(num_beams, -1)
        while True:
            log_probs = model.decode(ids, one, state=state)[:, -1].float().log_softmax(-1)  # (num_beams, V)
            origins = beam.extend(log_probs)
            if beam.is_over:
                break
            state.select_rows(torch.tensor(origins, device=prefix.device))
            ids = torch.tensor([[tokens[-1]] for tokens in beam.tokens], device=prefix.device)
        found.append(sorted(beam.finished, reverse=True)[:num_beams])
    return found


class _Beam:
    """The hypotheses of one row."""

    def __init__(self, size: int, max_len: int, eos_token_id: int, length_penalty: float):
        self.size, self.max_len, self.eos_token_id, self.length_penalty = size, max_len, eos_token_id, length_penalty
        self.tokens: list[tuple[int, ...]] = [()] * size
        # At the start all rows are the same prefix; only the first may be extended.
        self.sums = [0.0] + [float("-inf")] * (size - 1)
        self.finished: list[Written] = []

    def extend(self, log_probs: Tensor) -> list[int]:
        """Choose among all one-token extensions; return for each row of the new beam the row it comes from."""
        totals = log_probs + torch.tensor(self.sums, device=log_probs.device)[:, None]  # (beams, V)
        count = min(2 * self.size, totals.numel())  # at most one end token a row: enough for a full beam
        best, where = totals.flatten().topk(count)
        rows: list[tuple[float, int, tuple[int, ...]]] = []
        for total, index in zip(best.tolist(), where.tolist(), strict=True):
            origin, token = divmod(index, totals.shape[1])
            if total == float("-inf"):
                continue
            tokens = (*self.tokens[origin], token)
            if token == self.eos_token_id:
                self.finished.append(Written(self.score(total, len(tokens)), tokens[:-1]))
            elif len(tokens) == self.max_len:
                self.finished.append(Written(self.score(total, len(tokens)), tokens))
            elif len(rows) < self.size:
                rows.append((total, origin, tokens))
        rows += [(float("-inf"), 0, rows[0][2])] * (self.size - len(rows)) if rows else []
        self.sums, self.tokens = [total for total, _, _ in rows], [tokens for _, _, tokens in rows]
        return [origin for _, origin, _ in rows]

    def score(self, total: float, length: int) -> float:
        return total / length**self.length_penalty

    @property
    def is_over(self) -> bool:
        """Whether nothing unfinished can still come in among the best."""
        if not self.tokens:
            return True
        if len(self.finished) < self.size:
            return False
        worst = sorted(self.finished, reverse=True)[self.size - 1].score
        reach = self.max_len if self.length_penalty > 0 else len(self.tokens[0]) + 1
        return self.score(max(self.sums), reach) <= worst


def _check(prefix: Tensor, encoded: Encoded, max_new_tokens: int) -> None:
    if prefix.dim() != 2 or prefix.shape[0] != encoded.hidden.shape[0] or min(*prefix.shape, max_new_tokens) < 1:
        raise RequestError(
            f"The decoder was to start with ids of shape {tuple(prefix.shape)} and write {max_new_tokens} tokens for "
            f"{encoded.hidden.shape[0]} inputs; expected (B, T) with a row for each input, and at least one of each."
        )
