"""The scheduler against random traffic: every request finishes, no block leaks, the oldest always goes on."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.base.errors import CapacityError, RequestError
from modelwright.base.types import SamplingParams
from modelwright.engine.kv_cache import BlockPool
from modelwright.engine.request import Request, make_request
from modelwright.engine.scheduler import MAX_OVERTAKEN, Chunk, Scheduler, _rank


def make_scheduler(num_blocks=9, block_size=4, max_running=4, budget=16, max_waiting=1000) -> Scheduler:
    pool = BlockPool(num_blocks, block_size)
    return Scheduler(pool, max_running=max_running, max_tokens_per_step=budget, max_waiting=max_waiting)


def make(scheduler: Scheduler, id: int, prompt: list[int], max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return make_request(id, prompt, params, max_context=scheduler.max_context, vocab_size=1000)


class Memory:
    """What stands in each slot of the pool: whose text, and all of it up to there. The model of the key-value cache."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.slots: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}

    def compute(self, chunks: list[Chunk]) -> None:
        """Write what a step writes, then read what it reads: every position of a text has to hold just that text."""
        texts = [(c, (*c.request.token_ids[: c.end], *c.draft)) for c in chunks]
        for chunk, text in texts:
            for at in range(chunk.start, chunk.computed_end):
                self.slots[self._slot(chunk, at)] = (chunk.request.tenant, text[: at + 1])
        for chunk, text in texts:
            for at in range(chunk.computed_end):
                found = self.slots.get(self._slot(chunk, at))
                assert found == (chunk.request.tenant, text[: at + 1]), "a block is shared in error"

    def _slot(self, chunk: Chunk, at: int) -> tuple[int, int]:
        return chunk.block_table[at // self.block_size], at % self.block_size


def play(scheduler: Scheduler, memory: Memory | None = None) -> list[Chunk]:
    """Do what the engine does in a step, with made-up tokens."""
    chunks = scheduler.schedule()
    if memory is not None:
        memory.compute(chunks)
    for chunk in chunks:
        table = chunk.request.block_table
        assert len(table) * scheduler.pool.block_size >= chunk.end
        assert chunk.start == chunk.request.num_computed
    assert len({c.request.id for c in chunks}) == len(chunks)
    assert sum(c.num_tokens for c in chunks) <= max(scheduler.max_tokens_per_step, len(scheduler.running))
    assert scheduler.running == sorted(scheduler.running, key=_rank), "those who give way first stand last"
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


@settings(max_examples=200, deadline=None)
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
    memory = Memory(block_size)
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
            play(scheduler, memory)
    bound = 20 + sum((len(r.prompt_ids) + r.max_tokens) * 2 for r in requests) * len(requests)
    oldest_done = -1
    for _ in range(bound):
        if not (scheduler.running or scheduler.waiting):
            break
        oldest = min((r for r in scheduler.requests()), key=lambda r: r.id)
        before = (oldest.num_computed, oldest.num_output)
        play(scheduler, memory)
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
    assert scheduler._preempt_last() is request
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


def play_until_done(scheduler: Scheduler, most: int, memory: Memory | None = None) -> list[int]:
    """Return the ids of the requests in the order in which they ended."""
    ended: list[int] = []
    for _ in range(most):
        before = list(scheduler.requests())
        play(scheduler, memory)
        ended += [r.id for r in before if r.is_finished]
        if not (scheduler.running or scheduler.waiting):
            return ended
    raise AssertionError("requests are left")


def make_urgent(scheduler: Scheduler, id: int, priority: int, prompt: list[int] | None = None, max_tokens=2) -> Request:
    params = SamplingParams(max_tokens=max_tokens, priority=priority)
    return make_request(id, prompt or [id], params, max_context=scheduler.max_context, vocab_size=1000)


def test_a_smaller_priority_goes_first_and_equal_ones_in_order():
    scheduler = make_scheduler(max_running=1)
    for id, priority in enumerate([0, 5, -1, 5, 0, -1]):
        scheduler.add(make_urgent(scheduler, id, priority))
    assert play_until_done(scheduler, 100) == [2, 5, 0, 4, 1, 3]


def test_when_blocks_run_out_the_least_urgent_gives_way():
    scheduler = make_scheduler(num_blocks=9, block_size=4, max_running=4, budget=64)
    low = make_urgent(scheduler, 0, 9, [1] * 12, 16)
    scheduler.add(low)
    play(scheduler)
    high = make_urgent(scheduler, 1, 0, [2] * 12, 16)
    scheduler.add(high)
    assert play_until_done(scheduler, 200) == [1, 0]
    assert (low.num_preemptions, high.num_preemptions) == (1, 0)


def test_nobody_starves_behind_an_endless_row_of_urgent_requests():
    scheduler = make_scheduler(max_running=1)
    patient = [make_urgent(scheduler, id, 7) for id in range(2)]
    for request in patient:
        scheduler.add(request)
    for id in range(2, 600):
        scheduler.add(make_urgent(scheduler, id, 0))
        if len(scheduler.waiting) > 3:
            play(scheduler)
            play(scheduler)
        if all(r.is_finished for r in patient):
            break
    assert all(r.is_finished for r in patient)
    assert MAX_OVERTAKEN < id < 3 * MAX_OVERTAKEN + 20, "they were held up, and for so long only"
    assert play_until_done(scheduler, 3000)


class Guesser:
    """Drafts that are nonsense; the scheduler alone is tested here."""

    def propose(self, request: Request, limit: int) -> list[int]:
        return [3] * min(limit, 1 + request.id % 4)

    def learn(self, request: Request, num_drafted: int, num_accepted: int) -> None: ...

    def forget(self, request: Request) -> None: ...


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_random_traffic_with_priorities_tenants_and_drafts(data: st.DataObject):
    """The model: a set of requests, each of which has to end with exactly its tokens, and blocks that add up."""
    scheduler = make_scheduler(
        num_blocks=1 + data.draw(st.integers(3, 12), label="blocks"),
        block_size=data.draw(st.integers(1, 4), label="block_size"),
        max_running=data.draw(st.integers(1, 5), label="max_running"),
        budget=data.draw(st.integers(1, 20), label="budget"),
    )
    scheduler.proposer = Guesser()
    memory = Memory(scheduler.pool.block_size)
    requests: list[Request] = []
    for _ in range(data.draw(st.integers(1, 30), label="events")):
        event = data.draw(st.sampled_from(["add", "add", "step", "step", "abort"]))
        if event == "add" and scheduler.max_context > 1:
            prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=scheduler.max_context - 1))
            priority = data.draw(st.integers(-2, 2))
            params = SamplingParams(max_tokens=data.draw(st.integers(1, 8)), priority=priority)
            tags = {"tenant": data.draw(st.sampled_from("ab"))}
            most = scheduler.max_context
            request = make_request(len(requests), prompt, params, max_context=most, vocab_size=9, tags=tags)
            requests.append(request)
            scheduler.add(request)
        elif event == "abort" and requests:
            request = data.draw(st.sampled_from(requests))
            if not request.is_finished:
                request.finish_reason = "abort"
            scheduler.remove(request)
        else:
            play(scheduler, memory)
        holders = [block for r in scheduler.running for block in r.block_table]
        shared = {block for block in holders if holders.count(block) > 1}
        for r in scheduler.running:  # a shared block is one of whole, computed, equal tokens; the others' is their own
            assert not shared & set(r.block_table[len(r.block_hashes) :]), "a block is shared that is still written"
    bound = 20 + sum((len(r.prompt_ids) + r.max_tokens) * 3 for r in requests) * max(1, len(requests))
    play_until_done(scheduler, bound, memory)
    assert all(r.is_finished for r in requests)
    assert all(r.finish_reason == "abort" or r.num_output == r.max_tokens for r in requests)
    assert scheduler.pool.num_free == scheduler.pool.num_usable, "blocks leaked"
