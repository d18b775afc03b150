"""Selective state spaces (Mamba): a linear recurrence whose step, input and output depend on the token.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        h: one state of N numbers per channel
    y_t = C_t h_t + D x_t

A is negative, so every decay exp(dt A) lies in (0, 1]. `selective_scan_sequential` is this recurrence, one token after
the other. `selective_scan` computes the same in about 2 sqrt(T) steps: the tokens are cut into chunks; step q walks
through all chunks at once, each from an empty state; then the chunks' first states follow from each other, and each
token adds what it still sees of its chunk's first state. Nothing is ever divided by a product of decays, which would
overflow: all exponents are at most zero.

A document's start sets the decay to zero; padding has dt = 0, which leaves the state as it is.

Source: Gu and Dao 2023, "Mamba", arXiv 2312.00752: algorithm 2, section 3.6 (first values), equations 1 and 2 (A by
zero-order hold, B by Euler's step, as in its code). Not here: complex A, the fused CUDA kernel.
B batch, T tokens, D hidden, I inner channels, N state size, R rank of the projection to dt, Q chunk.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.nn.past import WHOLE, CausalConv, Segments

# dt is first drawn between these, evenly in its logarithm.
MIN_STEP, MAX_STEP, STEP_FLOOR = 1e-3, 1e-1, 1e-4


def selective_scan_sequential(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what `selective_scan` computes, token by token: the readable twin."""
    h = _first_state(x, A, state)  # (B, I, N)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t, :, None].float() * A.float())  # (B, I, N)
        if starts is not None:
            decay = decay * ~starts[:, t, None, None]
        h = decay * h + (dt[:, t] * x[:, t]).float()[..., None] * B[:, t, None].float()
        outputs.append((h * C[:, t, None].float()).sum(-1))  # (B, I)
    return torch.stack(outputs, dim=1), h


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a sequence, chunk by chunk; D x is left to the caller.

    Args:
        x: (B, T, I) inputs.
        dt: (B, T, I) step sizes, at least 0.
        A: (I, N), negative.
        B: (B, T, N) how the input enters the state.
        C: (B, T, N) how the state is read.
        state: (B, I, N) before the first token; None: zeros.
        starts: (B, T) True where the state is emptied before the token; None: nowhere.
        chunk_size: Q; None: about sqrt(T), where the number of steps is least.

    Returns:
        y (B, T, I) and the state after the last token (B, I, N), both float32.
    """
    batch, length, _ = x.shape
    size = chunk_size or math.isqrt(max(length - 1, 0)) + 1
    count = -(-length // size)
    first = _first_state(x, A, state)
    A = A.float()

    def cut(values: Tensor) -> Tensor:  # the tail is filled with dt = 0, x = 0: inert
        values = F.pad(values.float(), (0, 0, 0, count * size - length))
        return values.unflatten(1, (count, size))  # (B, count, Q, .)

    inputs, dt, B, C = cut(dt * x), cut(dt), cut(B), cut(C)
    decay = torch.exp(dt[..., None] * A)  # (B, count, Q, I, N)
    carried = torch.exp(dt.cumsum(2)[..., None] * A)  # what is left, at each token, of the chunk's first state
    if starts is not None:
        starts = F.pad(starts, (0, count * size - length)).unflatten(1, (count, size))
        decay = decay * ~starts[..., None, None]
        carried = carried * (starts.cumsum(2) == 0)[..., None, None]

    h = torch.zeros_like(decay[:, :, 0])  # (B, count, I, N)
    outputs = []
    pieces = (decay.unbind(2), inputs.unbind(2), B.unbind(2), C.unbind(2))
    for decay_q, input_q, B_q, C_q in zip(*pieces, strict=True):
        h = decay_q * h + input_q[..., None] * B_q[..., None, :]
        outputs.append(torch.matmul(h, C_q[..., None])[..., 0])  # (B, count, I)
    y = torch.stack(outputs, dim=2)  # (B, count, Q, I)

    before = []
    for left, made in zip(carried[:, :, -1].unbind(1), h.unbind(1), strict=True):
        before.append(first)
        first = left * first + made
    seen = carried * torch.stack(before, dim=1)[:, :, None]  # (B, count, Q, I, N)
    y = y + torch.matmul(seen, C[..., None])[..., 0]
    return y.flatten(1, 2)[:, :length], first


def _first_state(x: Tensor, A: Tensor, state: Tensor | None) -> Tensor:
    if state is not None:
        return state.float()
    return torch.zeros(x.shape[0], *A.shape, device=x.device)


def inverse_softplus_steps(size: int, generator: torch.Generator) -> Tensor:
    """Draw ``size`` step sizes, even in the logarithm, and return what softplus turns into them."""
    span = math.log(MAX_STEP) - math.log(MIN_STEP)
    dt = torch.exp(torch.rand(size, generator=generator) * span + math.log(MIN_STEP)).clamp(min=STEP_FLOOR)
    return dt + torch.log(-torch.expm1(-dt))


class StepProjection(nn.Linear):
    """From R numbers to a step size per channel. Its bias decides how long the layer remembers: never zero it."""

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Draw the weight evenly from +-R^-0.5 and the bias so that dt falls into 0.001 .. 0.1."""
        bound = self.in_features**-0.5
        self.weight.copy_(torch.empty(self.weight.shape).uniform_(-bound, bound, generator=generator))
        self.bias.copy_(inverse_softplus_steps(self.out_features, generator))


