"""Two replicas on Ray Serve: placement, keys, the death of one, a rolling restart. It takes a minute and wants Ray."""

import concurrent.futures
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.weights import save_model
from modelwright.serve.served import ServeConfig
from modelwright.tokenizer.train import train_bpe

pytest.importorskip(
    "ray.serve", reason="Ray Serve is not installed: pip install 'modelwright[ray]'", exc_type=ImportError
)
pytestmark = [pytest.mark.slow, pytest.mark.peer, pytest.mark.service]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model, saved."""
    out = tmp_path_factory.mktemp("replicas") / "tiny"
    tokenizer = train_bpe(["plain words for a tokenizer of a few hundred entries " * 3], 300)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4,
        num_kv_heads=2, max_seq_len=1024,
    )  # fmt: skip
    save_model(Llama(shape), out)
    tokenizer.save(out)
    return out


@pytest.fixture(scope="module")
def fleet(folder: Path, start: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from modelwright.cli.server import Plan
    from modelwright.engine.engine import EngineConfig
    from modelwright.serve.replicas import ReplicaConfig, Replicas, create_front

    config = EngineConfig(dtype="bfloat16", num_blocks=400)
    plan = Plan(ServeConfig(), str(folder), None, "tiny", engine=config)
    replicas = Replicas(plan, ReplicaConfig(2, num_cpus=0.5))
    replicas.start()
    try:
        with start(create_front(replicas, ServeConfig()), replicas) as running:
            yield running
    finally:
        replicas.stop()


def ask(client: openai.OpenAI, text: str, **more: Any) -> Any:
    return client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": text}], **{"max_tokens": 8, "temperature": 0, **more}
    )


def facts(url: str) -> list[dict[str, Any]]:
    import httpx2

    return list(httpx2.get(f"{url}/api/replicas").json()["replicas"])


def wait_for_two(url: str, seconds: float = 60) -> list[dict[str, Any]]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = facts(url)
        if len(found) == 2:
            return found
        time.sleep(0.5)
    raise AssertionError("a second replica did not come back")


def test_a_conversation_comes_back_to_its_blocks_and_others_use_the_other_replica(fleet: Any):
    client = fleet.client()
    question = "words " * 60
    ask(client, question)
    assert ask(client, question).usage.prompt_tokens_details.cached_tokens > 0
    for i in range(12):
        ask(client, f"{i} another beginning")
    assert len({one["pid"] for one in facts(fleet.url)}) == 2
    assert all(one["free_blocks"] == one["total_blocks"] for one in facts(fleet.url))
    import httpx2

    text = httpx2.get(f"{fleet.url}/metrics").text
    for one in facts(fleet.url):
        assert f'replica="{one["pid"]}"' in text


def test_streams_errors_and_stored_responses_pass_through_the_front(fleet: Any):
    client = fleet.client()
    whole = ask(client, "plain").choices[0].message.content
    assert "".join(c.choices[0].delta.content or "" for c in ask(client, "plain", stream=True)) == whole
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
    with pytest.raises(openai.BadRequestError):
        ask(client, "plain", temperature=7)
    assert client.batches.list().data == []  # the front keeps them
    first = client.responses.create(model="tiny", input="plain", max_output_tokens=4)
    client.responses.create(model="tiny", input="more", max_output_tokens=4, previous_response_id=first.id)


def test_a_client_that_leaves_frees_the_blocks_of_its_request(fleet: Any):
    stream = ask(fleet.client(), "plain words", max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 20
    while any(one["running"] for one in facts(fleet.url)):
        assert time.monotonic() < deadline, facts(fleet.url)
        time.sleep(0.2)
    assert all(one["free_blocks"] == one["total_blocks"] for one in facts(fleet.url))


def test_the_death_of_a_replica_ends_only_its_own_requests_and_another_takes_its_place(fleet: Any):
    wait_for_two(fleet.url)
    alone = {i: ask(fleet.client(), f"{i} words", max_tokens=500, seed=i).choices[0].message.content for i in range(8)}

    def stream(i: int) -> tuple[str, str]:
        try:
            chunks = ask(fleet.client(), f"{i} words", max_tokens=500, seed=i, stream=True)
            return "whole", "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        except openai.APIError as error:
            return "error", str(error)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(stream, i) for i in range(8)]
        deadline = time.monotonic() + 20
        busy: list[dict[str, Any]] = []
        while not busy and time.monotonic() < deadline:
            busy = [one for one in facts(fleet.url) if one["running"]]
        victim = busy[0]["pid"]
        os.kill(victim, signal.SIGKILL)
        answers = [one.result(timeout=60) for one in waiting]
    whole = [i for i, (kind, _) in enumerate(answers) if kind == "whole"]
    assert all(answers[i][1] == alone[i] for i in whole)
    lost = [text for kind, text in answers if kind == "error"]
    assert lost and all("replica" in text for text in lost)
    after = wait_for_two(fleet.url)
    assert victim not in {one["pid"] for one in after}
    assert ask(fleet.client(), "0 words", max_tokens=500, seed=0).choices[0].message.content == alone[0]


def test_a_rolling_restart_fails_no_request(fleet: Any):
    before = {one["pid"] for one in wait_for_two(fleet.url)}
    faults, count, is_over = [], 0, threading.Event()

    def keep_asking() -> None:
        nonlocal count
        while not is_over.is_set():
            try:
                ask(fleet.client(), f"{count} words")
                count += 1
            except openai.APIError as error:
                faults.append(str(error))

    asker = threading.Thread(target=keep_asking)
    asker.start()
    fleet.engine.restart()
    after = wait_for_two(fleet.url)
    is_over.set()
    asker.join()
    assert not faults and count > 3
    assert not before & {one["pid"] for one in after}
    assert {one["generation"] for one in after} == {1}
