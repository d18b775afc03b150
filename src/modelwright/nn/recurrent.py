"""Recurrent layers written out: the plain RNN, the LSTM and the GRU.

Each reads x_1 .. x_T one after the other and carries h_t (and the LSTM c_t) along. W is applied to the input, R to the
state, each with its bias, in the order and layout of torch's weight_ih, weight_hh, bias_ih and bias_hh, so that
either's numbers can be put into the other.

    RNN     h' = tanh(W x + R h)
    LSTM    i, f, o = sigmoid(W x + R h)    g = tanh(W x + R h)     c' = f c + i g      h' = o tanh(c')
    GRU     r, z = sigmoid(W x + R h)       n = tanh(W x + r (R h)) h' = (1 - z) n + z h

Source: Elman 1990; Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000; Cho et al. 2014,
arXiv:1406.1078, with the reset gate behind the product, as cuDNN has it. Not done: peepholes, projections, a fused
kernel: the loop over time is the point here.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.base.registry import lookup
from modelwright.nn import RECURRENT_CELLS

Carried = dict[str, Tensor]  # name -> (B, H): what a layer takes from one step to the next


class RecurrentLayer(nn.Module):
    """One layer of some cell over a whole sequence; a cell gives `num_gates`, `carries` and `step`.

    Args:
        input_size: D.
        hidden_size: H.
        layer_index: Its place in a model, under which a decode state keeps what it carries.
        memory_len: For gated cells, how many steps they should remember at first (chrono initialisation, Tallec &
            Ollivier 2018, arXiv:1804.11188). None: an LSTM's forget gates start with bias 1 (Jozefowicz et al. 2015).
    """

    num_gates = 1
    carries: tuple[str, ...] = ("h",)

    def __init__(self, input_size: int, hidden_size: int, *, layer_index: int = 0, memory_len: int | None = None):
        super().__init__()
        if memory_len is not None and memory_len < 3:
            raise ConfigError(f"memory_len is {memory_len}; expected a number of steps from 3 up, or None.")
        self.hidden_size, self.layer_index, self.memory_len = hidden_size, layer_index, memory_len
        rows = self.num_gates * hidden_size
        self.input_weight = nn.Parameter(torch.empty(rows, input_size))  # W
        self.hidden_weight = nn.Parameter(torch.empty(rows, hidden_size))  # R
        self.input_bias = nn.Parameter(torch.empty(rows))
        self.hidden_bias = nn.Parameter(torch.empty(rows))

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Draw all weights uniformly from -1 / sqrt(H) .. 1 / sqrt(H), as torch does, then set the gates' biases."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters(recurse=False):
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        self._reset_gates(generator)

    def _reset_gates(self, generator: torch.Generator) -> None:
        if self.memory_len is not None:
            raise ConfigError(f"memory_len is {self.memory_len}, but a plain RNN has no gates. Leave it out.")

    def _draw_lags(self, generator: torch.Generator) -> Tensor:
        """Gate biases (H,) under which units forget over 1 .. memory_len steps."""
        assert self.memory_len is not None
        return torch.empty(self.hidden_size).uniform_(1, self.memory_len - 1, generator=generator).log()

    def step(self, from_input: Tensor, carried: Carried) -> Carried:
        """Return what is carried on, given W x + b (B, G H) of one step."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: Any = None, starts: Tensor | None = None) -> Tensor:
        """Map (B, T, D) to (B, T, H), every h_t.

        Args:
            x: The input.
            state: A `DecodeState` to take up the past from and to leave it in, or None to start from zeros.
            starts: (B, T), True where a new sequence starts and the past is forgotten. None: nowhere.
        """
        memory: Carried = {} if state is None else state.memory(self.layer_index)
        carried = dict(memory) or {name: x.new_zeros(x.shape[0], self.hidden_size) for name in self.carries}
        from_input = nn.functional.linear(x, self.input_weight, self.input_bias)  # (B, T, G H): of all steps at once
        outputs = []
        for t in range(x.shape[1]):
            if starts is not None:
                carried = {name: v.masked_fill(starts[:, t, None], 0.0) for name, v in carried.items()}
            carried = self.step(from_input[:, t], carried)
            outputs.append(carried["h"])
        if state is not None:
            memory.update(carried)
        return torch.stack(outputs, 1)  # (B, T, H)

    def from_state(self, h: Tensor) -> Tensor:
        """R h + b, (B, G H)."""
        return nn.functional.linear(h, self.hidden_weight, self.hidden_bias)


