"""Time limits, over raw sockets where a client would be too well-behaved: heads, bodies, whole answers."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
from websockets.sync.client import connect

from modelwright.base.errors import ConfigError
from modelwright.serve.app import ServeConfig, create_app
from modelwright.serve.deadline import Listener

pytestmark = pytest.mark.service
HEAD_SECONDS, BODY_SECONDS, ANSWER_SECONDS = 0.3, 0.4, 1.0
PATIENCE = 8.0  # of these tests; far above the limits, far below what an unlimited server would take
ASKED = {"model": "tiny", "prompt": "The heap", "max_tokens": 240, "ignore_eos": True, "temperature": 0}
TALK = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 150, "temperature": 0}


@pytest.fixture(scope="module")
def slow(start: Any, build_engine: Any) -> Iterator[Any]:
    """A server with short limits, whose steps take 150 ms more than they need."""
    with build_engine() as engine:
        step = engine.engine.step
        engine.engine.step = lambda: (time.sleep(0.15), step())[1]
        config = ServeConfig(body_timeout_seconds=BODY_SECONDS, answer_timeout_seconds=ANSWER_SECONDS)
        app = create_app(config, engine, engine.tokenizer, "tiny", None, None)
        with start(app, engine, http=Listener.within(HEAD_SECONDS)) as running:
            yield running


class Wire:
    """A connection that sends what it likes, as slowly as it likes."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self.socket = socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE)
        self.opened = time.monotonic()

    def trickle(self, data: bytes, every: float = 0.05) -> bytes:
        """Send byte by byte until the other side closes; return what it said."""
        said = b""
        self.socket.settimeout(every)
        for i in range(len(data)):
            assert time.monotonic() - self.opened < PATIENCE, "the server goes on waiting"
            try:
                self.socket.sendall(data[i : i + 1])
                piece = self.socket.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                return said
            if not piece:
                return said
            said += piece
        raise AssertionError("everything could be sent")

    def is_served(self) -> bool:
        """Ask a small thing and read its whole answer."""
        self.socket.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        said = b""
        while not said.endswith(b"}"):
            said += self.socket.recv(65536)
        return said.startswith(b"HTTP/1.1 200 ")

    def read_all(self) -> bytes:
        """Read until the other side closes."""
        said = b""
        while piece := self.socket.recv(65536):
            said += piece
        return said


def body_of(said: bytes) -> dict[str, Any]:
    return json.loads(said.partition(b"\r\n\r\n")[2])


def test_a_head_that_trickles_is_told_408_and_others_are_served_meanwhile(slow: Any):
    wires = [Wire(slow.url) for _ in range(20)]
    for wire in wires:
        wire.socket.sendall(b"POST /v1/completions HTTP/1.1\r\n")
    assert httpx2.get(slow.url + "/health/live").status_code == 200
    said = wires[0].trickle(b"x-slow: " + b"a" * 1000)
    assert said.startswith(b"HTTP/1.1 408 ") and body_of(said)["error"]["code"] == "request_timeout"
    assert all(wire.read_all().startswith(b"HTTP/1.1 408 ") for wire in wires[1:])
    assert Wire(slow.url).read_all() == b""  # one that never says a word is just closed


def test_a_second_head_on_the_same_connection_has_the_same_time(slow: Any):
    wire = Wire(slow.url)
    assert wire.is_served() and wire.is_served()
    time.sleep(1.5 * HEAD_SECONDS)  # idle between requests is no head
    assert wire.is_served()
    wire.trickle(b"GET /health/live HTTP/1.1\r\nx-slow: " + b"a" * 1000)


def test_a_body_that_trickles_is_told_408_and_what_follows_a_refusal_is_not_read_forever(slow: Any):
    head = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n"
    wire = Wire(slow.url)
    wire.socket.sendall(head % b"/v1/completions")
    said = wire.trickle(b'{"model": "' + b"a" * 1000)
    assert said.startswith(b"HTTP/1.1 408 ") and body_of(said)["error"]["code"] == "request_timeout"
    wire = Wire(slow.url)
    wire.socket.sendall(head % b"/nothing/here")
    assert wire.trickle(b"a" * 1000).startswith(b"HTTP/1.1 404 ")


