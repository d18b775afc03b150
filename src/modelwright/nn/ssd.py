"""State-space duality (Mamba-2): one decay per head, so that the recurrence is also a masked matrix product.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T      S: one state of P x N numbers per head
    y_t = S_t C_t + D x_t

Within a chunk of Q tokens the output is (L * (C B^T)) (dt x), like attention without a softmax, where L_ts is the
product of the decays after s up to t; between chunks the states are handed on. L is the exponential of sums of
dt A <= 0 taken over each stretch by itself (`segment_sum`): differences of one long running sum would lose digits,
quotients of products would overflow.

A document's start puts -inf into the sum, so nothing passes it; padding has dt = 0, which leaves the state as it is.

Source: Dao and Gu 2024, "Transformers are SSMs", arXiv 2405.21060: section 6 and listing 1, section 7 (the block).
Not here: the fused kernels. B batch, T tokens, D hidden, I inner size, H heads of P channels, G groups that share B
and C, N state size, Q chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.nn.past import WHOLE, CausalConv, Segments
from modelwright.nn.ssm import inverse_softplus_steps

CHUNK_SIZE = 64


def segment_sum(values: Tensor) -> Tensor:
    """Return (..., Q, Q) with the sum of ``values`` (..., Q) after s up to t at [t, s], and -inf where s > t.

    >>> segment_sum(torch.tensor([1.0, 2.0, 3.0])).tolist()
    [[0.0, -inf, -inf], [2.0, 0.0, -inf], [5.0, 3.0, 0.0]]
    """
    size = values.shape[-1]
    at = torch.arange(size, device=values.device)
    steps = values[..., None].expand(*values.shape, size)  # [t, s] = value at t
    sums = steps.masked_fill(at[:, None] <= at, 0.0).cumsum(-2)
    return sums.masked_fill(at[:, None] < at, float("-inf"))


def ssd_sequential(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what `ssd` computes, token by token: the readable twin."""
    B, C = _per_head(x, B), _per_head(x, C)  # (B, T, H, N)
    S = _first_state(x, B, state)  # (B, H, P, N)
    outputs = []
    for t, (x_t, dt_t, B_t, C_t) in enumerate(zip(*(v.float().unbind(1) for v in (x, dt, B, C)), strict=True)):
        decay = torch.exp(dt_t * A.float())  # (B, H)
        if starts is not None:
            decay = decay * ~starts[:, t, None]
        S = decay[..., None, None] * S + (dt_t[..., None] * x_t)[..., None] * B_t[:, :, None]
        outputs.append(torch.einsum("bhpn,bhn->bhp", S, C_t))
    return torch.stack(outputs, dim=1), S


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a sequence, chunk by chunk; D x is left to the caller.

    Args:
        x: (B, T, H, P) inputs.
        dt: (B, T, H) step sizes, at least 0.
        A: (H,), negative.
        B: (B, T, G, N) how the input enters the state; G divides H, and neighbouring heads share a group.
        C: (B, T, G, N) how the state is read.
        state: (B, H, P, N) before the first token; None: zeros.
        starts: (B, T) True where the state is emptied before the token; None: nowhere.
        chunk_size: Q.

    Returns:
        y (B, T, H, P) and the state after the last token (B, H, P, N), both float32.
    """
    length, num_heads = x.shape[1], x.shape[2]
    size = min(chunk_size, length)
    count = -(-length // size)
    first = _first_state(x, B, state)

    def cut(values: Tensor) -> Tensor:  # the tail is filled with dt = 0, x = 0: inert
        tail = (0, 0) * (values.ndim - 2) + (0, count * size - length)
        return F.pad(values, tail).unflatten(1, (count, size))  # (B, count, Q, ...)

    log_decay = dt.float() * A.float()  # (B, T, H)
    if starts is not None:
        log_decay = log_decay.masked_fill(starts[..., None], float("-inf"))
    log_decay = cut(log_decay).transpose(2, 3)  # (B, count, H, Q)
    inputs = cut((dt[..., None] * x).float())  # (B, count, Q, H, P)
    B, C = cut(B.float()), cut(C.float())  # (B, count, Q, G, N)
    L = torch.exp(segment_sum(log_decay))  # (B, count, H, Q, Q)
    carried = torch.exp(log_decay.cumsum(-1))  # (B, count, H, Q) of the chunk's first state, what is left

    heads = num_heads // B.shape[3]
    scores = torch.einsum("bctgn,bcsgn->bcgts", C, B).repeat_interleave(heads, dim=2)  # (B, count, H, Q, Q)
    y = torch.einsum("bchts,bcshp->bcthp", L * scores, inputs)
    B, C = B.repeat_interleave(heads, dim=3), C.repeat_interleave(heads, dim=3)  # (B, count, Q, H, N)
    made = torch.einsum("bchs,bcshp,bcshn->bchpn", L[..., -1, :], inputs, B)

    before = []
    for left, piece in zip(carried[..., -1].unbind(1), made.unbind(1), strict=True):
        before.append(first)
        first = left[..., None, None] * first + piece
    seen = torch.einsum("bcthn,bchpn->bcthp", C, torch.stack(before, dim=1))
    y = y + seen * carried.transpose(2, 3)[..., None]
    return y.flatten(1, 2)[:, :length], first


def _per_head(x: Tensor, values: Tensor) -> Tensor:
    return values.float().repeat_interleave(x.shape[2] // values.shape[2], dim=2)


def _first_state(x: Tensor, B: Tensor, state: Tensor | None) -> Tensor:
    if state is not None:
        return state.float()
    return torch.zeros(x.shape[0], *x.shape[2:], B.shape[-1], device=x.device)


class GatedNorm(nn.Module):
    """RMSNorm of ``x * silu(gate)``, each group of channels by itself: the gate comes before the norm."""

    def __init__(self, size: int, num_groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.num_groups, self.eps = num_groups, eps

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Set the weight to one."""
        self.weight.fill_(1.0)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Map (..., I) and its gate (..., I) to (..., I), statistics in float32, in the dtype of ``gate``."""
        gated = (x.float() * F.silu(gate.float())).unflatten(-1, (self.num_groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return self.weight * normed.to(gate.dtype)


@dataclass(frozen=True)
class SsdShape:
    """The sizes of a Mamba-2 layer."""

    num_heads: int  # H
    head_dim: int = 64  # P
    state_size: int = 128  # N
    num_groups: int = 1  # G
    num_taps: int = 4  # of the convolution
    chunk_size: int = CHUNK_SIZE  # Q, a matter of speed only
    step_limit: tuple[float, float] = (0.0, float("inf"))  # dt is held between these

    def __post_init__(self) -> None:
        for name in ("num_heads", "head_dim", "state_size", "num_groups", "num_taps", "chunk_size"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"{name} of a Mamba-2 layer is {value!r}; it must be a whole number of at least 1.")
        if self.num_heads % self.num_groups:
            raise ConfigError(
                f"A Mamba-2 layer has num_heads {self.num_heads} and num_groups {self.num_groups}; the groups must "
                "divide the heads evenly."
            )
        low, high = self.step_limit
        if not 0 <= low < high:
            raise ConfigError(f"step_limit is {self.step_limit}; expected 0 <= low < high.")

    @property
    def inner_size(self) -> int:
        """I = H P."""
        return self.num_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner_size + 2 * self.num_groups * self.state_size

    @property
    def memory_size(self) -> int:
        """Numbers that a decode state keeps: S and the convolution's last inputs."""
        return self.inner_size * self.state_size + self.conv_size * (self.num_taps - 1)


