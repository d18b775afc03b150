"""The counters agree with what clients were told, to the token; and a reader that never reads costs little."""

import concurrent.futures
import contextlib
import os
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from modelwright.base.files import read_json
from modelwright.serve.app import ServeConfig, create_app
from modelwright.serve.keys import add_key

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def figures(url: str) -> dict[tuple[str, ...], float]:
    """Return every sample: (name, label values ...) -> value."""
    families = text_string_to_metric_families(httpx2.get(f"{url}/metrics").text)
    return {(s.name, *(v for _, v in sorted(s.labels.items()))): s.value for f in families for s in f.samples}


@pytest.fixture
def fresh(start: Any, build_engine: Any) -> Any:
    with build_engine() as engine:
        app = create_app(ServeConfig(), engine, engine.tokenizer, "tiny", None, None)
        with start(app, engine) as running:
            yield running


def test_counters_are_the_sum_of_what_clients_were_told(fresh: Any):
    client = fresh.client()

    def ask(i: int) -> Any:
        more: dict[str, Any] = [{}, {"n": 3}, {"stream": True, "stream_options": {"include_usage": True}}][i % 3]
        body = {"model": "tiny", "max_tokens": 4 + i, "seed": i, **more}
        if i % 2:
            done = client.chat.completions.create(messages=[{"role": "user", "content": f"{i} heap"}], **body)
        else:
            done = client.completions.create(prompt=[f"{i} heap", "queue"], **body)
        if "stream" not in more:
            return len(done.choices), done.usage
        chunks = list(done)
        return 1 + max((c.index for chunk in chunks for c in chunk.choices), default=0), chunks[-1].usage

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        told = list(pool.map(ask, range(18)))
    for wrong in ({"model": "nobody"}, {"model": "tiny", "temperature": 9}, {"model": "tiny", "max_tokens": 10**6}):
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(messages=[{"role": "user", "content": "x"}], **wrong)
    seen = figures(fresh.url)
    assert seen["modelwright_tokens_total", "prompt"] == sum(u.prompt_tokens for _, u in told)
    assert seen["modelwright_tokens_total", "completion"] == sum(u.completion_tokens for _, u in told)
    num_answers = sum(num for num, _ in told)
    assert seen["modelwright_answer_seconds_count", "tiny"] == num_answers
    assert seen["modelwright_time_to_first_token_seconds_count", "tiny"] == num_answers
    assert seen["modelwright_engine_num_finished",] == num_answers
    assert seen["modelwright_engine_completion_tokens",] == sum(u.completion_tokens for _, u in told)
    assert seen["modelwright_running_answers", "tiny"] == 0
    statuses = Counter({k[1:]: v for k, v in seen.items() if k[0] == "modelwright_requests_total"})
    assert statuses["/v1/chat/completions", "200"] == statuses["/v1/completions", "200"] == 9
    assert statuses["/v1/chat/completions", "400"] == 2 and statuses["/v1/chat/completions", "404"] == 1
    assert seen["modelwright_answers_cut_off_total",] == 0


def test_a_key_pays_for_a_prompt_once(start: Any, build_engine: Any, tmp_path: Path):
    """Three answers to one prompt: the budget is charged what the usage says."""
    key = add_key(tmp_path / "keys.yaml", "alice", token_budget=10**6)
    with build_engine() as engine:
        app = create_app(ServeConfig(api_key_file=tmp_path / "keys.yaml"), engine, engine.tokenizer, "tiny", None, None)
        with start(app, engine) as running:
            client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0)
            done = client.completions.create(model="tiny", prompt=["a heap of words", "b"], n=3, max_tokens=5)
            assert len(done.choices) == 6
    assert read_json(tmp_path / "keys.yaml.usage.json") == {"alice": done.usage.total_tokens}


def test_a_key_pays_for_what_it_leaves_unread(start: Any, build_engine: Any, tmp_path: Path):
    key = add_key(tmp_path / "keys.yaml", "alice", token_budget=10**6)
    with build_engine() as engine:
        app = create_app(ServeConfig(api_key_file=tmp_path / "keys.yaml"), engine, engine.tokenizer, "tiny", None, None)
        with start(app, engine) as running:
            client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0)
            stream = client.completions.create(
                model="tiny", prompt="heap", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
            )
            for _, _chunk in zip(range(8), stream, strict=False):
                pass
            stream.close()
            running.wait_until_idle()
            meter = app.user_middleware[1].kwargs["keys"].find(key)
            deadline = time.monotonic() + 10
            while meter.spent < 8:
                assert time.monotonic() < deadline
                time.sleep(0.02)


def test_an_answer_that_is_left_is_counted_as_cut_off(fresh: Any):
    stream = fresh.client().completions.create(
        model="tiny", prompt="heap", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    fresh.wait_until_idle()
    deadline = time.monotonic() + 5
    while figures(fresh.url)["modelwright_answers_cut_off_total",] != 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert figures(fresh.url)["modelwright_running_answers", "tiny"] == 0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_readers_that_never_read_hold_no_blocks_and_little_memory(fresh: Any):
    """Each asks for a long answer with much to tell of each token, and reads nothing of it."""
    body = (
        b'{"model": "tiny", "messages": [{"role": "user", "content": "heap"}], "stream": true, "logprobs": true, '
        b'"top_logprobs": 20, "ignore_eos": true, "n": 4}'
    )
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    host, port = fresh.url.removeprefix("http://").split(":")
    client = fresh.client()
    client.completions.create(model="tiny", prompt="warm", max_tokens=5)
    before = resident_bytes()
    with contextlib.ExitStack() as open_sockets:
        for _ in range(8):
            reader = open_sockets.enter_context(socket.socket())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect((host, int(port)))
            reader.sendall(head.encode() + body)
        time.sleep(0.2)
        done = client.completions.create(model="tiny", prompt="others go on", max_tokens=5, temperature=0)
        assert done.choices[0].text is not None
        fresh.wait_until_idle(60)  # what nobody reads is finished, and its blocks are free
        assert resident_bytes() - before < 100e6  # 32 answers of some 200 tokens, 1 kB each: 7 MB of text
    deadline = time.monotonic() + 10
    while figures(fresh.url)["modelwright_running_answers", "tiny"]:
        assert time.monotonic() < deadline, "a stream outlived its reader"
        time.sleep(0.05)
