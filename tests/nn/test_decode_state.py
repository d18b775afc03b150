"""Choosing rows of a state, as beam search does after every step."""

import pytest
import torch

from modelwright.base.errors import RequestError
from modelwright.nn.attention import AttentionRule
from modelwright.nn.decode_state import KVState


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("window", [None, 3])
def test_rows_of_a_state_go_where_they_are_sent(window):
    rule = AttentionRule(window=window)
    past, new = draw(3, 5, 2, 4), draw(3, 1, 2, 4)
    rows = torch.tensor([2, 0, 2])
    chosen, plain = (KVState(batch_size=3, max_seq_len=8) for _ in range(2))
    chosen.attend(0, past, past, past, 0.5, rule=rule)
    chosen.memory(1)["kept"] = past
    chosen.select_rows(rows)
    plain.attend(0, past[rows], past[rows], past[rows], 0.5, rule=rule)
    mine = chosen.attend(0, new, new, new, 0.5, rule=rule)
    assert torch.equal(mine, plain.attend(0, new, new, new, 0.5, rule=rule))
    assert torch.equal(chosen.memory(1)["kept"], past[rows])


def test_another_number_of_rows_is_refused():
    with pytest.raises(RequestError, match="holds 3 sequences"):
        KVState(batch_size=3, max_seq_len=8).select_rows(torch.tensor([0, 1]))
