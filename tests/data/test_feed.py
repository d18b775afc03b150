"""Every sample comes once an epoch over all ranks, and a run goes on exactly with other ranks and workers."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.base.errors import CheckpointError, ConfigError, DataError
from modelwright.data.feed import Epochs, Feed, HeldRows, shuffled
from modelwright.data.load import RowLoader
from modelwright.data.mix import Mixture, count_epochs, mixing_weights
from modelwright.data.pack import Rows, pack_rows
from modelwright.train.loop import Loader


def numbered(num: int, first: int = 0) -> HeldRows:
    ids = np.arange(first, first + num)[:, None].repeat(2, axis=1)
    return HeldRows(Rows(ids, ids.copy()))


def feed(num: int, batch_size: int = 1, **where: int) -> Feed:
    return Feed([numbered(num)], Epochs(shuffled(num, 7)), batch_size, **where)


def ids_of(loader: Loader, num_batches: int) -> list[int]:
    return [int(i) for _ in range(num_batches) for i in loader.next_batch().input_ids[:, 0]]


def taken_by_all(num: int, batch_size: int, num_ranks: int, num_steps: int, state=None, num_workers=0) -> tuple:
    """The samples of all ranks in the order of the global batches, and the state after them."""
    feeds = [
        feed(num, batch_size, rank=rank, num_ranks=num_ranks, num_workers=num_workers) for rank in range(num_ranks)
    ]
    for one in feeds:
        if state is not None:
            one.load_state(state)
    stream = [i for _ in range(num_steps) for one in feeds for i in ids_of(one, 1)]
    states = [one.state() for one in feeds]
    for one in feeds:
        one.close()
    assert all(one == states[0] for one in states), "every rank knows the place of all"
    return stream, states[0]


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6))
@settings(max_examples=80, deadline=None)
def test_over_the_ranks_every_sample_comes_exactly_once_an_epoch(num, batch_size, num_ranks):
    num_steps = -(-3 * num // (batch_size * num_ranks))
    stream, _ = taken_by_all(num, batch_size, num_ranks, num_steps)
    for epoch in range(3):
        assert sorted(stream[epoch * num : (epoch + 1) * num]) == list(range(num))
    assert num < 6 or stream[:num] != stream[num : 2 * num], "each epoch has an order of its own"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_that_another_rank_takes_is_passed_over(num_workers):
    plain, skipping = feed(11, 2), feed(11, 2, num_workers=num_workers)
    expected = [ids_of(plain, 1) for _ in range(8)]
    found = []
    for number in range(8):
        if number % 3:
            skipping.skip_batch()
        else:
            found.append(ids_of(skipping, 1))
    assert found == expected[::3] and skipping.state() == plain.state()
    skipping.close()


@given(st.integers(1, 30), st.data())
@settings(max_examples=60, deadline=None)
def test_a_run_goes_on_exactly_with_other_ranks_and_batch_sizes(num, data):
    stream: list[int] = []
    state = None
    for _ in range(4):
        batch_size, num_ranks = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
        part, state = taken_by_all(num, batch_size, num_ranks, data.draw(st.integers(0, 6)), state)
        state = json.loads(json.dumps(state))
        stream += part
    assert stream == ids_of(feed(num), len(stream))


@pytest.mark.parametrize("stop", [0, 1, 5, 6, 7, 13])
def test_a_run_goes_on_exactly_with_another_number_of_workers(stop):
    expected = ids_of(feed(13, 2), 20)
    first = feed(13, 2, num_workers=3)
    before = ids_of(first, stop)
    state = first.state()
    first.close()
    second = feed(13, 2, num_workers=1)
    assert ids_of(second, 3) == expected[:6]
    second.load_state(state)
    assert before + ids_of(second, 20 - stop) == expected
    second.close()


def test_a_feed_of_one_rank_stands_where_a_row_loader_does():
    rows = pack_rows([([i, i + 1, i + 2], [True] * 3) for i in range(1, 9)], 4, 0)
    plain = RowLoader(lambda _: rows, 2)
    fed = Feed([HeldRows(rows)], Epochs(lambda _: np.arange(len(rows))), 2)
    for _ in range(5):
        one, other = plain.next_batch(), fed.next_batch()
        assert one.input_ids.equal(other.input_ids) and one.labels.equal(other.labels)
        assert one.positions.equal(other.positions) and one.mask.equal(other.mask)
    assert set(fed.state()) == set(plain.state())


def test_wrong_settings_and_states_are_refused():
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        feed(5, rank=2, num_ranks=2)
    with pytest.raises(CheckpointError, match=r"entries a.taken; this feed has epoch, row"):
        feed(5).load_state({"a.taken": 3})
    with pytest.raises(DataError, match="Epoch 0 has no row"):
        feed(0).next_batch()


# -- mixtures ------------------------------------------------------------------------------------------------------

SIZES = {"web": 17, "books": 5, "code": 3}


def mixed(weights=None, batch_size: int = 4, **where: int) -> Feed:
    orders = {name: shuffled(size, number) for number, (name, size) in enumerate(SIZES.items())}
    sources = [numbered(size, 100 * number) for number, size in enumerate(SIZES.values())]
    return Feed(sources, Mixture(orders, weights or mixing_weights(SIZES)), batch_size, **where)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(1, 400))
@settings(max_examples=80, deadline=None)
def test_shares_are_kept_at_every_place(weights, num):
    shares = mixing_weights({str(i): w for i, w in enumerate(weights)})
    mixture = Mixture({name: shuffled(3, 0) for name in shares}, shares)
    picks, state = mixture.advance(mixture.start(), num)
    for number, (name, share) in enumerate(shares.items()):
        came = np.cumsum(picks[:, 0] == number)
        assert abs(came - share * np.arange(1, num + 1)).max() < (1.0001 if len(weights) <= 2 else 3)
        assert state[f"{name}.taken"] == came[-1] == 3 * state[f"{name}.epoch"] + state[f"{name}.row"]


def test_a_mixture_goes_on_exactly_with_other_ranks():
    whole = ids_of(mixed(), 30)
    first = mixed()
    assert ids_of(first, 5) == whole[:20]
    parts = [mixed(batch_size=2, rank=rank, num_ranks=5) for rank in range(5)]
    for one in parts:
        one.load_state(json.loads(json.dumps(first.state())))
    assert [i for _ in range(10) for one in parts for i in ids_of(one, 1)] == whole[20:]


def test_each_source_comes_once_in_each_of_its_own_epochs():
    stream = ids_of(mixed({"web": 1, "books": 1, "code": 1}), 60)
    for number, size in enumerate(SIZES.values()):
        own = [i - 100 * number for i in stream if i // 100 == number]
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_temperature_goes_from_the_sizes_to_all_equal():
    sizes = {"a": 1e300, "b": 1e299}
    assert mixing_weights(sizes)["a"] == pytest.approx(10 / 11)
    assert mixing_weights(sizes, float("inf")) == {"a": 0.5, "b": 0.5}
    assert mixing_weights(sizes, 5.0)["b"] == pytest.approx(1 / (1 + 10**0.2))
    assert count_epochs([10], [1.0], 25) == [2.5]


@pytest.mark.parametrize(
    ("sizes", "temperature", "message"),
    [
        ({"a": 0.0}, 1, "a has the weight 0.0"),
        ({"a": float("nan")}, 1, "a has the weight nan"),
        ({}, 1, "no source is given"),
        ({"a": 1}, 0, "temperature is 0"),
    ],
)
def test_wrong_weights_are_refused(sizes, temperature, message):
    with pytest.raises(ConfigError, match=message):
        mixing_weights(sizes, temperature)


def test_sources_of_other_names_or_row_lengths_are_refused():
    with pytest.raises(ConfigError, match="The weights are for b; the sources are a"):
        Mixture({"a": shuffled(3, 0)}, {"b": 1.0})
    wide = HeldRows(Rows(np.zeros((2, 5), np.int64), np.zeros((2, 5), np.int64)))
    orders = {"a": shuffled(2, 0), "b": shuffled(2, 0)}
    with pytest.raises(ConfigError, match=r"rows of 2, 5 tokens"):
        Feed([numbered(2), wide], Mixture(orders, {"a": 1, "b": 1}), 2).next_batch()


def test_rows_with_and_without_boundaries_can_be_mixed():
    packed = pack_rows([([1, 2], [True, True]), ([3, 4], [True, True])], 2, 0)
    orders = {"a": shuffled(2, 0), "b": shuffled(1, 0)}
    batch = Feed([numbered(2), HeldRows(packed)], Mixture(orders, {"a": 1, "b": 1}), 2).next_batch()
    assert batch.mask is not None and batch.mask.shape == (2, 1, 2, 2)
    assert batch.mask[0, 0].tolist() == [[True, False], [True, True]], "a row without boundaries is one document"
