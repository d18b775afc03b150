"""Sequence to sequence with attention: an encoder that reads both ways, a decoder that looks back at what was read.

    h_j = [forward; backward] state of the encoder at source token j: the annotations
    bahdanau        a_j = softmax_j v . tanh(W s_{i-1} + U h_j)
    luong_general   a_j = softmax_j s_i . W h_j
    luong_dot       a_j = softmax_j s_i . h_j       with P h_j for h_j throughout: h_j is twice as long as s_i
    c_i = sum_j a_j h_j: the context

Bahdanau's decoder looks, then steps, s_i = cell([y_{i-1}; c_i], s_{i-1}), and reads the word from [s_i; c_i; y_{i-1}].
Luong's steps, then looks, and reads the word from t_i = tanh(W [c_i; s_i]), which is fed into the next step. Without
attention the decoder has the encoder's last state alone (Sutskever et al. 2014): the control.
Training gives the decoder the right words so far (teacher forcing); `greedy` and `beam_search` give it its own.

Source: Bahdanau et al. 2015, arXiv:1409.0473; Luong et al. 2015, arXiv:1508.04025; Wu et al. 2016, arXiv:1609.08144,
equation 14 (length). Not done: several layers, local attention, coverage, scheduled sampling.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.base.errors import ConfigError, RequestError
from modelwright.base.registry import lookup
from modelwright.models.own_format import OwnFormat, fields_from_hf, fields_to_hf
from modelwright.nn import RECURRENT_CELLS
from modelwright.nn.attention import record_weights
from modelwright.nn.decode_state import KVState
from modelwright.nn.recurrent import make_recurrent

ATTENTIONS = ("bahdanau", "luong_dot", "luong_general")
IGNORED = -100  # a label that is not trained on


@dataclass(frozen=True)
class Seq2SeqConfig:
    """How a sequence-to-sequence model is built. One vocabulary serves both sides."""

    vocab_size: int
    embedding_size: int = 32
    hidden_size: int = 64  # of the decoder and of each direction of the encoder
    cell: str = "gru"  # rnn, lstm or gru
    attention: str | None = "bahdanau"  # bahdanau, luong_dot or luong_general; None: no attention
    max_seq_len: int = 512
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2

    def __post_init__(self) -> None:
        lookup(RECURRENT_CELLS, self.cell, "cell")
        if self.attention not in (None, *ATTENTIONS):
            raise ConfigError(f"attention is {self.attention!r}; known: {', '.join(ATTENTIONS)}, or None.")
        ids = (self.pad_token_id, self.bos_token_id, self.eos_token_id)
        if len(set(ids)) < 3 or min(ids) < 0 or max(ids) >= self.vocab_size:
            raise ConfigError(
                f"pad, bos and eos are {ids}; expected three different ids below the vocabulary size {self.vocab_size}."
            )

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "Seq2SeqConfig":
        """Read a ``config.json`` of ours."""
        return fields_from_hf(cls, values)

    def to_hf(self) -> dict[str, Any]:
        """Return the ``config.json``."""
        return fields_to_hf(self, "seq2seq", "Seq2Seq")


class Pairs(NamedTuple):
    """A batch of sources and targets, padded on the right."""

    input_ids: Tensor  # (B, S), each source and its end
    attention_mask: Tensor  # (B, S), 1 for tokens
    decoder_input_ids: Tensor  # (B, T), the beginning and the target
    labels: Tensor  # (B, T), the target and its end; IGNORED for padding


class Seq2SeqOutput(NamedTuple):
    """What the decoder returns."""

    logits: Tensor  # (B, T, V)
    attention: Tensor | None  # (B, T, S), which source tokens each step looked at


class Encoded(NamedTuple):
    """A source that was read."""

    annotations: Tensor  # (B, S, 2 H)
    projected: Tensor | None  # (B, S, H), what attention compares with, computed once
    is_token: Tensor  # (B, S)
    start: Tensor  # (B, H), the decoder's first state


class Hypothesis(NamedTuple):
    """A target that the model proposes."""

    tokens: list[int]  # without beginning and end
    log_prob: float  # natural, the end included
    score: float  # log_prob divided by the length penalty


class Seq2Seq(OwnFormat):
    """An encoder and a decoder; `forward` is for training, `greedy` and `beam_search` for use."""

    config_class: ClassVar[type[Seq2SeqConfig]] = Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.config = config
        E, H = config.embedding_size, config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, E)
        self.forward_reader, self.backward_reader = make_recurrent(config.cell, E, H, 1) + make_recurrent(
            config.cell, E, H, 1
        )
        self.bridge = nn.Linear(2 * H, H)
        has_attention = config.attention is not None
        self.key = nn.Linear(2 * H, H, bias=False) if has_attention else None  # U, P or W
        is_bahdanau = config.attention == "bahdanau"
        self.query = nn.Linear(H, H) if is_bahdanau else None  # W of bahdanau
        self.energy = nn.Linear(H, 1, bias=False) if is_bahdanau else None  # v
        context_size = (H if config.attention == "luong_dot" else 2 * H) if has_attention else 0
        fed_size = 0 if not has_attention else context_size if is_bahdanau else H
        self.cell = make_recurrent(config.cell, E + fed_size, H, 1)[0]
        self.combine = nn.Linear(H + context_size + (0 if has_attention and not is_bahdanau else E), H)
        self.output = nn.Linear(H, config.vocab_size)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Encoded:
        """Read sources (B, S), padded on the right; ``attention_mask`` marks tokens with 1."""
        is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_token = is_token.bool()
        if not is_token[:, 0].all() or (is_token[:, 1:] & ~is_token[:, :-1]).any():
            raise RequestError(
                "attention_mask has padding before a token; this encoder wants padding on the right alone."
            )
        x = self.embed(input_ids)  # (B, S, E)
        ahead = self.forward_reader(x)
        # Backward, padding comes first: a start is set behind it, so that it leaves nothing.
        flipped = is_token.flip(1)
        starts = F.pad(flipped[:, 1:] & ~flipped[:, :-1], (1, 0))  # (B, S)
        back = self.backward_reader(x.flip(1), None, starts).flip(1)
        annotations = torch.cat([ahead, back], -1)  # (B, S, 2 H)
        last = is_token.sum(1) - 1
        ends = torch.cat([ahead[torch.arange(len(x), device=x.device), last], back[:, 0]], -1)  # (B, 2 H)
        projected = None if self.key is None else self.key(annotations)  # (B, S, H)
        return Encoded(annotations, projected, is_token, torch.tanh(self.bridge(ends)))

    def _look(self, s: Tensor, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Return the context and the weights (B, S) for a decoder state (B, H)."""
        assert encoded.projected is not None
        if self.query is not None and self.energy is not None:
            scores = self.energy(torch.tanh(self.query(s)[:, None] + encoded.projected))[..., 0]  # (B, S)
        else:
            scores = (encoded.projected @ s[..., None])[..., 0]  # (B, S)
        weights = scores.masked_fill(~encoded.is_token, -torch.inf).softmax(-1)
        values = encoded.projected if self.config.attention == "luong_dot" else encoded.annotations
        return (weights[:, None] @ values)[:, 0], weights

    def _step(self, y: Tensor, memory: dict[str, Tensor], encoded: Encoded) -> tuple[Tensor, Tensor | None]:
        """One word in, (B, E); what the word after it is read from, (B, H), and the weights out."""
        carried = {name: memory[name] for name in self.cell.carries}
        fed, weights = y, None
        if self.config.attention == "bahdanau":
            context, weights = self._look(carried["h"], encoded)
            fed = torch.cat([y, context], -1)
        elif self.config.attention is not None:
            fed = torch.cat([y, memory["fed"]], -1)
        carried = self.cell.step(F.linear(fed, self.cell.input_weight, self.cell.input_bias), carried)
        memory.update(carried)
        s = carried["h"]
        if self.config.attention == "bahdanau":
            return torch.tanh(self.combine(torch.cat([s, context, y], -1))), weights
        if self.config.attention is None:
            return torch.tanh(self.combine(torch.cat([s, y], -1))), None
        context, weights = self._look(s, encoded)
        memory["fed"] = torch.tanh(self.combine(torch.cat([context, s], -1)))
        return memory["fed"], weights

    def decode(self, decoder_input_ids: Tensor, encoded: Encoded, state: Any = None) -> Seq2SeqOutput:
        """Return the logits of each next word; with a ``state`` the words before are those it has seen."""
        memory: dict[str, Tensor] = {} if state is None else state.memory(0)
        if not memory:
            zeros = torch.zeros_like(encoded.start)
            memory.update({name: encoded.start if name == "h" else zeros for name in (*self.cell.carries, "fed")})
        y = self.embed(decoder_input_ids)  # (B, T, E)
        read, seen = [], []
        for t in range(y.shape[1]):
            out, weights = self._step(y[:, t], memory, encoded)
            read.append(out)
            seen.append(weights)
        if state is not None:
            state.advance(y.shape[1])
        attention = None if self.config.attention is None else torch.stack(seen, 1)  # type: ignore[arg-type]
        if attention is not None:
            record_weights(attention[:, None])
        return Seq2SeqOutput(self.output(torch.stack(read, 1)), attention)

    def forward(
        self, input_ids: Tensor, decoder_input_ids: Tensor, *, attention_mask: Tensor | None = None
    ) -> Seq2SeqOutput:
        """Return the logits of the target's words given the right ones before: teacher forcing."""
        return self.decode(decoder_input_ids, self.encode(input_ids, attention_mask))

    def loss(self, pairs: Pairs) -> Tensor:
        """Return the mean cross-entropy of the targets' words."""
        logits = self(pairs.input_ids, pairs.decoder_input_ids, attention_mask=pairs.attention_mask).logits
        return F.cross_entropy(logits.flatten(0, 1), pairs.labels.flatten(), ignore_index=IGNORED)

    def new_state(self, batch_size: int, max_seq_len: int | None = None) -> KVState:
        """Return an empty decode state for the decoder."""
        return KVState(batch_size=batch_size, max_seq_len=max_seq_len or self.config.max_seq_len)

    def make_pairs(self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Pairs:
        """Add beginnings and ends, pad, and stack; sources and targets are without them."""
        c = self.config
        read = [[*source, c.eos_token_id] for source in sources]
        given = [[c.bos_token_id, *target] for target in targets]
        wanted = [[*target, c.eos_token_id] for target in targets]
        input_ids = _pad(read, c.pad_token_id)
        mask = _pad([[1] * len(row) for row in read], 0)
        return Pairs(input_ids, mask, _pad(given, c.pad_token_id), _pad(wanted, IGNORED))

    @torch.no_grad()
    def greedy(self, sources: Sequence[Sequence[int]], max_tokens: int = 64) -> list[list[int]]:
        """Return for each source the target made of the likeliest word at every step."""
        device = self.embed.weight.device
        pairs = self.make_pairs(sources, [[] for _ in sources])
        encoded = self.encode(pairs.input_ids.to(device), pairs.attention_mask.to(device))
        state = self.new_state(len(sources), max_tokens + 1)
        token = pairs.decoder_input_ids.to(device)  # (B, 1)
        chosen = []
        is_done = torch.zeros(len(sources), dtype=torch.bool, device=device)
        for _ in range(max_tokens):
            token = self.decode(token, encoded, state).logits[:, -1].argmax(-1, keepdim=True)
            chosen.append(token[:, 0])
            is_done |= token[:, 0] == self.config.eos_token_id
            if is_done.all():
                break
        rows = torch.stack(chosen, 1).tolist() if chosen else [[] for _ in sources]
        end = self.config.eos_token_id
        return [row[: row.index(end)] if end in row else row for row in rows]

    @torch.no_grad()
    def beam_search(
        self, source: Sequence[int], *, num_beams: int = 4, max_tokens: int = 64, length_alpha: float = 0.6
    ) -> list[Hypothesis]:
        """Return up to ``num_beams`` targets, the best first.

        Args:
            source: One source, without its end.
            num_beams: Prefixes kept at every step; 1 is greedy search.
            max_tokens: A target not ended by then is cut, and counts as it stands.
            length_alpha: Scores are log_prob / ((5 + length) / 6) ** length_alpha, the end counted. 0: no
                normalisation, which favours short targets.
        """
        if num_beams < 1 or max_tokens < 1 or length_alpha < 0:
            raise RequestError(
                f"num_beams is {num_beams}, max_tokens {max_tokens}, length_alpha {length_alpha}; "
                "expected at least 1, 1 and 0."
            )
        device = self.embed.weight.device
        one = self.encode(self.make_pairs([source], [[]]).input_ids.to(device))
        state = self.new_state(1, max_tokens + 1)
        memory = state.memory(0)
        prefixes: list[list[int]] = [[self.config.bos_token_id]]
        log_probs = torch.zeros(1, device=device)
        ended: list[Hypothesis] = []
        for length in range(1, max_tokens + 1):
            last = torch.tensor([[prefix[-1]] for prefix in prefixes], device=device)
            step = self.decode(last, _repeat(one, len(prefixes)), state).logits[:, -1].log_softmax(-1)  # (beams, V)
            totals = (log_probs[:, None] + step).flatten()
            # Twice as many as are kept: at most one continuation of each prefix is its end.
            best = totals.topk(min(2 * num_beams, len(totals)))
            kept: list[tuple[int, int, float]] = []
            for rank, (total, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
                beam, token = divmod(place, step.shape[1])
                if token == self.config.eos_token_id:
                    if rank < num_beams:
                        ended.append(Hypothesis(prefixes[beam][1:], total, total / _penalty(length, length_alpha)))
                elif len(kept) < num_beams:
                    kept.append((beam, token, total))
            prefixes = [[*prefixes[beam], token] for beam, token, _ in kept]
            log_probs = torch.tensor([total for _, _, total in kept], device=device)
            rows = torch.tensor([beam for beam, _, _ in kept], device=device)
            memory.update({name: value[rows] for name, value in memory.items()})
            ended = sorted(ended, key=lambda h: -h.score)[:num_beams]
            # A longer target has a lower log_prob, but no penalty beyond the longest one's.
            most = float(log_probs.max()) / _penalty(max_tokens, length_alpha)
            if len(ended) == num_beams and ended[-1].score >= most:
                break
        else:
            ended += [
                Hypothesis(prefix[1:], total, total / _penalty(max_tokens, length_alpha))
                for prefix, total in zip(prefixes, log_probs.tolist(), strict=True)
            ]
        return sorted(ended, key=lambda h: -h.score)[:num_beams]


def _repeat(one: Encoded, num: int) -> Encoded:
    """Return a single source as ``num`` rows, without a copy."""
    rows = [None if part is None else part.expand(num, *part.shape[1:]) for part in one]
    return Encoded(rows[0], rows[1], rows[2], rows[3])  # type: ignore[arg-type]


def _penalty(length: int, alpha: float) -> float:
    return ((5 + length) / 6) ** alpha


def _pad(rows: list[list[int]], value: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


ARCHITECTURES = {"Seq2Seq": Seq2Seq}
