"""Which tokens are computed in the next step.

There are no phases: a request has `num_tokens` known and `num_computed` of them in the cache, and each step hands out
tokens so that the second catches up with the first. A prompt, the rest of a prompt (chunked prefill), one new token
(decode) and a preempted request starting over are all the same case. Requests are served in order of arrival, those of
several tenants by turns, so that one who sends many does not hold up one who sends few; when
blocks run out, the newest running request gives up its own and is computed again later. Since any admitted request
fits into the pool alone, the first in line always makes progress.

A request may name a priority; a smaller one goes before a larger one, among the waiting and, when blocks run out,
among the running. Nobody starves: the oldest of those passed over counts it, and after `MAX_OVERTAKEN` times, or so
many times in which later requests took its blocks, it goes before everybody.

Source: the unified token budget of vLLM V1's scheduler; Agrawal et al. 2024 (Sarathi-Serve) for chunked prefill.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from modelwright.base.errors import CapacityError
from modelwright.engine.kv_cache import BlockPool
from modelwright.engine.pace import Pace
from modelwright.engine.request import Request
from modelwright.engine.speculative import Proposer

MAX_OVERTAKEN = 64


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `start + num_tokens` of one request, computed in one step."""

    request: Request
    start: int
    num_tokens: int
    draft: tuple[int, ...] = ()  # guessed tokens behind the last known one, computed along with it

    @property
    def end(self) -> int:
        """One past the last position of a known token."""
        return self.start + self.num_tokens

    @property
    def computed_end(self) -> int:
        """One past the last position that is computed, a guessed one perhaps."""
        return self.end + len(self.draft)

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute."""
        return [*self.request.token_ids[self.start : self.end], *self.draft]

    @property
    def block_table(self) -> list[int]:
        """The blocks of the request."""
        return self.request.block_table

    @property
    def reaches_end(self) -> bool:
        """True when the last known token is in the chunk, so that the next one can be drawn."""
        return self.end == self.request.num_tokens

    @property
    def needs_all_rows(self) -> bool:
        """True when the log-probabilities of the prompt are asked for and this chunk holds some of it."""
        return self.request.params.prompt_logprobs and self.start < len(self.request.prompt_ids)

    @property
    def num_rows(self) -> int:
        """Rows of logits that the chunk wants: its last token's and its draft's, or those of all its tokens."""
        return self.num_tokens if self.needs_all_rows else int(self.reaches_end) + len(self.draft)


class Scheduler:
    """Keeps the waiting and the running requests and hands out each step's token budget."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_running: int,
        max_tokens_per_step: int,
        max_waiting: int,
        proposer: Proposer | None = None,
        pace: Pace | None = None,
    ):
        self.pool = pool
        self.max_running = max_running
        self.max_tokens_per_step = max_tokens_per_step
        self.max_waiting = max_waiting
        self.proposer = proposer
        self.pace = pace
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.num_preemptions = 0
        self._num_arrivals = 0
        self._served: dict[str, int] = {}  # tokens given to each tenant that has requests here

    @property
    def max_context(self) -> int:
        """Tokens that one request can have in the cache when it is alone."""
        return self.pool.num_usable * self.pool.block_size

    @property
    def is_under_way(self) -> bool:
        """True while a request has been computed in part, be it preempted."""
        return bool(self.running) or any(request.num_preemptions for request in self.waiting)

    def requests(self) -> Iterator[Request]:
        """Yield every request that is not finished, oldest first."""
        yield from self.running
        yield from self.waiting

    def add(self, request: Request) -> None:
        """Queue a request that `make_request` has checked.

        Raises:
            CapacityError: Too many requests wait already.
        """
        if len(self.waiting) >= self.max_waiting:
            raise CapacityError(f"{len(self.waiting)} requests are waiting, which is the limit. Try again later.")
        assert len(request.prompt_ids) + request.max_tokens <= self.max_context, "a request that can never fit"
        present = {other.tenant for other in self.requests()}
        if request.tenant not in present:
            level = min((self._served.get(tenant, 0) for tenant in present), default=0)
            self._served = {t: n for t, n in self._served.items() if t in present}  # of tenants that are here
            self._served[request.tenant] = level
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self.waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """Hand out the next step's tokens; running requests first, then as many waiting ones as fit."""
        chunks: list[Chunk] = []
        budget = self.max_tokens_per_step
        has_preempted = False
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            num_behind = len(self.running) - index - 1  # a long prompt leaves each of them a token
            num_tokens = min(request.num_tokens - request.num_computed, max(1, budget - num_behind))
            # The last in line is never before this one, so it has no tokens in this step yet.
            while not self._grow(request, request.num_computed + num_tokens):
                has_preempted = True
                if self._preempt_last() is request:
                    break
            else:
                draft = self._draft(request, num_tokens, budget - num_tokens - num_behind)
                chunks.append(Chunk(request, request.num_computed, num_tokens, draft))
                budget -= num_tokens + len(draft)
                index += 1
        if not has_preempted:
            self._admit(chunks, budget)
        self._serve(chunks)
        assert chunks or not (self.running or self.waiting), "work is waiting and nothing was scheduled"
        return chunks

    def _draft(self, request: Request, num_tokens: int, budget: int) -> tuple[int, ...]:
        """Ask the proposer for guesses behind a request that is one token from its end, and make room for them."""
        if self.pace is not None and not self.pace.may_draft(len(self.running)):
            return ()
        if self.proposer is None or num_tokens > 1 or request.num_tokens - request.num_computed > 1:
            return ()
        limit = min(budget, request.max_tokens - request.num_output - 1)
        draft = tuple(self.proposer.propose(request, limit)) if limit > 0 else ()
        # Guesses are never worth a preemption.
        return draft if not draft or self._grow(request, request.num_tokens + len(draft)) else ()

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.max_running:
            request = self._next_waiting()
            # Log-probabilities of the prompt come from computing it, so nothing of it is taken from the cache.
            is_told = request.params.prompt_logprobs
            shared = [] if is_told else self.pool.find_prefix(request.block_ids, request.root)
            start = len(shared) * self.pool.block_size
            num_tokens = min(request.num_tokens - start, budget)
            num_new = self._num_blocks(start + num_tokens) - len(shared)
            if not self.pool.can_take(num_new, shared):
                break
            self.pool.hold(shared)
            request.block_table = [*shared, *self.pool.take(num_new)]
            request.block_hashes = [self.pool.hash_of(block) for block in shared]
            request.num_computed = start
            if request.num_preemptions == 0:
                request.num_cached = start
            self.waiting.remove(request)
            self._note_overtaking(request)
            insort(self.running, request, key=_rank)
            chunks.append(Chunk(request, start, num_tokens))
            budget -= num_tokens

    def _next_waiting(self) -> Request:
        """Return who is admitted next: of the smallest priority, one of the tenant that was given the fewest tokens.

        Preempted requests go before others of their priority. A tenant that comes back after a pause starts level with
        the least served of those who are here, so that silence saves nothing up.
        """
        # min keeps the order of ties, which is that of arrival
        return min(
            self.waiting,
            key=lambda r: (_urgency(r), 0 if r.num_preemptions else 1, 0 if r.num_preemptions else self._share(r)),
        )

    def _note_overtaking(self, request: Request) -> None:
        """Count for the oldest of those that a request of a smaller priority was admitted before.

        For the oldest alone: if all of a long queue became urgent at once, priorities would mean nothing.
        """
        passed = [r for r in self.waiting if r.arrival < request.arrival and _urgency(r) > _urgency(request)]
        if passed:
            min(passed, key=lambda r: r.arrival).num_overtaken += 1

    def _share(self, request: Request) -> int:
        return self._served.get(request.tenant, 0)

    def _serve(self, chunks: Sequence[Chunk]) -> None:
        """Count the tokens that each tenant was given in a step."""
        for chunk in chunks:
            tenant = chunk.request.tenant
            self._served[tenant] = self._served.get(tenant, 0) + chunk.num_tokens

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)

    def _grow(self, request: Request, num_tokens: int) -> bool:
        missing = self._num_blocks(num_tokens) - len(request.block_table)
        if missing > 0:
            if not self.pool.can_take(missing):
                return False
            request.block_table += self.pool.take(missing)
        return True

    def _preempt_last(self) -> Request:
        request = self.running.pop()
        self._release(request)
        request.num_overtaken += any(other.arrival > request.arrival for other in self.running)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)
        return request

    def _release(self, request: Request) -> None:
        self.pool.release(request.block_table)
        request.block_table = []
        request.block_hashes = []
        request.memory = None
        request.num_computed = 0

    def complete(self, chunks: Sequence[Chunk]) -> None:
        """Note that a step's keys and values are in the cache, and let its full blocks be shared."""
        size = self.pool.block_size
        for chunk in chunks:
            request = chunk.request
            request.num_computed = chunk.end
            for index in range(len(request.block_hashes), chunk.end // size):
                parent = request.block_hashes[-1] if request.block_hashes else request.root
                tokens = request.block_ids[index * size : (index + 1) * size]
                request.block_hashes.append(self.pool.remember(request.block_table[index], parent, tokens))

    def remove(self, request: Request) -> None:
        """Drop a request that finished or was aborted, between steps; its blocks are free at once. Idempotent."""
        if self.proposer is not None:
            self.proposer.forget(request)
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)


def _urgency(request: Request) -> int:
    """Return a request's priority; whoever was held up too often goes first."""
    return -(2**31) if request.num_overtaken >= MAX_OVERTAKEN else request.params.priority


def _rank(request: Request) -> tuple[int, int]:
    return _urgency(request), request.arrival
