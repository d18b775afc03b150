"""Look a few tokens back: the causal depthwise convolution of state-space layers and the token shift of RWKV.

One function gives every token its predecessors, whatever stands between them: the start of a document hides what was
before it, padding is passed over, and what the next piece of the sequence will need is left in the layer's memory.

Source: Gu and Dao 2023, "Mamba", section 3.4 (convolution before the scan); Peng et al. 2023, "RWKV", section 3.1.1.
B batch, T tokens, C channels, K taps of the filter.
"""

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Segments(NamedTuple):
    """Which of the tokens at hand are tokens, and where documents begin."""

    starts: Tensor | None = None  # (B, T) True at the first token of a document; None: nothing is forgotten
    is_token: Tensor | None = None  # (B, T) False at padding, which no token sees; None: all are tokens

    @property
    def is_whole(self) -> bool:
        """Whether all is one stretch of tokens."""
        return self.starts is None and self.is_token is None

    @property
    def resets(self) -> Tensor | None:
        """Where a recurrent state is emptied before the token, (B, T); None: nowhere."""
        return self.starts if self.starts is None or self.is_token is None else self.starts & self.is_token


WHOLE = Segments()


def look_back(
    x: Tensor, num_lags: int, *, memory: dict[str, Tensor] | None = None, name: str = "", segments: Segments = WHOLE
) -> list[Tensor]:
    """Return the token before each token, the one before that, and so on: ``num_lags`` tensors (B, T, C).

    Before the first token of a sequence or document there are zeros. Values at padding have no meaning.

    Args:
        x: (B, T, C).
        num_lags: How far to look back.
        memory: Of the layer; ``memory[name]`` (B, num_lags, C) holds the last tokens and is replaced. None: x is all.
        name: Under which the last tokens are kept.
        segments: Document starts and padding.
    """
    past = None if memory is None else memory.get(name)
    if past is None:
        past = x.new_zeros(x.shape[0], num_lags, x.shape[2])
    batch, length, _ = x.shape
    starts, is_token = segments
    if is_token is None:
        rank = torch.arange(length, device=x.device).expand(batch, -1)  # (B, T) how many tokens came before
        joined = torch.cat((past, x), dim=1)  # (B, num_lags + T, C)
    else:  # tokens first, padding behind them
        order = is_token.long().argsort(dim=1, descending=True, stable=True)
        rank = (is_token.long().cumsum(1) - 1).clamp(min=0)
        joined = torch.cat((past, x.gather(1, _widen(order, x))), dim=1)
        starts = None if starts is None else starts & is_token
    since = None  # tokens since the start of the document; far more than num_lags where it began in an earlier piece
    if starts is not None:
        began = torch.where(starts, rank, -num_lags - 1).cummax(dim=1).values
        since = rank - began
    lags = []
    for lag in range(1, num_lags + 1):
        if is_token is None:
            seen = joined[:, num_lags - lag : num_lags - lag + length]
        else:
            seen = joined.gather(1, _widen(rank + num_lags - lag, x))
        lags.append(seen if since is None else seen * (since >= lag)[..., None])
    if memory is not None:
        memory[name] = _last(joined, num_lags, is_token, since)
    return lags


def _last(joined: Tensor, num_lags: int, is_token: Tensor | None, since: Tensor | None) -> Tensor:
    """Return the last tokens (B, num_lags, C), zeros where they stand before the last document's start."""
    if is_token is None:
        kept = joined[:, joined.shape[1] - num_lags :]
    else:
        at = is_token.sum(1)[:, None] + torch.arange(num_lags, device=joined.device)  # (B, num_lags)
        kept = joined.gather(1, _widen(at, joined))
    if since is None:
        return kept
    lag = torch.arange(num_lags - 1, -1, -1, device=joined.device)
    # At trailing padding the count stands still, so the last column speaks of the last token.
    return kept * (since[:, -1:] >= lag)[..., None]


def _widen(index: Tensor, x: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, x.shape[2])


class CausalConv(nn.Module):
    """A filter of K taps per channel over the present token and the K - 1 before it."""

    vector_names: ClassVar[tuple[str, ...]] = ("weight",)  # scalars per channel: no weight decay

    def __init__(self, num_channels: int, num_taps: int, bias: bool = True):
        super().__init__()
        self.num_taps = num_taps
        self.weight = nn.Parameter(torch.empty(num_channels, 1, num_taps))  # the last tap is that of the present
        self.bias = nn.Parameter(torch.empty(num_channels)) if bias else None

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Draw the taps evenly from +-1/sqrt(K), as the published code does; biases are zero."""
        bound = 1 / math.sqrt(self.num_taps)
        self.weight.copy_(torch.empty(self.weight.shape).uniform_(-bound, bound, generator=generator))
        if self.bias is not None:
            self.bias.zero_()

    def forward(
        self, x: Tensor, *, memory: dict[str, Tensor] | None = None, name: str = "conv", segments: Segments = WHOLE
    ) -> Tensor:
        """Map (B, T, C) to (B, T, C); the other arguments are those of `look_back`."""
        if memory is None and segments.is_whole:
            padded = F.pad(x.transpose(1, 2), (self.num_taps - 1, 0))  # (B, C, K - 1 + T)
            return F.conv1d(padded, self.weight, self.bias, groups=x.shape[2]).transpose(1, 2)
        lags = look_back(x, self.num_taps - 1, memory=memory, name=name, segments=segments)
        y = x * self.weight[:, 0, -1]
        for lag, seen in enumerate(lags, start=1):
            y = y + seen * self.weight[:, 0, -1 - lag]
        return y if self.bias is None else y + self.bias