class RNN(RecurrentLayer):
    """h' = tanh(W x + R h)."""

    def step(self, from_input: Tensor, carried: Carried) -> Carried:
        """Return {h: (B, H)}."""
        return {"h": torch.tanh(from_input + self.from_state(carried["h"]))}


class LSTM(RecurrentLayer):
    """Gates i, f, g, o; c is changed by addition alone, so that its gradient need not vanish."""

    num_gates = 4
    carries = ("h", "c")

    def _reset_gates(self, generator: torch.Generator) -> None:
        size = self.hidden_size
        self.hidden_bias[: 2 * size] = 0.0  # the gates' bias is the sum of two; one of them carries it
        if self.memory_len is None:
            self.input_bias[size : 2 * size] = 1.0
        else:
            lags = self._draw_lags(generator)
            self.input_bias[:size], self.input_bias[size : 2 * size] = -lags, lags

    def step(self, from_input: Tensor, carried: Carried) -> Carried:
        """Return {h: (B, H), c: (B, H)}."""
        i, f, g, o = (from_input + self.from_state(carried["h"])).chunk(4, -1)  # (B, H) each
        c = torch.sigmoid(f) * carried["c"] + torch.sigmoid(i) * torch.tanh(g)
        return {"h": torch.sigmoid(o) * torch.tanh(c), "c": c}


class GRU(RecurrentLayer):
    """Gates r, z and the new state n."""

    num_gates = 3

    def _reset_gates(self, generator: torch.Generator) -> None:
        if self.memory_len is not None:
            gate = slice(self.hidden_size, 2 * self.hidden_size)
            self.input_bias[gate], self.hidden_bias[gate] = self._draw_lags(generator), 0.0

    def step(self, from_input: Tensor, carried: Carried) -> Carried:
        """Return {h: (B, H)}."""
        h = carried["h"]
        xr, xz, xn = from_input.chunk(3, -1)  # (B, H) each
        hr, hz, hn = self.from_state(h).chunk(3, -1)
        z = torch.sigmoid(xz + hz)
        n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        return {"h": (1 - z) * n + z * h}


def make_recurrent(
    cell: str,
    input_size: int,
    hidden_size: int,
    num_layers: int,
    *,
    memory_len: int | None = None,
    first_index: int = 0,
) -> list[RecurrentLayer]:
    """Return ``num_layers`` layers of the cell called ``cell``, the first reading ``input_size`` numbers."""
    kind = lookup(RECURRENT_CELLS, cell, "cell")
    sizes = [input_size] + [hidden_size] * (num_layers - 1)
    return [kind(size, hidden_size, layer_index=first_index + i, memory_len=memory_len) for i, size in enumerate(sizes)]


def starts_from_mask(mask: Tensor) -> Tensor:
    """Return (B, T), True where a token may not see the one before it, from an attention mask (B, 1, T, T).

    That is where a packed document begins, and the first token behind padding on the left.

    >>> starts_from_mask(torch.block_diag(torch.ones(2, 2), torch.ones(1, 1)).bool()[None, None])
    tensor([[False, False,  True]])
    """
    before = torch.diagonal(mask[:, 0], -1, 1, 2)  # (B, T - 1): may t see t - 1?
    return nn.functional.pad(~before, (1, 0))
