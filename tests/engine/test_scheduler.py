"""The scheduler against random traffic: every request finishes, no block leaks, the oldest always goes on."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.base.errors import CapacityError, RequestError
from modelwright.base.types import SamplingParams
from modelwright.engine.kv_cache import BlockPool
from modelwright.engine.request import Request, make_request
from modelwright.engine.scheduler import Chunk, Scheduler


def make_scheduler(num_blocks=9, block_size=4, max_running=4, budget=16, max_waiting=1000) -> Scheduler:
    pool = BlockPool(num_blocks, block_size)
    return Scheduler(pool, max_running=max_running, max_tokens_per_step=budget, max_waiting=max_waiting)


def make(scheduler: Scheduler, id: int, prompt: list[int], max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return make_request(id, prompt, params, max_context=scheduler.max_context, vocab_size=1000)


def play(scheduler: Scheduler) -> list[Chunk]:
    """Do what the engine does in a step, with made-up tokens."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        table = chunk.request.block_table
        assert len(table) * scheduler.pool.block_size >= chunk.end
        assert chunk.start == chunk.request.num_computed
    assert len({c.request.id for c in chunks}) == len(chunks)
    assert sum(c.num_tokens for c in chunks) <= max(scheduler.max_tokens_per_step, len(scheduler.running))
    scheduler.complete(chunks)
    for chunk in chunks:
        request = chunk.request
        if request.num_computed == request.num_tokens:
            request.token_ids.append((sum(request.token_ids) * 31 + 7) % 5)
            if request.num_output >= request.max_tokens:
                request.finish_reason = "length"
                scheduler.remove(request)
    scheduler.pool.check([r.block_table for r in scheduler.running])
    assert all(not r.block_table for r in scheduler.waiting)
    return chunks


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_traffic(data: st.DataObject):
    block_size = data.draw(st.integers(1, 5), label="block_size")
    scheduler = make_scheduler(
        num_blocks=1 + data.draw(st.integers(2, 10), label="blocks"),
        block_size=block_size,
        max_running=data.draw(st.integers(1, 5), label="max_running"),
        budget=data.draw(st.integers(1, 20), label="budget"),
    )
    requests: list[Request] = []
    for _ in range(data.draw(st.integers(1, 40), label="events")):
        event = data.draw(st.sampled_from(["add", "add", "step", "step", "abort"]))
        if event == "add":
            # few distinct tokens, so that prefixes are often shared
            prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=scheduler.max_context - 1))
            request = make(scheduler, len(requests), prompt, data.draw(st.integers(1, 12)))
            requests.append(request)
            scheduler.add(request)
        elif event == "abort" and requests:
            request = data.draw(st.sampled_from(requests))
            if not request.is_finished:
                request.finish_reason = "abort"
            scheduler.remove(request)
            scheduler.remove(request)  # idempotent
        else:
            play(scheduler)
    bound = 20 + sum((len(r.prompt_ids) + r.max_tokens) * 2 for r in requests) * len(requests)
    oldest_done = -1
    for _ in range(bound):
        if not (scheduler.running or scheduler.waiting):
            break
        oldest = min((r for r in scheduler.requests()), key=lambda r: r.id)
        before = (oldest.num_computed, oldest.num_output)
        play(scheduler)
        assert (oldest.num_computed, oldest.num_output) > before or oldest.is_finished, "the oldest stood still"
        assert oldest.id >= oldest_done
        oldest_done = oldest.id
    assert all(r.is_finished for r in requests)
    assert scheduler.pool.num_free == scheduler.pool.num_usable, "blocks leaked"


def test_a_prompt_is_computed_in_chunks_and_neighbours_go_on():
    scheduler = make_scheduler(num_blocks=40, budget=8)
    short, long = make(scheduler, 0, [1], 5), make(scheduler, 1, [2] * 20, 1)
    scheduler.add(short)
    scheduler.add(long)
    sizes = [[(c.request.id, c.num_tokens) for c in play(scheduler)] for _ in range(3)]
    assert sizes == [[(0, 1), (1, 7)], [(0, 1), (1, 7)], [(0, 1), (1, 6)]]


