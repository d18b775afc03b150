"""The async front: many clients, disconnects, a failing step, a clean end."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.engine.conftest import make_model
from torch import Tensor

from modelwright.base.errors import CapacityError, ModelwrightError, RequestError
from modelwright.base.types import Message, SamplingParams
from modelwright.engine.engine import EngineConfig
from modelwright.engine.llm import LLM
from modelwright.engine.stream import AsyncEngine
from modelwright.models.llama import Llama
from modelwright.tokenizer.bpe import Tokenizer

SHORT = SamplingParams(max_tokens=2)
LONG = SamplingParams(temperature=1.0, max_tokens=200, seed=1, ignore_eos=True)


@pytest.fixture
def engine(model_bf16: Llama, tokenizer: Tokenizer) -> Iterator[AsyncEngine]:
    with AsyncEngine(model_bf16, tokenizer=tokenizer) as engine:
        yield engine


async def until_idle(engine: AsyncEngine) -> None:
    for _ in range(500):
        stats = engine.stats()
        if stats.running == stats.waiting == 0 and stats.free_blocks == stats.total_blocks:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"blocks were not freed: {engine.stats()}")


async def read(engine: AsyncEngine, prompt: list[int], params: SamplingParams) -> tuple[str, tuple[int, ...]]:
    deltas = [d async for d in engine.stream_tokens(prompt, params)]
    assert deltas[-1].finish_reason is not None and deltas[-1].usage is not None
    return "".join(d.text for d in deltas), tuple(t for d in deltas for t in d.token_ids)


def test_many_clients_get_what_each_would_get_alone(engine: AsyncEngine, model_bf16: Llama, tokenizer: Tokenizer):
    prompts = [[i + 1] * (i % 7 + 1) * 5 for i in range(24)]
    params = [SamplingParams(temperature=i % 3 / 2, max_tokens=5 + i, seed=i, ignore_eos=True) for i in range(24)]
    alone = LLM(model_bf16, tokenizer=tokenizer)
    expected = [alone.generate(p, q)[0] for p, q in zip(prompts, params, strict=True)]

    async def client(i: int) -> None:
        await asyncio.sleep(i % 5 * 0.01)
        if i % 2:
            assert await read(engine, prompts[i], params[i]) == (expected[i].text, expected[i].token_ids)
        else:
            found = await engine.complete_tokens(prompts[i], params[i])
            assert (found.text, found.token_ids, found.logprobs) == (
                expected[i].text,
                expected[i].token_ids,
                expected[i].logprobs,
            )

    async def main() -> None:
        await asyncio.gather(*map(client, range(24)))
        await until_idle(engine)

    asyncio.run(main())


def test_a_client_that_leaves_frees_its_blocks(engine: AsyncEngine):
    async def main() -> None:
        stream = engine.stream_tokens([1, 2, 3], LONG)
        await anext(stream)
        await stream.aclose()
        task = asyncio.create_task(engine.complete_tokens([4, 5], LONG))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.stream_tokens([1], LONG)  # never read: never queued
        await until_idle(engine)
        assert engine.stats().completion_tokens < 400
        assert len((await read(engine, [1, 2, 3], LONG))[1]) == 200

    asyncio.run(main())


def test_a_prompt_is_checked_before_anything_is_streamed(engine: AsyncEngine):
    for prompt in ([], [1] * 300, [99999]):
        with pytest.raises(RequestError):
            engine.stream_tokens(prompt, LONG)


class FailingLlama(Llama):
    """Breaks on token 13, as a kernel out of memory would."""

    def hidden(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (input_ids == 13).any():
            raise MemoryError("no memory left for 13")
        return super().hidden(input_ids, *args, **kwargs)


def test_a_failing_step_fails_every_request_with_the_reason():
    engine = AsyncEngine(make_model(model_class=FailingLlama))
    never_13 = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)

    async def main() -> None:
        healthy = asyncio.create_task(read(engine, [1], never_13))
        await asyncio.sleep(0.02)
        assert engine.is_healthy
        with pytest.raises(ModelwrightError, match="MemoryError: no memory left for 13"):
            await read(engine, [13], LONG)
        with pytest.raises(ModelwrightError, match="no memory left"):
            await healthy
        assert not engine.is_healthy
        with pytest.raises(CapacityError, match="no memory left"):
            engine.stream_tokens([1], LONG)
        await until_idle(engine)

    asyncio.run(main())
    engine.stop()


def test_stopping_ends_open_requests_and_is_idempotent(model_bf16: Llama):
    engine = AsyncEngine(model_bf16)

    async def main() -> None:
        task = asyncio.create_task(read(engine, [1], LONG))
        await asyncio.sleep(0.03)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(CapacityError, match="stopped before"):
            await task

    asyncio.run(main())
    engine.stop()
    assert not engine.is_healthy and not engine._thread.is_alive()
    with pytest.raises(CapacityError, match="it was stopped"):
        engine.stream_tokens([1], LONG)


def test_a_full_house_turns_away(model_bf16: Llama):
    with AsyncEngine(model_bf16, config=EngineConfig(max_running=1, max_waiting=2)) as engine:

        async def client() -> str:
            try:
                await read(engine, [1, 2], LONG)
            except CapacityError:
                return "full"
            return "done"

        async def main() -> list[str]:
            return await asyncio.gather(*(client() for _ in range(12)))

        outcomes = asyncio.run(main())
        assert outcomes.count("done") >= 2 and outcomes.count("full") >= 1


@pytest.mark.parametrize(("engines_own", "callers", "most"), [(3, None, 3), (8, 3, 3), (3, 8, 3)])
def test_of_many_that_come_in_one_moment_no_more_wait_than_may(
    model_bf16: Llama, monkeypatch: pytest.MonkeyPatch, engines_own: int, callers: int | None, most: int
):
    with AsyncEngine(model_bf16, config=EngineConfig(max_running=1, max_waiting=engines_own)) as engine:
        gate, step = threading.Event(), engine.engine.step
        monkeypatch.setattr(engine.engine, "step", lambda: (gate.wait(60), step())[1])
        in_one_moment, done, refused = threading.Barrier(24), list[int](), list[int]()

        async def client(number: int) -> None:
            stream = engine.stream_pieces([1, 2], SHORT, max_waiting=callers)  # checked: nobody waits yet
            in_one_moment.wait(30)
            try:
                async for _ in stream:
                    pass
                done.append(number)
            except CapacityError:
                refused.append(number)
                if len(refused) == 24 - most:
                    gate.set()

        threads = [threading.Thread(target=lambda i=i: asyncio.run(client(i))) for i in range(24)]  # type: ignore[misc]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(done) == most and len(refused) == 24 - most


def test_an_event_loop_that_closes_early_harms_nobody(engine: AsyncEngine):
    async def leave() -> None:
        stream = engine.stream_tokens([1], LONG)
        await anext(stream)
        asyncio.get_running_loop().stop()
        await asyncio.sleep(10)

    with pytest.raises(RuntimeError, match="stopped before Future completed"):
        asyncio.run(leave())

    async def main() -> None:
        assert len((await read(engine, [2], LONG))[1]) == 200
        await until_idle(engine)

    asyncio.run(main())


def test_callers_in_threads(engine: AsyncEngine):
    messages = [Message("user", "the lazy dog")]
    expected = engine.chat(messages, LONG).text
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda: results.append("".join(d.text for d in engine.stream(messages, LONG))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4
    stream = engine.stream(messages, LONG)
    next(stream)
    stream.close()
    asyncio.run(until_idle(engine))


def test_an_idle_engine_sleeps(engine: AsyncEngine):
    asyncio.run(engine.complete_tokens([1], SamplingParams(max_tokens=1)))
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1
