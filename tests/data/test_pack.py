"""Rows hold what the texts hold, and a loader can be taken up anywhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.base.errors import DataError
from modelwright.data.load import RowLoader, block_causal_mask, repeat_rows
from modelwright.data.pack import IGNORED, document_positions, pack_rows, stream_rows

EXAMPLES = st.lists(
    st.integers(2, 14).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(1, 50), min_size=n, max_size=n), st.lists(st.booleans(), min_size=n, max_size=n)
        )
    ),
    min_size=1,
    max_size=30,
)


@given(EXAMPLES)
def test_every_token_to_learn_is_in_exactly_one_row(examples):
    fitting = [(ids, mask) for ids, mask in examples if len(ids) <= 11 and any(mask[1:])]
    if not fitting:
        with pytest.raises(DataError, match="None of the"):
            pack_rows(examples, 10, 0)
        return
    rows = pack_rows(examples, 10, 0)
    wanted = sorted(i for ids, mask in fitting for i, m in zip(ids[1:], mask[1:], strict=True) if m)
    assert sorted(rows.labels[rows.labels != IGNORED].tolist()) == wanted
    assert rows.num_examples == len(fitting) and rows.num_dropped == len(examples) - len(fitting)
    assert (rows.labels[rows.document_ids == -1] == IGNORED).all()
    found = []
    for row in range(len(rows)):
        for number in range(rows.document_ids[row].max() + 1):
            found.append(rows.input_ids[row][rows.document_ids[row] == number].tolist())
    assert sorted(found) == sorted(ids[:-1] for ids, _ in fitting)


def test_best_fit_wastes_little():
    lengths = [7, 3, 5, 5, 8, 2, 10, 4, 6]
    rows = pack_rows([(list(range(1, n + 2)), [True] * (n + 1)) for n in lengths], 10, 0)
    assert len(rows) == 5  # 50 positions in rows of 10: no row could be saved


def test_stream_uses_each_position_once_and_differs_by_seed():
    documents = [np.arange(1, 30), np.arange(100, 170)]
    rows = stream_rows(documents, 8, 0, seed=3)
    assert (rows.labels != IGNORED).all()
    assert np.array_equal(rows.input_ids[:, 1:], rows.labels[:, :-1])
    again, other = stream_rows(documents, 8, 0, seed=3), stream_rows(documents, 8, 0, seed=4)
    assert np.array_equal(rows.input_ids, again.input_ids) and not np.array_equal(rows.input_ids, other.input_ids)
    with pytest.raises(DataError, match="one row needs 501"):
        stream_rows(documents, 500, 0, seed=0)


@pytest.mark.parametrize("stop", range(1, 12))
def test_loader_goes_on_exactly_from_any_point_across_epochs(stop):
    def loader():
        return RowLoader(lambda epoch: stream_rows([np.arange(1, 100)], 8, 0, seed=epoch), 3)

    whole = loader()
    batches = [whole.next_batch().input_ids for _ in range(12)]
    first = loader()
    for _ in range(stop):
        first.next_batch()
    second = loader()
    second.load_state(first.state())
    for expected in batches[stop:]:
        assert second.next_batch().input_ids.equal(expected)


def test_mask_and_positions_keep_documents_apart():
    ids = np.array([[0, 0, 1, 1, -1]], dtype=np.int32)
    assert document_positions(ids).tolist() == [[0, 1, 0, 1, 0]]
    allowed = block_causal_mask(ids)[0, 0].int().tolist()
    assert allowed == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


def test_repeated_rows_come_in_another_order_each_epoch():
    rows = pack_rows([([i, i + 1, i + 2], [True] * 3) for i in range(1, 40)], 2, 0)
    make = repeat_rows(rows, seed=0)
    one, two = make(0).input_ids, make(1).input_ids
    assert not np.array_equal(one, two) and sorted(one.tolist()) == sorted(two.tolist())


def test_a_batch_larger_than_the_data_is_told_and_cut(caplog):
    loader = RowLoader(lambda epoch: stream_rows([np.arange(1, 30)], 8, 0, seed=epoch), 512)
    num_rows = len(stream_rows([np.arange(1, 30)], 8, 0, seed=0))
    assert loader.batch_size == len(loader.next_batch().input_ids) == num_rows < 512
    assert f"has {num_rows} rows, and a micro-batch of 512 was asked for" in caplog.text
