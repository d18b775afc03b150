"""Drawing the next token from logits.

The noise is counter-based: a hash of (seed, position, token id) gives each candidate its Gumbel noise, and the token
with the largest sum of scaled logit and noise is drawn, which is a draw from the softmax (the Gumbel-max identity).
There is no generator state, so a draw depends on nothing but its own request: not on neighbours in the batch, not on
preemption, not on how many draws came before. Order: fp32 logits, bans and penalties (`modelwright.engine.adjust`),
temperature, min-p, typical, top-k, top-p, draw. Ties are broken towards the lower token id, so that temperature 0 and
top_k 1 agree.

Log-probabilities are the model's own: of the untouched logits, before temperature and truncation.
Source: Maddison et al. 2014, "A* Sampling", section 2; Steele et al. 2014 (SplitMix64) for the hash; Nguyen et al.
2024, arXiv 2407.01082 (min-p); Meister et al. 2023, arXiv 2202.00666 (typical); Holtzman et al. 2020 (top-p).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from modelwright.base.types import SamplingParams
from modelwright.engine.adjust import adjust

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_FIRST_CANDIDATES = 256  # top-p looks at this many before it sorts the whole vocabulary


@dataclass(frozen=True)
class Draw:
    """How one row of logits becomes a token."""

    params: SamplingParams
    seed: int
    position: int  # of the token to be drawn, counted from the start of the sequence
    banned_ids: tuple[int, ...] = ()
    prompt_ids: Sequence[int] = ()  # for the penalties
    output_ids: Sequence[int] = ()
    bad_words: Sequence[tuple[int, ...]] = ()
    allowed: Tensor | None = None  # (V,) boolean, what a grammar allows next; None: everything


@dataclass(frozen=True)
class Drawn:
    """The token of one row."""

    token: int
    logprob: float  # natural, of the untouched logits
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens and their log-probabilities, as many as asked for


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep PyTorch to the calling thread for a while.

    After a piece of work that it divided, OpenMP's threads spin on for some ten milliseconds in the hope of more.
    Those of the compiled step then have to share their cores with them: on two cores a step took 18 ms instead of 6.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@one_thread()
def sample(logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """Draw one token for each row.

    Args:
        logits: (R, V), any float dtype.
        draws: One for each row.
    """
    logits = logits.float()
    # log_softmax works row by row; logsumexp over a single row may be split between threads, which changes bits.
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logits.argmax(dim=-1)  # the first of equals on CPUs
    for row, draw in enumerate(draws):
        adjusted = _adjust(logits[row], draw)
        if draw.params.temperature > 0:
            chosen[row] = _draw_row(adjusted, draw)
        elif adjusted.data_ptr() != logits[row].data_ptr():
            chosen[row] = adjusted.argmax()
    picked = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
    tokens = chosen.tolist()
    return [
        Drawn(token, value, top_logprobs(logprobs[row], draw.params.logprobs or 0))
        for row, (token, value, draw) in enumerate(zip(tokens, picked, draws, strict=True))
    ]


def top_logprobs(logprobs: Tensor, num: int) -> tuple[tuple[int, float], ...]:
    """Return the ``num`` likeliest tokens of one row (V,), each with its log-probability; equal ones by id."""
    if num < 1:
        return ()
    ids, values = _largest(logprobs, min(num, logprobs.shape[0]))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


def _adjust(logits: Tensor, draw: Draw) -> Tensor:
    adjusted = adjust(
        logits,
        draw.params,
        prompt_ids=draw.prompt_ids,
        output_ids=draw.output_ids,
        banned_ids=draw.banned_ids,
        bad_words=draw.bad_words,
    )
    return adjusted if draw.allowed is None else adjusted.masked_fill(~draw.allowed, -math.inf)


def _draw_row(logits: Tensor, draw: Draw) -> Tensor:
    """Return the drawn id for one row of fp32 logits (V,)."""
    params = draw.params
    scaled = logits / params.temperature
    if params.min_p > 0:
        scaled = keep_min_p(scaled, params.min_p)
    if params.typical_p < 1:
        scaled = keep_typical(scaled, params.typical_p)
    candidates, values = truncate(scaled, params.top_k, params.top_p)
    noise = gumbel_noise(draw.seed, draw.position, candidates)
    return candidates[(values.double() + noise).argmax()]


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Forbid the tokens that are less probable than ``min_p`` times the likeliest one; (V,) to (V,)."""
    return logits.masked_fill(logits < logits.max() + math.log(min_p), -math.inf)


def keep_typical(logits: Tensor, mass: float) -> Tensor:
    """Keep the tokens whose information is nearest to the entropy, the fewest that hold ``mass``; (V,) to (V,)."""
    logprobs = torch.log_softmax(logits.double(), dim=0)
    weights = logprobs.exp()
    entropy = -(weights * logprobs.clamp(min=-1e300)).sum()
    order = (-logprobs - entropy).abs().argsort(stable=True)
    num_kept = 1 + int((weights[order].cumsum(0)[:-1] < mass).sum())
    kept = torch.zeros_like(logits, dtype=torch.bool)
    kept[order[:num_kept]] = True
    return logits.masked_fill(~kept, -math.inf)


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
