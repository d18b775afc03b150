"""The first batches in colour: of every kind of batch, what is trained stands out, and nothing else does."""

import torch

from modelwright.cli.train_batches import TRAINED, show_batch
from modelwright.data.examples import GroupBatch, PairBatch, SeriesBatch, TextBatch
from modelwright.data.load import Batch
from modelwright.data.pack import IGNORED


class Letters:
    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids)


def trained(batch):
    """Return for each row that is shown what is said of it, and the parts of it that are trained."""
    rows = show_batch(Letters(), batch)
    return [(r.plain.strip(), [r.plain[s.start : s.end] for s in r.spans if s.style == TRAINED]) for r in rows]


IDS = torch.tensor([[1, 2, 3, 4, 5]] * 3)
MASK = torch.tensor([[1, 1, 1, 1, 0]] * 3)


def test_a_label_is_that_of_the_next_token():
    labels = torch.tensor([[IGNORED, IGNORED, 4, 5, 6]] * 3)
    assert trained(Batch(IDS, labels)) == [("abcde", ["de"])] * 2  # two rows are enough


def test_a_hidden_token_is_trained_in_its_own_place():
    labels = torch.tensor([[IGNORED, 9, IGNORED, 9, IGNORED]] * 3)
    assert trained(TextBatch(IDS, labels, MASK)) == [("abcd", ["b", "d"])] * 2


def test_a_class_and_numbers_stand_behind_the_text():
    assert trained(TextBatch(IDS, torch.tensor([0, 1, 2]), MASK)) == [("abcd -> 0", ["0"]), ("abcd -> 1", ["1"])]
    assert trained(TextBatch(IDS, torch.full((3, 1), 0.5), MASK))[0] == ("abcd -> [0.5]", ["[0.5]"])


def test_of_a_pair_the_target_is_trained_even_where_it_is_as_long_as_the_source():
    labels = torch.tensor([[7, 8, 9, IGNORED, IGNORED]] * 3)
    assert trained(PairBatch(IDS, labels, MASK, labels))[0] == ("abcd -> ghi", ["ghi"])


def test_groups_are_read_and_a_series_is_no_text():
    assert trained(GroupBatch(torch.stack((IDS, IDS), 1), torch.stack((MASK, MASK), 1)))[0] == ("abcd | abcd", [])
    assert trained(SeriesBatch(torch.zeros(2, 3), torch.zeros(2))) == []