def test_a_long_prompt_leaves_a_token_for_each_one_behind_it():
    scheduler = make_scheduler(num_blocks=40, budget=8)
    long, short = make(scheduler, 0, [2] * 30, 1), make(scheduler, 1, [1], 9)
    scheduler.add(long)
    scheduler.add(short)
    play(scheduler)
    scheduler.running.append(scheduler.waiting.popleft()) if scheduler.waiting else None
    assert [(c.request.id, c.num_tokens) for c in play(scheduler)] == [(0, 7), (1, 1)]


def test_the_newest_is_preempted_and_comes_back_first():
    scheduler = make_scheduler(num_blocks=1 + 4, block_size=2, budget=16)
    old, new, late = (make(scheduler, i, [i, i, i], 5) for i in range(3))
    for request in (old, new, late):
        scheduler.add(request)
    order = []
    while scheduler.running or scheduler.waiting:
        before = {r.id for r in (old, new, late) if r.is_finished}
        play(scheduler)
        order += [r.id for r in (old, new, late) if r.is_finished and r.id not in before]
    assert order == [0, 1, 2] and scheduler.num_preemptions > 0 and old.num_preemptions == 0


def test_a_preempted_request_finds_its_own_blocks_again_but_does_not_count_them_as_cached():
    scheduler = make_scheduler(num_blocks=20, block_size=2)
    request = make(scheduler, 0, [1, 2, 3, 4, 5], 4)
    scheduler.add(request)
    play(scheduler)
    assert scheduler._preempt_newest() is request
    (chunk,) = play(scheduler)
    assert chunk.start == 4 and request.num_cached == 0


def test_the_second_of_two_equal_prompts_shares_the_blocks_of_the_first():
    scheduler = make_scheduler(num_blocks=20, block_size=4)
    first, second = (make(scheduler, i, [7] * 11, 4) for i in range(2))
    scheduler.add(first)
    play(scheduler)
    scheduler.add(second)
    play(scheduler)
    assert second.num_cached == 8 and second.block_table[:2] == first.block_table[:2]


def test_too_many_waiting_are_turned_away():
    scheduler = make_scheduler(max_waiting=1)
    scheduler.add(make(scheduler, 0, [1], 1))
    with pytest.raises(CapacityError, match="1 requests are waiting"):
        scheduler.add(make(scheduler, 1, [1], 1))


@pytest.mark.parametrize(
    ("prompt", "code", "words"),
    [
        ([], "invalid_request", "no tokens"),
        ([1] * 32, "context_length_exceeded", "maximum context length is 32 tokens.* 32 tokens"),
        ([1] * 500, "context_length_exceeded", "500"),
        ([3, 1000], "invalid_value", "token id 1000"),
        ([-1], "invalid_value", "token id -1"),
    ],
)
def test_what_can_never_be_served_is_refused_at_the_door(prompt: list[int], code: str, words: str):
    with pytest.raises(RequestError, match=words) as caught:
        make(make_scheduler(), 0, prompt, 1)
    assert caught.value.code == code and caught.value.status == 400


def test_max_tokens_is_clipped_to_the_context():
    assert make(make_scheduler(), 0, [1] * 30, 100).max_tokens == 2


def test_a_tenant_with_many_requests_does_not_hold_up_one_with_few():
    scheduler = make_scheduler(num_blocks=200, max_running=1)
    order: list[str] = []

    def add(tenant: str) -> Request:
        request = make_request(
            0, [1] * 40, SamplingParams(max_tokens=1), max_context=100, vocab_size=9, tags={"tenant": tenant}
        )
        scheduler.add(request)
        return request

    for _ in range(6):
        add("many")
    for _ in range(2):
        add("few")
    while scheduler.waiting or scheduler.running:
        chunks = scheduler.schedule()
        scheduler.complete(chunks)
        for chunk in chunks:
            if chunk.reaches_end:
                order.append(chunk.request.tenant)
                scheduler.remove(chunk.request)
    assert order == ["many", "few", "many", "few", "many", "many", "many", "many"]
