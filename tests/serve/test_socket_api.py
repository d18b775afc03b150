"""Chats over one WebSocket, with a real client."""

import json

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from modelwright.serve.app import ServeConfig, create_app
from modelwright.serve.keys import add_key

pytestmark = pytest.mark.service
ASKED = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "What is a heap?"}],
    "max_tokens": 8,
    "temperature": 0,
}


def address(server):
    return server.url.replace("http", "ws", 1) + "/v1/chat/completions/ws"


def ask(socket, **change):
    socket.send(json.dumps({**ASKED, **change}))
    return until_done(socket)


def until_done(socket):
    chunks = []
    while (message := socket.recv(timeout=30)) != "[DONE]":
        chunks.append(json.loads(message))
        if "error" in chunks[-1]:
            break
    return chunks


def text_of(chunks):
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def test_one_connection_answers_one_request_after_another(server):
    whole = server.client().chat.completions.create(**ASKED).choices[0].message.content
    with connect(address(server)) as socket:
        assert text_of(ask(socket)) == whole
        error = ask(socket, temperature="hot")[-1]["error"]
        assert error["param"] == "temperature" and error["type"] == "invalid_request_error"
        socket.send("{broken")
        assert until_done(socket)[-1]["error"]["code"] == "malformed_json"
        assert ask(socket, stream=False)[-1]["error"]["param"] == "stream"
        usage = ask(socket, stream_options={"include_usage": True})[-1]["usage"]
        assert usage["completion_tokens"] >= 1
        assert text_of(ask(socket, model="tiny-documents", max_tokens=None)).strip()
    server.wait_until_idle()


def test_a_new_request_or_a_lost_client_ends_the_answer(server):
    long = {**ASKED, "max_tokens": 200, "ignore_eos": True}
    with connect(address(server)) as socket:
        socket.send(json.dumps(long))
        first = json.loads(socket.recv(timeout=30))["id"]
        socket.send(json.dumps(ASKED))
        ids = [chunk["id"] for chunk in until_done(socket)]
        assert ids[-1] != first and ids.count(first) < 100
        socket.send(json.dumps(long))
        socket.recv(timeout=30)
    server.wait_until_idle()


def test_a_message_beyond_the_limit_closes_the_connection(server):
    with connect(address(server)) as socket:
        socket.send("x" * 300_000)
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=30)


def test_other_sites_and_strangers_are_kept_out(server, build_engine, start, tmp_path):
    with pytest.raises(InvalidStatus) as caught, connect(address(server), origin="http://evil.example"):
        pass
    assert caught.value.response.status_code == 403
    secret = add_key(tmp_path / "keys.yaml", "alice")
    config = ServeConfig(api_key_file=tmp_path / "keys.yaml")
    with (
        build_engine() as engine,
        start(create_app(config, engine, engine.tokenizer, "tiny", None, None), engine) as guarded,
    ):
        with pytest.raises(InvalidStatus), connect(address(guarded)):
            pass
        with connect(address(guarded), additional_headers={"authorization": f"Bearer {secret}"}) as socket:
            assert text_of(ask(socket)) is not None


def test_each_message_is_a_request_to_its_keys_limits(build_engine, start, tmp_path):
    file = tmp_path / "keys.yaml"
    rated, poor = add_key(file, "rated", requests_per_minute=2, max_concurrent=1), add_key(file, "poor", token_budget=1)
    config = ServeConfig(api_key_file=file)
    with (
        build_engine() as engine,
        start(create_app(config, engine, engine.tokenizer, "tiny", None, None), engine) as guarded,
    ):
        header = {"authorization": f"Bearer {rated}"}
        with connect(address(guarded), additional_headers=header) as socket:
            with pytest.raises(InvalidStatus), connect(address(guarded), additional_headers=header):
                pass  # one open connection is all that the key may have
            assert ask(socket, temperature="hot")[-1]["error"]["param"] == "temperature"  # given back
            for _ in range(2):
                assert "error" not in ask(socket)[-1]
            assert ask(socket)[-1]["error"]["code"] == "rate_limit_exceeded"
        with connect(address(guarded), additional_headers={"authorization": f"Bearer {poor}"}) as socket:
            assert "error" not in ask(socket)[-1]
            assert ask(socket)[-1]["error"]["code"] == "insufficient_quota"