class MambaMixer(nn.Module):
    """The Mamba layer: project, convolve, scan with steps chosen by the token, gate, project back."""

    vector_names: ClassVar[tuple[str, ...]] = ("A_log",)

    def __init__(
        self,
        hidden_size: int,
        inner_size: int,
        state_size: int = 16,
        *,
        num_taps: int = 4,
        step_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        layer_index: int = 0,
    ):
        """Build the layer.

        Args:
            hidden_size: D.
            inner_size: I, usually 2 D.
            state_size: N.
            num_taps: Of the convolution.
            step_rank: R; None: D / 16, rounded up.
            bias: Of the projections in and out.
            conv_bias: Of the convolution.
            layer_index: Under which a decode state keeps this layer's memory.
        """
        super().__init__()
        self.layer_index, self.inner_size, self.state_size = layer_index, inner_size, state_size
        self.step_rank = step_rank or -(-hidden_size // 16)
        self.in_proj = nn.Linear(hidden_size, 2 * inner_size, bias=bias)
        self.conv = CausalConv(inner_size, num_taps, bias=conv_bias)
        self.select = nn.Linear(inner_size, self.step_rank + 2 * state_size, bias=False)
        self.step = StepProjection(self.step_rank, inner_size)
        self.A_log = nn.Parameter(torch.empty(inner_size, state_size))
        self.D = nn.Parameter(torch.empty(inner_size))
        self.out_proj = nn.Linear(inner_size, hidden_size, bias=bias)

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Set A to -1 .. -N in every channel (S4D-real) and D to one."""
        self.A_log.copy_(torch.arange(1, self.state_size + 1).log().expand(self.inner_size, -1))
        self.D.fill_(1.0)

    def steps_and_gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return dt (B, T, I), B (B, T, N) and C (B, T, N) of the inputs (B, T, I)."""
        low, B, C = self.select(x).split([self.step_rank, self.state_size, self.state_size], dim=-1)
        return F.softplus(self.step(low).float()), B, C

    def forward(self, x: Tensor, *, state: Any = None, segments: Segments = WHOLE) -> Tensor:
        """Map (B, T, D) to (B, T, D); ``state`` is a `DecodeState` or None."""
        memory = None if state is None else state.memory(self.layer_index)
        x, gate = self.in_proj(x).chunk(2, dim=-1)  # (B, T, I) each
        x = F.silu(self.conv(x, memory=memory, segments=segments))
        dt, B, C = self.steps_and_gates(x)
        if segments.is_token is not None:
            dt = dt * segments.is_token[..., None]
        A = -torch.exp(self.A_log.float())
        before = None if memory is None else memory.get("ssm")
        y, after = selective_scan(x, dt, A, B, C, state=before, starts=segments.resets)
        if memory is not None:
            memory["ssm"] = after
        y = y + self.D.float() * x
        return self.out_proj((y * F.silu(gate)).to(gate.dtype))


class TimeInvariantMixer(MambaMixer):
    """The same layer with one dt, B and C for all tokens, as in S4: the control that cannot choose what to keep."""

    def __init__(self, hidden_size: int, inner_size: int, state_size: int = 16, *, layer_index: int = 0):
        super().__init__(hidden_size, inner_size, state_size, layer_index=layer_index)
        del self.select, self.step
        self.dt_bias = nn.Parameter(torch.empty(inner_size))
        self.B, self.C = nn.Parameter(torch.empty(state_size)), nn.Parameter(torch.empty(state_size))

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Draw dt as the selective layer's; B is one and C normal, as in S4D."""
        super().reset_own_parameters(generator)
        self.dt_bias.copy_(inverse_softplus_steps(self.inner_size, generator))
        self.B.fill_(1.0)
        self.C.copy_(torch.empty(self.state_size).normal_(generator=generator))

    def steps_and_gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the constant dt (B, T, I), B (B, T, N) and C (B, T, N)."""
        shape = (*x.shape[:2], -1)
        return F.softplus(self.dt_bias.float()).expand(shape), self.B.expand(shape), self.C.expand(shape)
