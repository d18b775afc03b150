"""Drawing the next token from logits.

The noise is counter-based: a hash of (seed, position, token id) gives each candidate its Gumbel noise, and the token
with the largest sum of scaled logit and noise is drawn, which is a draw from the softmax (the Gumbel-max identity).
There is no generator state, so a draw depends on nothing but its own request: not on neighbours in the batch, not on
preemption, not on how many draws came before. Order: fp32 logits, banned ids, temperature, top-k, top-p, draw.
Ties are broken towards the lower token id, so that temperature 0 and top_k 1 agree.

Log-probabilities are the model's own: of the untouched logits, before temperature and truncation.
Source: Maddison et al. 2014, "A* Sampling", section 2; Steele et al. 2014 (SplitMix64) for the hash.
Not here: penalties, min-p, logit bias, grammars.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_FIRST_CANDIDATES = 256  # top-p looks at this many before it sorts the whole vocabulary


@dataclass(frozen=True)
class Draw:
    """How one row of logits becomes a token."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    position: int  # of the token to be drawn, counted from the start of the sequence
    banned_ids: tuple[int, ...] = ()


def sample(logits: Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[float]]:
    """Draw one token for each row.

    Args:
        logits: (R, V), any float dtype.
        draws: One for each row.

    Returns:
        The R token ids and the natural log-probability of each under the unprocessed logits.
    """
    logits = logits.float()
    # log_softmax works row by row; logsumexp over a single row may be split between threads, which changes bits.
    logprobs = torch.log_softmax(logits, dim=-1)
    if any(draw.banned_ids for draw in draws):
        logits = logits.clone()
    for row, draw in enumerate(draws):
        if draw.banned_ids:
            logits[row, list(draw.banned_ids)] = -math.inf
    chosen = logits.argmax(dim=-1)  # the first of equals on CPUs
    for row, draw in enumerate(draws):
        if draw.temperature > 0:
            chosen[row] = _draw_row(logits[row], draw)
    picked = logprobs.gather(1, chosen[:, None])[:, 0]
    return chosen.tolist(), picked.tolist()


def _draw_row(logits: Tensor, draw: Draw) -> Tensor:
    """Return the drawn id for one row of fp32 logits (V,)."""
    candidates, scaled = truncate(logits / draw.temperature, draw.top_k, draw.top_p)
    noise = gumbel_noise(draw.seed, draw.position, candidates)
    return candidates[(scaled.double() + noise).argmax()]


def truncate(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Keep the `top_k` likeliest tokens, then the fewest of those that hold `top_p` of their mass.

    At least one token is kept. Equal logits rank by token id.

    Args:
        logits: (V,) fp32, already divided by the temperature.
        top_k: 0 for all.
        top_p: In (0, 1].

    Returns:
        The kept token ids and their logits.
    """
    vocab_size = logits.shape[0]
    top_k = top_k if 0 < top_k < vocab_size else vocab_size
    if top_k == vocab_size and top_p >= 1.0:
        return torch.arange(vocab_size, device=logits.device), logits
    log_total = None if top_k < vocab_size else logits.double().logsumexp(0)
    size = min(top_k if top_k < vocab_size else _FIRST_CANDIDATES, vocab_size)
    while True:
        ids, values = _largest(logits, size)
        if top_p >= 1.0:
            return ids, values
        total = values.double().logsumexp(0) if log_total is None else log_total
        mass = (values.double() - total).exp().cumsum(0)
        if size == vocab_size or log_total is None or mass[-1] >= top_p:
            num_kept = 1 + int((mass[:-1] < top_p).sum())
            return ids[:num_kept], values[:num_kept]
        size = vocab_size


def _largest(logits: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the `size` largest logits in order with their ids; equal ones by id, which plain topk leaves open."""
    if size < logits.shape[0]:
        limit = logits.topk(size).values[-1]
        ids = (logits >= limit).nonzero()[:, 0]  # ascending; more than `size` when the last ones are equal
    else:
        ids = torch.arange(logits.shape[0], device=logits.device)
    values, order = logits[ids].sort(descending=True, stable=True)
    return ids[order][:size], values[:size]


def gumbel_noise(seed: int, position: int, token_ids: Tensor) -> Tensor:
    """Return the Gumbel(0, 1) noise of each token id at one position of one seeded request, as float64.

    Args:
        seed: Any integer; taken modulo 2**64.
        position: Of the token to be drawn.
        token_ids: (C,) int64.
    """
    key = _mix(_mix(seed & _MASK) + _GOLDEN * (position + 1))
    x = _wrap(key) + (token_ids + 1) * _wrap(_GOLDEN)  # int64 products wrap around, as the hash wants
    x = (x ^ _shift(x, 30)) * _wrap(_MIX1)
    x = (x ^ _shift(x, 27)) * _wrap(_MIX2)
    x = x ^ _shift(x, 31)
    uniform = (_shift(x, 11).double() + 0.5) * 2.0**-53  # strictly between 0 and 1
    return -torch.log(-torch.log(uniform))


def _mix(x: int) -> int:
    """SplitMix64's finaliser."""
    x &= _MASK
    x = (x ^ (x >> 30)) * _MIX1 & _MASK
    x = (x ^ (x >> 27)) * _MIX2 & _MASK
    return x ^ (x >> 31)


def _wrap(x: int) -> int:
    """Return the signed 64-bit integer with the same bits."""
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right without the sign: torch's shift of int64 is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
