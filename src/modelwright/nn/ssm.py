"""Selective state spaces (Mamba): a linear recurrence whose step, input and output depend on the token.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        h: one state of N numbers per channel
    y_t = C_t h_t + D x_t

A is negative, so every decay exp(dt A) lies in (0, 1]. `selective_scan_sequential` is this recurrence, one token after
the other. `selective_scan` computes the same in fewer steps: the tokens are cut into chunks; step q walks through all
chunks at once, each from an empty state; from what the chunks made, their true first states follow one from the other;
then all chunks are walked through again. Nothing is ever divided by a product of decays, which would overflow: all
exponents are at most zero. Of the states, only the chunks' first ones are kept for the backward pass, which walks
through the chunks anew (the paper's recomputation).

A document's start sets the decay to zero; padding has dt = 0, which leaves the state as it is.

Source: Gu and Dao 2023, "Mamba", arXiv 2312.00752: algorithm 2, sections 3.3.2 (recomputation) and 3.6 (first values),
equations 1 and 2 (A by zero-order hold, B by Euler's step, as in its code). Not here: complex A, the fused CUDA
kernel, second derivatives. B batch, T tokens, D hidden, I inner channels, N state size, R rank of the projection to
dt, Q chunk, M chunks of all rows.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modelwright.nn.past import WHOLE, CausalConv, Segments

# A step on the CPU over fewer numbers than this costs more to start than to do.
MIN_STEP_NUMBERS = 16384
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
    h = torch.zeros(x.shape[0], *A.shape, device=x.device) if state is None else state.float()  # (B, I, N)
    outputs = []
    for t, (x_t, dt_t, B_t, C_t) in enumerate(zip(*(v.float().unbind(1) for v in (x, dt, B, C)), strict=True)):
        decay = torch.exp(dt_t[..., None] * A.float())  # (B, I, N)
        if starts is not None:
            decay = decay * ~starts[:, t, None, None]
        h = decay * h + (dt_t * x_t)[..., None] * B_t[:, None]
        outputs.append((h * C_t[:, None]).sum(-1))  # (B, I)
    return torch.stack(outputs, dim=1), h


# A compiler would unroll the loops into thousands of operations: 40 s for 12 tokens of one layer.
@torch.compiler.disable
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
        chunk_size: Q; None: chosen by the device and the sizes, at least sqrt(T), where the steps are fewest.

    Returns:
        y (B, T, I) and the state after the last token (B, I, N), both float32.
    """
    batch, length, inner = x.shape
    size = chunk_size or _chunk_size(x, A)
    count = -(-length // size)
    first = torch.zeros(batch, *A.shape, device=x.device) if state is None else state.float()
    first = first.transpose(1, 2).contiguous()  # (B, N, I)

    def cut(values: Tensor) -> Tensor:  # (Q, B count, .); the tail is filled with dt = 0, x = 0: inert
        values = F.pad(values, (0, 0, 0, count * size - length))
        return values.unflatten(1, (count, size)).movedim(2, 0).flatten(1, 2).contiguous()

    keep = None if starts is None else 1 - cut(starts.float()[..., None])
    dt, inputs = dt.float(), (dt * x).float()
    rates = A.float().t().contiguous()
    y, last = _Scan.apply(cut(inputs), cut(dt), rates, cut(B.float()), cut(C.float()), first, keep)
    y = y.unflatten(1, (batch, count)).movedim(0, 2)  # (B, count, Q, I)
    return y.reshape(batch, count * size, inner)[:, :length], last.transpose(1, 2)


def _chunk_size(x: Tensor, A: Tensor) -> int:
    """Choose Q. On a GPU few steps matter; on a CPU one step is worth its start once it fills the first caches."""
    batch, length, _ = x.shape
    fewest_steps = math.isqrt(max(length - 1, 0)) + 1
    if x.device.type != "cpu":
        return fewest_steps
    count = max(1, MIN_STEP_NUMBERS // (batch * A.numel()))
    return max(fewest_steps, -(-length // count))


def _decay(dt: Tensor, A: Tensor, keep: Tensor | None, q: int) -> Tensor:
    """Return the decay (M, N, I) at token q of every chunk."""
    decay = torch.mul(dt[q][:, None], A).exp_()
    return decay if keep is None else decay.mul_(keep[q][..., None])


class _Scan(torch.autograd.Function):
    """The recurrence over chunks: inputs dt x (Q, M, I), dt (Q, M, I), A (N, I), B, C (Q, M, N), state (B, N, I), keep.

    Channels stand last here, so that products run along them: reading 4 states of 256 x 16 takes 5 us on one CPU thread
    instead of 30.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *more: Tensor) -> Any:
        """Return y (Q, M, I) and the last state (B, N, I)."""
        state, keep = more
        batch, count = state.shape[0], dt.shape[1] // state.shape[0]
        whole = torch.exp(dt.sum(0)[:, None] * A)  # (M, N, I) decay over a whole chunk
        if keep is not None:
            whole.mul_(keep.prod(0)[..., None])
        whole = whole.unflatten(0, (batch, count))
        first = state
        if count > 1:
            made = torch.zeros(dt.shape[1], *A.shape, device=dt.device)
            for q in range(dt.shape[0]):
                made.mul_(_decay(dt, A, keep, q)).addcmul_(inputs[q][:, None], B[q][..., None])
            made = made.unflatten(0, (batch, count))
            before = [state]
            for c in range(count - 1):
                before.append(torch.addcmul(made[:, c], whole[:, c], before[-1]))
            first = torch.stack(before, dim=1).flatten(0, 1)  # (M, N, I)
        h, y = first.clone(), torch.empty_like(inputs)
        for q in range(dt.shape[0]):
            h.mul_(_decay(dt, A, keep, q)).addcmul_(inputs[q][:, None], B[q][..., None])
            torch.bmm(C[q][:, None], h, out=y[q][:, None])
        ctx.save_for_backward(inputs, dt, A, B, C, first, whole, keep)
        return y, h.unflatten(0, (batch, count))[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> Any:
        """Walk forward again for the states, then backward for the gradients."""
        inputs, dt, A, B, C, first, whole, keep = ctx.saved_tensors
        batch, count = whole.shape[:2]
        h, states, decays = first, [first], []
        for q in range(dt.shape[0]):
            decays.append(_decay(dt, A, keep, q))
            h = torch.mul(h, decays[q]).addcmul_(inputs[q][:, None], B[q][..., None])
            states.append(h)

        grad_y = grad_y.contiguous()
        g = grad_last.clone()  # gradient of the state
        if count > 1:  # first what comes from inside each chunk, then what comes from the chunks after it
            g = torch.zeros_like(first)
            for q in reversed(range(dt.shape[0])):
                g.addcmul_(grad_y[q][:, None], C[q][..., None]).mul_(decays[q])
            own, after = g.unflatten(0, (batch, count)), [grad_last]
            for c in reversed(range(1, count)):
                after.append(torch.addcmul(own[:, c], whole[:, c], after[-1]))
            g = torch.stack(after[::-1], dim=1).flatten(0, 1)

        grad_inputs, grad_dt, grad_A = torch.empty_like(inputs), torch.empty_like(dt), torch.zeros_like(g)
        grad_B, grad_C, product = torch.empty_like(B), torch.empty_like(C), torch.empty_like(g)
        for q in reversed(range(dt.shape[0])):
            torch.sum(torch.mul(states[q + 1], grad_y[q][:, None], out=product), -1, out=grad_C[q])
            g.addcmul_(grad_y[q][:, None], C[q][..., None])
            torch.bmm(B[q][:, None], g, out=grad_inputs[q][:, None])
            torch.sum(torch.mul(g, inputs[q][:, None], out=product), -1, out=grad_B[q])
            g.mul_(decays[q])
            exponent = states[q] * g  # (M, N, I) gradient of dt A
            grad_A.addcmul_(exponent, dt[q][:, None])
            torch.sum(exponent.mul_(A), 1, out=grad_dt[q])
        grad_state = g.unflatten(0, (batch, count))[:, 0].clone()
        return grad_inputs, grad_dt, grad_A.sum(0), grad_B, grad_C, grad_state, None


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
