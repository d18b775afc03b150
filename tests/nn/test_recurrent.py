"""Recurrent cells: equal to torch's own, in any split into steps, and what memory_len is for."""

import pytest
import torch
from torch import nn

from modelwright.base.errors import ConfigError
from modelwright.nn import RECURRENT_CELLS
from modelwright.nn.decode_state import KVState
from modelwright.nn.init import init_weights
from modelwright.nn.recurrent import make_recurrent, starts_from_mask

NAMES = {
    "input_weight": "weight_ih",
    "hidden_weight": "weight_hh",
    "input_bias": "bias_ih",
    "hidden_bias": "bias_hh",
}


def make_twins(cell, num_layers=2):
    torch.manual_seed(0)
    theirs = getattr(nn, cell.upper())(5, 7, num_layers, batch_first=True)
    ours = nn.ModuleList(make_recurrent(cell, 5, 7, num_layers))
    for i, layer in enumerate(ours):
        for mine, name in NAMES.items():
            getattr(layer, mine).data.copy_(getattr(theirs, f"{name}_l{i}"))
    return ours, theirs


def read(layers, x, *arguments):
    for layer in layers:
        x = layer(x, *arguments)
    return x


@pytest.mark.parametrize("cell", RECURRENT_CELLS)
def test_outputs_and_gradients_equal_those_of_torch(cell):
    ours, theirs = make_twins(cell)
    x = torch.randn(3, 80, 5)
    expected = theirs(x)[0]
    found = read(ours, x)
    assert torch.allclose(found, expected, atol=1e-5)
    (found**2).sum().backward()
    (expected**2).sum().backward()
    for i, layer in enumerate(ours):
        for mine, name in NAMES.items():
            assert torch.allclose(getattr(layer, mine).grad, getattr(theirs, f"{name}_l{i}").grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cell", RECURRENT_CELLS)
def test_any_split_into_steps_equals_the_whole(cell):
    ours, theirs = make_twins(cell)
    x = torch.randn(2, 30, 5)
    whole = read(ours, x)
    for sizes in ([1] * 30, [7, 1, 22], [29, 1]):
        state = KVState(batch_size=2, max_seq_len=30)
        pieces = [read(ours, piece, state) for piece in x.split(sizes, 1)]
        assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-6)
    last = theirs(x)[1]
    assert torch.allclose(state.memory(1)["h"], (last[0] if cell == "lstm" else last)[1], atol=1e-5)


@pytest.mark.parametrize("cell", RECURRENT_CELLS)
def test_a_start_forgets_the_past(cell):
    ours, _ = make_twins(cell)
    x = torch.randn(2, 9, 5)
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[0, 4] = True
    found = read(ours, x, None, starts)
    assert torch.allclose(found[0, 4:], read(ours, x[:1, 4:])[0], atol=1e-6)
    assert torch.allclose(found[1], read(ours, x[1:])[0], atol=1e-6)
    assert not torch.allclose(found[0, 4:], read(ours, x)[0, 4:], atol=1e-3)


def test_starts_stand_where_the_token_before_is_hidden():
    packed = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()[None, None]
    assert starts_from_mask(packed).tolist() == [[False, False, True, False, False]]


def test_first_weights_come_from_the_seed_and_gates_are_biased():
    lstm, gru = (init_weights(make_recurrent(cell, 4, 16, 1, memory_len=50)[0], 1) for cell in ("lstm", "gru"))
    again = init_weights(make_recurrent("lstm", 4, 16, 1, memory_len=50)[0], 1)
    assert all(torch.equal(a, b) for a, b in zip(lstm.parameters(), again.parameters(), strict=True))
    keep = torch.sigmoid((lstm.input_bias + lstm.hidden_bias)[16:32])
    assert (1 / (1 - keep)).min() >= 2 and 10 < (1 / (1 - keep)).max() <= 50  # steps until a unit has forgotten
    assert torch.sigmoid((gru.input_bias + gru.hidden_bias)[16:32]).max() > 0.9
    plain = init_weights(make_recurrent("lstm", 4, 16, 1)[0], 1)
    assert (plain.input_bias + plain.hidden_bias)[16:32].tolist() == [1.0] * 16


def test_refusals():
    with pytest.raises(ConfigError, match="cell is 'lstmm'; known: gru, lstm, rnn. Did you mean 'lstm'?"):
        make_recurrent("lstmm", 4, 4, 1)
    with pytest.raises(ConfigError, match="memory_len is 2"):
        make_recurrent("lstm", 4, 4, 1, memory_len=2)
    with pytest.raises(ConfigError, match="a plain RNN has no gates"):
        init_weights(make_recurrent("rnn", 4, 4, 1, memory_len=9)[0], 0)
