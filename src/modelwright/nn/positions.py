"""Positions other than rotation: sinusoids and learned vectors added to the input, ALiBi and T5 biases on the scores.

A bias goes to `modelwright.nn.attention.attend` as ``bias``. ALiBi's is (B, N, 1, S): it grows with the key's position
alone, which under a causal mask is the same as falling with the distance, since a softmax does not see what is added to
a whole row; so it stays linear in the length. Rotary positions are in `modelwright.nn.rope`.

Source: Vaswani et al. 2017, section 3.5 (sinusoids); Gehring et al. 2017 (learned); Press et al. 2022, arXiv 2108.12409
(ALiBi); Raffel et al. 2020, "T5", section 2.1 (relative buckets); Radford et al. 2022 (Whisper's sinusoids).
S: keys; P: positions in a table.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, RequestError

SinusoidLayout = Literal["interleaved", "half_split", "whisper"]


def sinusoids(num_positions: int, size: int, layout: SinusoidLayout = "interleaved", theta: float = 1e4) -> Tensor:
    """Return the table of fixed positions (P, D), float32.

    ``interleaved`` is the paper's: sine and cosine take turns. ``half_split`` has all sines first (Marian, Pegasus, the
    tensor2tensor code); ``whisper`` too, and its slowest wave is exactly ``theta`` times slower than its fastest.

    >>> sinusoids(2, 4).round(decimals=2).tolist()
    [[0.0, 1.0, 0.0, 1.0], [0.8399999737739563, 0.5400000214576721, 0.009999999776482582, 1.0]]
    """
    if size < 4 or size % 2:
        raise ConfigError(f"Sinusoids of size {size} are asked for; the size must be even and at least 4.")
    steps = size // 2 - 1 if layout == "whisper" else size // 2
    rate = torch.exp(torch.arange(size // 2, dtype=torch.float64, device="cpu") * (-math.log(theta) / steps))
    angle = torch.arange(num_positions, dtype=torch.float64, device="cpu")[:, None] * rate  # (P, D/2)
    waves = angle.sin(), angle.cos()
    table = torch.stack(waves, dim=-1).flatten(1) if layout == "interleaved" else torch.cat(waves, dim=-1)
    return table.float()


class LearnedPositions(nn.Embedding):
    """A vector for each position, learned. Some families leave the first ``offset`` rows unused (OPT and BART 2)."""

    def __init__(self, max_seq_len: int, hidden_size: int, offset: int = 0):
        super().__init__(max_seq_len + offset, hidden_size)
        self.max_seq_len, self.offset = max_seq_len, offset

    def forward(self, positions: Tensor) -> Tensor:
        """Return the vectors (..., D) of ``positions`` (...).

        Raises:
            RequestError: A position that was never learned; it is seen on a CPU only, to spare a GPU the wait.
        """
        if positions.device.type == "cpu" and not torch.compiler.is_compiling() and positions.numel():
            last = int(positions.max())
            if last >= self.max_seq_len:
                raise RequestError(
                    f"Position {last} was asked for; this model learned positions 0 to {self.max_seq_len - 1}. "
                    "Shorten the input.",
                    code="context_length_exceeded",
                )
        return super().forward(positions + self.offset)


def alibi_slopes(num_heads: int) -> Tensor:
    """Return how fast each head's scores fall with the distance, (N,) float32.

    A geometric series from 2^(-8/N); when N is no power of two, that of the power below and every second one of the
    power above, as in the paper's code.

    >>> alibi_slopes(6).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    """
    if num_heads < 1:
        raise ConfigError(f"num_heads is {num_heads}; it must be at least 1.")
    power = 2 ** int(math.log2(num_heads))
    base = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(base + between, dtype=torch.float32, device="cpu")


def alibi_bias(slopes: Tensor, key_positions: Tensor) -> Tensor:
    """Return the bias (B, N, 1, S) of causal attention from the slopes (N,) and the keys' positions (B, S)."""
    return slopes[:, None, None] * key_positions[:, None, None, :]


def alibi_bias_two_sided(slopes: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """Return the bias (B, N, T, S) that falls to both sides, for encoders, from positions (B, T) and (B, S)."""
    distance = (query_positions[:, :, None] - key_positions[:, None, :]).abs()  # (B, T, S)
    return -slopes[:, None, None] * distance[:, None]


def relative_buckets(
    distance: Tensor, *, is_bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> Tensor:
    """Return the bucket of each ``distance`` (key minus query position), in 0 .. num_buckets - 1.

    Half the buckets hold one distance each; the others grow with its logarithm up to ``max_distance``, and the last
    holds all beyond. In both directions each side has half of all; in one, keys after the query share bucket 0.

    >>> relative_buckets(torch.tensor([0, -1, -15, -16, -127, -500, 3]), is_bidirectional=False).tolist()
    [0, 1, 15, 16, 31, 31, 0]
    """
    side = num_buckets // 2 if is_bidirectional else num_buckets
    num_exact = side // 2
    if num_exact < 1 or max_distance <= num_exact:
        raise ConfigError(
            f"Relative positions have {num_buckets} buckets up to a distance of {max_distance}; half of each side's "
            f"buckets ({num_exact}) hold one distance each, so it must be at least 1 and below the largest distance."
        )
    after = (distance > 0).long() * side if is_bidirectional else torch.zeros_like(distance)
    away = distance.abs() if is_bidirectional else (-distance).clamp(min=0)
    # A distance of 0 would give log(0) here; it lies in the exact half, so any number does.
    grown = torch.log(away.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    far = (num_exact + (grown * (side - num_exact)).long()).clamp(max=side - 1)
    return after + torch.where(away < num_exact, away, far)


class RelativeBias(nn.Module):
    """T5's bias: a learned number for each head and bucket of distance."""

    def __init__(self, num_heads: int, *, is_bidirectional: bool, num_buckets: int = 32, max_distance: int = 128):
        super().__init__()
        self.is_bidirectional, self.num_buckets, self.max_distance = is_bidirectional, num_buckets, max_distance
        self.embed = nn.Embedding(num_buckets, num_heads)

    def forward(self, num_queries: int, num_keys: int, offset: int = 0) -> Tensor:
        """Return the bias (1, N, T, S) for queries offset .. offset + T - 1 and keys 0 .. S - 1."""
        device = self.embed.weight.device
        at = torch.arange(offset, offset + num_queries, device=device)[:, None]
        return self.at(torch.arange(num_keys, device=device) - at)

    def at(self, distance: Tensor) -> Tensor:
        """Return the bias (1, N, T, S) or (B, N, T, S) for distances (T, S) or (B, T, S), key minus query."""
        buckets = relative_buckets(
            distance,
            is_bidirectional=self.is_bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        bias: Tensor = self.embed(buckets if buckets.dim() == 3 else buckets[None])  # (B, T, S, N)
        return bias.permute(0, 3, 1, 2)
