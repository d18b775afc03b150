"""RWKV-4: attention as a recurrence with one decay per channel, kept stable by carrying a running maximum.

    wkv_t = (sum_{s<t} exp(-(t-1-s) w + k_s) v_s + exp(u + k_t) v_t) / (the same without v)

`wkv_sequential` keeps the numerator, the denominator and the largest exponent so far, by whose exponential both are
divided: nothing overflows, however large or small the keys. `wkv` computes the same in about 2 sqrt(T) steps: all
chunks are walked through at once, each from an empty past; the pasts are joined from chunk to chunk; and for each token
what was before the chunk, what the chunk holds and the token itself are brought to one maximum.

A document's start empties the past; padding neither decays nor adds.

Source: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", arXiv 2305.13048: section 3.1, appendices
on numerical stability and first values. Not here: RWKV-5 and later. B batch, T tokens, D hidden, I attention size, F
width of the channel mix, Q chunk.
"""

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.nn.past import WHOLE, Segments, look_back

NOTHING = -1e38  # the exponent of an empty past: far below any key; with -inf a difference of two would be NaN


class Past(NamedTuple):
    """Weighted sums over the past, both divided by exp(top); all (..., I) float32."""

    num: Tensor  # of the values
    den: Tensor  # of ones
    top: Tensor  # the largest exponent, without a gradient: it cancels in every quotient

    @classmethod
    def empty(cls, *shape: int, device: torch.device) -> "Past":
        """Return a past without tokens."""
        zeros = torch.zeros(shape, device=device)
        return cls(zeros, zeros, torch.full_like(zeros, NOTHING))

    @classmethod
    def of(cls, exponent: Tensor, value: Tensor, weight: Tensor) -> "Past":
        """Return the sums over one token: weight exp(exponent) value and weight exp(exponent)."""
        top = exponent.detach()
        den = weight * torch.exp(exponent - top)  # the weight itself, but the gradient of the exponent passes
        return cls(den * value, den, top)

    @classmethod
    def stack(cls, pasts: "list[Past]", dim: int) -> "Past":
        """Return several in one, along a new axis."""
        return cls(*(torch.stack(part, dim=dim) for part in zip(*pasts, strict=True)))

    def unbind(self, dim: int) -> "list[Past]":
        """Return one for each place on an axis."""
        return [Past(*parts) for parts in zip(*(part.unbind(dim) for part in self), strict=True)]

    def join(self, other: "Past") -> "Past":
        """Return the sums over both."""
        top = torch.maximum(self.top, other.top)
        mine, others = torch.exp(self.top - top), torch.exp(other.top - top)
        return Past(mine * self.num + others * other.num, mine * self.den + others * other.den, top)

    def decay(self, exponent: Tensor) -> "Past":
        """Return the sums times exp(exponent)."""
        fixed = exponent.detach()
        factor = torch.exp(exponent - fixed)  # one, but the gradient of the exponent passes
        return Past(self.num * factor, self.den * factor, self.top + fixed)

    def keep(self, where: Tensor) -> "Past":
        """Return this past where ``where`` is True and an empty one elsewhere."""
        return Past(self.num * where, self.den * where, self.top.masked_fill(~where, NOTHING))


def wkv_sequential(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, *, past: Past | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Past]:
    """Compute what `wkv` computes, token by token and without padding: the readable twin."""
    num, den, top = past or Past.empty(k.shape[0], k.shape[2], device=k.device)
    outputs = []
    for t, (k_t, v_t) in enumerate(zip(k.float().unbind(1), v.float().unbind(1), strict=True)):
        if starts is not None:
            num, den, top = Past(num, den, top).keep(~starts[:, t, None])
        highest = torch.maximum(top, u + k_t)
        before, now = torch.exp(top - highest), torch.exp(u + k_t - highest)
        outputs.append((before * num + now * v_t) / (before * den + now))
        highest = torch.maximum(top - w, k_t)
        before, now = torch.exp(top - w - highest), torch.exp(k_t - highest)
        num, den, top = before * num + now * v_t, before * den + now, highest
    return torch.stack(outputs, dim=1), Past(num, den, top)


