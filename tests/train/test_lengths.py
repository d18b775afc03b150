"""Length warm-up: rows are cut, tokens stay, and attention does not leave a piece."""

import numpy as np
import pytest
import torch
from tests.train.test_loop import plain_loop, stream_loader, tiny_model

from modelwright.base.errors import ConfigError
from modelwright.data.load import Batch, block_causal_mask
from modelwright.train.lengths import LengthConfig, cut_rows, length_at
from modelwright.train.loop import train
from modelwright.train.objective import CausalLanguageModeling


def test_a_batch_keeps_its_tokens_and_every_piece_is_a_row():
    ids = torch.arange(16).view(2, 8)
    cut = cut_rows(Batch(ids, ids + 1), 4)
    assert cut.input_ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert torch.equal(cut.labels, cut.input_ids + 1) and cut.mask is None
    assert cut_rows(cut, 4) is cut


def test_the_mask_of_a_piece_is_the_block_on_the_diagonal():
    documents = np.array([[0, 0, 0, 1, 1, 1, 1, 1], [0] * 8])
    mask = block_causal_mask(documents)
    cut = cut_rows(Batch(torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.long), None, mask), 4)
    assert torch.equal(
        cut.mask, torch.cat([mask[:1, :, :4, :4], mask[:1, :, 4:, 4:], mask[1:, :, :4, :4], mask[1:, :, 4:, 4:]])
    )


def test_rows_grow_and_the_loop_sees_it():
    seen = []

    class Watching(CausalLanguageModeling):
        def loss(self, model, batch):
            seen.append(tuple(batch.input_ids.shape))
            return super().loss(model, batch)

    config = plain_loop(num_steps=7, lengths=LengthConfig(4, 6))
    run = train(tiny_model(), Watching(), stream_loader(4), config)
    assert seen == [(16, 4)] * 2 + [(8, 8)] * 2 + [(4, 16)] * 3
    assert len(run.losses) == 7


def test_a_first_length_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="first_len is 5 and rows have 16 tokens"):
        length_at(0, 16, LengthConfig(5, 10))
    with pytest.raises(ConfigError, match="first_len is 12"):
        length_at(0, 36, LengthConfig(12, 10))
    with pytest.raises(ConfigError, match="at least 1"):
        LengthConfig(0)