class Mamba2Mixer(nn.Module):
    """The Mamba-2 layer: one projection to gate, x, B, C and dt; convolution; scan; gated norm; projection back."""

    def __init__(
        self,
        hidden_size: int,
        shape: SsdShape,
        *,
        norm_eps: float = 1e-5,
        bias: bool = False,
        conv_bias: bool = True,
        layer_index: int = 0,
    ):
        """Build the layer.

        Args:
            hidden_size: D.
            shape: The other sizes.
            norm_eps: Of the gated norm.
            bias: Of the projections in and out.
            conv_bias: Of the convolution.
            layer_index: Under which a decode state keeps this layer's memory.
        """
        super().__init__()
        self.shape, self.layer_index = shape, layer_index
        self.in_proj = nn.Linear(hidden_size, shape.inner_size + shape.conv_size + shape.num_heads, bias=bias)
        self.conv = CausalConv(shape.conv_size, shape.num_taps, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(shape.num_heads))
        self.A_log = nn.Parameter(torch.empty(shape.num_heads))
        self.D = nn.Parameter(torch.empty(shape.num_heads))
        self.norm = GatedNorm(shape.inner_size, shape.num_groups, norm_eps)
        self.out_proj = nn.Linear(shape.inner_size, hidden_size, bias=bias)

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Draw A evenly from -16 .. -1 and dt from 0.001 .. 0.1 as the authors' code does; D is one."""
        self.A_log.copy_(torch.empty(self.shape.num_heads).uniform_(1.0, 16.0, generator=generator).log())
        self.dt_bias.copy_(inverse_softplus_steps(self.shape.num_heads, generator))
        self.D.fill_(1.0)

    def forward(self, x: Tensor, *, state: Any = None, segments: Segments = WHOLE) -> Tensor:
        """Map (B, T, D) to (B, T, D); ``state`` is a `DecodeState` or None."""
        c = self.shape
        memory = None if state is None else state.memory(self.layer_index)
        gate, xBC, dt = self.in_proj(x).split([c.inner_size, c.conv_size, c.num_heads], dim=-1)
        xBC = F.silu(self.conv(xBC, memory=memory, segments=segments))
        inputs, B, C = xBC.split([c.inner_size, c.num_groups * c.state_size, c.num_groups * c.state_size], dim=-1)
        inputs = inputs.unflatten(-1, (c.num_heads, c.head_dim))  # (B, T, H, P)
        B, C = (v.unflatten(-1, (c.num_groups, c.state_size)) for v in (B, C))  # (B, T, G, N)
        dt = F.softplus((dt + self.dt_bias).float()).clamp(*c.step_limit)  # (B, T, H)
        if segments.is_token is not None:
            dt = dt * segments.is_token[..., None]
        A = -torch.exp(self.A_log.float())
        before = None if memory is None else memory.get("ssm")
        y, after = ssd(inputs, dt, A, B, C, state=before, starts=segments.resets, chunk_size=c.chunk_size)
        if memory is not None:
            memory["ssm"] = after
        y = y + self.D.float()[:, None] * inputs
        return self.out_proj(self.norm(y.flatten(-2), gate))