# A compiler would unroll the loops into thousands of operations and take minutes.
@torch.compiler.disable
def wkv(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    past: Past | None = None,
    segments: Segments = WHOLE,
    chunk_size: int | None = None,
) -> tuple[Tensor, Past]:
    """Run the recurrence over a sequence, chunk by chunk.

    Args:
        k: (B, T, I) keys, the exponents of the weights.
        v: (B, T, I) values.
        w: (I,) positive: by how much an exponent falls with each further token.
        u: (I,) added to the present token's exponent instead.
        past: Sums before the first token, (B, I) each; None: empty.
        segments: Document starts and padding; values at padding have no meaning.
        chunk_size: Q; None: about sqrt(T), where the number of steps is least.

    Returns:
        wkv (B, T, I), float32, and the sums after the last token.
    """
    batch, length, width = k.shape
    size = chunk_size or math.isqrt(max(length - 1, 0)) + 1
    count = -(-length // size)
    is_token = torch.ones(batch, length, dtype=torch.bool, device=k.device)
    is_token = is_token if segments.is_token is None else segments.is_token
    resets = torch.zeros_like(is_token) if segments.resets is None else segments.resets

    def cut(values: Tensor) -> Tensor:  # the tail is padding
        values = F.pad(values, (0, 0, 0, count * size - length))
        return values.unflatten(1, (count, size))  # (B, count, Q, .)

    k, v, real, start = cut(k.float()), cut(v.float()), cut(is_token[..., None]), cut(resets[..., None])
    added = Past.of(k.masked_fill(~real, NOTHING), v, real.float())
    fall = -w.float()

    local = Past.empty(batch, count, width, device=k.device)
    seen = []
    for q, token in enumerate(added.unbind(2)):
        if segments.starts is not None:
            local = local.keep(~start[:, :, q])
        seen.append(local)
        local = local.decay(fall * real[:, :, q]).join(token)

    past = past or Past.empty(batch, width, device=k.device)
    before = []
    for c, chunk in enumerate(local.unbind(1)):
        before.append(past)
        open_chunk = ~start[:, c].any(1)  # (B, 1)
        past = past.keep(open_chunk).decay(fall * real[:, c].sum(1)).join(chunk)

    carried = Past(*(part[:, :, None] for part in Past.stack(before, dim=1)))  # (B, count, 1, I)
    age = real.cumsum(2) - real.long()  # tokens of the chunk before each
    inside = Past.stack(seen, dim=2)  # (B, count, Q, I)
    total = carried.keep(start.cumsum(2) == 0).decay(fall * age).join(inside)
    total = total.join(Past.of(u.float() + k, v, torch.ones_like(k)))
    return (total.num / total.den).flatten(1, 2)[:, :length], past


class TimeMix(nn.Module):
    """RWKV's counterpart of attention: keys, values and receptances of the token mixed with the one before it."""

    vector_names: ClassVar[tuple[str, ...]] = ("mix_key", "mix_value", "mix_receptance")

    def __init__(self, hidden_size: int, attention_size: int, *, layer_index: int, num_layers: int):
        super().__init__()
        self.layer_index, self.num_layers = layer_index, num_layers
        self.time_decay = nn.Parameter(torch.empty(attention_size))  # w = exp(time_decay)
        self.time_first = nn.Parameter(torch.empty(attention_size))  # u
        self.mix_key = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.mix_value = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.mix_receptance = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.key = nn.Linear(hidden_size, attention_size, bias=False)
        self.value = nn.Linear(hidden_size, attention_size, bias=False)
        self.receptance = nn.Linear(hidden_size, attention_size, bias=False)
        self.output = nn.Linear(attention_size, hidden_size, bias=False)
        self.output.init_scale = 0.0  # type: ignore[assignment]  # as the authors do: a block begins as the identity

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Spread decays and mixes over channels and layers as published."""
        size, depth = self.time_decay.shape[0], self.layer_index / max(1, self.num_layers - 1)
        channel = torch.arange(size)
        self.time_decay.copy_(-5 + 8 * (channel / max(1, size - 1)) ** (0.7 + 1.3 * depth))
        # transformers sets ones here: its expression takes ones_like of these numbers.
        self.time_first.copy_(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        share = channel_shares(self.mix_key.shape[2])
        rest = 1 - self.layer_index / self.num_layers
        self.mix_key.copy_(share**rest)
        self.mix_value.copy_(share**rest + 0.3 * depth)
        self.mix_receptance.copy_(share ** (0.5 * rest))

    def forward(self, x: Tensor, *, state: Any = None, segments: Segments = WHOLE) -> Tensor:
        """Map (B, T, D) to (B, T, D); ``state`` is a `DecodeState` or None."""
        memory = None if state is None else state.memory(self.layer_index)
        [last] = look_back(x, 1, memory=memory, name="time_shift", segments=segments)
        k = self.key(torch.lerp(last, x, self.mix_key))
        v = self.value(torch.lerp(last, x, self.mix_value))
        r = torch.sigmoid(self.receptance(torch.lerp(last, x, self.mix_receptance)))
        past = Past(memory["num"], memory["den"], memory["top"]) if memory and "num" in memory else None
        y, past = wkv(k, v, torch.exp(self.time_decay.float()), self.time_first, past=past, segments=segments)
        if memory is not None:
            memory.update(past._asdict())
        return self.output(r * y.to(x.dtype))


class ChannelMix(nn.Module):
    """RWKV's feed-forward half: a squared ReLU of the token mixed with the one before it, gated by the receptance."""

    vector_names: ClassVar[tuple[str, ...]] = ("mix_key", "mix_receptance")

    def __init__(self, hidden_size: int, intermediate_size: int, *, layer_index: int, num_layers: int):
        super().__init__()
        self.layer_index, self.num_layers = layer_index, num_layers
        self.mix_key = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.mix_receptance = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.key = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.receptance = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.value.init_scale = 0.0  # type: ignore[assignment]

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Spread the mixes over channels and layers as published."""
        share, rest = channel_shares(self.mix_key.shape[2]), 1 - self.layer_index / self.num_layers
        self.mix_key.copy_(share**rest)
        self.mix_receptance.copy_(share**rest)

    def forward(self, x: Tensor, *, state: Any = None, segments: Segments = WHOLE) -> Tensor:
        """Map (B, T, D) to (B, T, D); ``state`` is a `DecodeState` or None."""
        memory = None if state is None else state.memory(self.layer_index)
        [last] = look_back(x, 1, memory=memory, name="channel_shift", segments=segments)
        k = F.relu(self.key(torch.lerp(last, x, self.mix_key))).square()  # (B, T, F)
        return torch.sigmoid(self.receptance(torch.lerp(last, x, self.mix_receptance))) * self.value(k)


def channel_shares(size: int) -> Tensor:
    """Return i / size for every channel i, (1, 1, size).

    >>> channel_shares(4)
    tensor([[[0.0000, 0.2500, 0.5000, 0.7500]]])
    """
    return (torch.arange(size) / size)[None, None]