def test_slow_but_in_time_is_served_and_an_open_answer_is_no_slow_head(slow: Any, parse_events: Any):
    wire = Wire(slow.url)
    for piece in (b"GET /health/live HTTP/1.1\r\n", b"host: localhost\r\n", b"connection: close\r\n\r\n"):
        wire.socket.sendall(piece)
        time.sleep(HEAD_SECONDS / 8)
    assert wire.read_all().startswith(b"HTTP/1.1 200 ")
    body = {**ASKED, "max_tokens": 3, "stream": True}
    begun = time.monotonic()
    assert parse_events(httpx2.post(slow.url + "/v1/completions", json=body).text)[-1] == "[DONE]"
    with connect(slow.url.replace("http", "ws", 1) + "/v1/chat/completions/ws") as ws:
        time.sleep(1.5 * HEAD_SECONDS)  # a WebSocket may be idle
        ws.send(json.dumps({**TALK, "max_tokens": 2}))
        while ws.recv(timeout=PATIENCE) != "[DONE]":
            assert time.monotonic() - begun < PATIENCE


def test_a_whole_answer_that_is_late_is_504_once_and_frees_its_blocks(slow: Any):
    client = openai.OpenAI(base_url=f"{slow.url}/v1", api_key="unused", max_retries=3)
    begun = time.monotonic()
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(
            **{k: v for k, v in ASKED.items() if k != "ignore_eos"}, extra_body={"ignore_eos": True}
        )
    assert caught.value.status_code == 504 and caught.value.code == "answer_timeout"
    assert ANSWER_SECONDS <= time.monotonic() - begun < 2 * ANSWER_SECONDS, "it was asked again"
    slow.wait_until_idle()
    message = httpx2.post(slow.url + "/v1/messages", json=TALK)
    assert message.status_code == 504 and message.json()["error"]["type"] == "timeout_error"
    assert httpx2.post(slow.url + "/v1/completions", json={**ASKED, "max_tokens": 2}).status_code == 200


def test_a_stream_that_is_late_ends_with_an_error_in_its_own_form(slow: Any, parse_events: Any):
    def stream(path: str, **body: Any) -> str:
        response = httpx2.post(slow.url + path, json={**body, "stream": True})
        assert response.status_code == 200
        return response.text

    chunks = parse_events(stream("/v1/completions", **ASKED))
    assert chunks[-1]["error"]["code"] == "answer_timeout" and len(chunks) > 2
    assert not any(chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1])
    last = stream("/v1/messages", **TALK).rstrip("\n").rpartition("\n\n")[2]
    assert (
        last.startswith("event: error\n")
        and json.loads(last.partition("data: ")[2])["error"]["type"] == "timeout_error"
    )
    last = (
        stream("/v1/responses", model="tiny", input="Hi", max_output_tokens=150, temperature=0)
        .rstrip("\n")
        .rpartition("\n\n")[2]
    )
    assert last.startswith("event: error\n") and "answer_timeout" in last
    slow.wait_until_idle()


def test_an_answer_over_a_websocket_has_the_same_time(slow: Any):
    with connect(slow.url.replace("http", "ws", 1) + "/v1/chat/completions/ws") as ws:
        ws.send(json.dumps(TALK))
        while "error" not in (last := json.loads(ws.recv(timeout=PATIENCE))):
            pass
        assert last["error"]["code"] == "answer_timeout"
        ws.send(json.dumps({**TALK, "max_tokens": 2}))
        while ws.recv(timeout=PATIENCE) != "[DONE]":
            pass
    slow.wait_until_idle()


def test_limits_that_let_nothing_through_are_refused():
    for name in ("body_timeout_seconds", "answer_timeout_seconds"):
        with pytest.raises(ConfigError, match=name):
            ServeConfig(**{name: 0})
    assert ServeConfig(answer_timeout_seconds=None).answer_timeout_seconds is None
    with pytest.raises(ConfigError, match="head_seconds"):
        Listener.within(0)
