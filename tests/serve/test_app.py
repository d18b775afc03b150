"""The application's edge: health, metrics, headers, other sites' scripts, and the engine going down."""

import concurrent.futures
import functools
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time

import httpx2
import pytest
from fastapi import FastAPI

from modelwright.base.errors import ConfigError
from modelwright.serve.app import Allowed, ServeConfig, create_app, serve

pytestmark = pytest.mark.service


def test_health_and_metrics_tell_what_happened(server):
    client = server.client()
    before = httpx2.get(server.url + "/metrics").text
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=5, temperature=0
    )
    after = httpx2.get(server.url + "/metrics").text

    def value(text, name):
        return next((float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name)), 0.0)

    for kind, count in (("prompt", answer.usage.prompt_tokens), ("completion", answer.usage.completion_tokens)):
        name = f'modelwright_tokens_total{{kind="{kind}"}}'
        assert value(after, name) - value(before, name) == count
    name = 'modelwright_requests_total{route="/v1/chat/completions",status="200"}'
    assert value(after, name) - value(before, name) == 1
    assert value(after, "modelwright_engine_total_blocks") == server.engine.stats().total_blocks
    assert value(after, 'modelwright_running_answers{model="tiny"}') == 0
    assert httpx2.get(server.url + "/health/live").json() == {"status": "live"}
    ready = httpx2.get(server.url + "/health/ready").json()
    assert ready["status"] == "ready" and ready["steps"] == server.engine.stats().num_steps


def test_every_answer_carries_the_security_headers_and_a_request_id(server):
    for path in ("/", "/v1/models", "/nothing", "/page/style.css"):
        headers = httpx2.get(server.url + path, headers={"x-request-id": "mine"}).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["x-request-id"] == "mine"
    assert len(httpx2.get(server.url + "/v1/models", headers={"x-request-id": "x" * 500}).headers["x-request-id"]) == 24


@pytest.mark.parametrize("headers", [{"origin": "http://evil.example"}, {"origin": "null"}, {"host": "evil.example"}])
def test_pages_of_other_sites_are_refused(server, headers):
    response = httpx2.get(server.url + "/api/info", headers=headers)
    assert response.status_code == 403 and response.json()["error"]["code"] in ("foreign_origin", "unknown_host")
    assert "access-control-allow-origin" not in response.headers


def test_the_own_page_and_a_doubled_slash_pass(server):
    assert httpx2.get(server.url + "/api/info", headers={"origin": server.url}).status_code == 200
    assert httpx2.get(server.url + "/v1//models").status_code == 200


def test_nothing_outside_the_page_folder_is_served(server):
    for name in ("../secret.txt", "%2e%2e/secret.txt", "..%2fsecret.txt", "/etc/passwd", "nothing.css"):
        assert httpx2.get(f"{server.url}/page/{name}").status_code == 404
    assert httpx2.get(server.url + "/").text.startswith("<!doctype html>")
    assert httpx2.get(server.url + "/page/style.css").headers["content-type"].startswith("text/css")


def test_an_engine_that_is_down_is_a_503_that_may_be_retried(start, build_engine):
    engine = build_engine()
    with start(create_app(ServeConfig(), engine, engine.tokenizer, "tiny", None, None), engine) as server:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        assert httpx2.post(server.url + "/v1/chat/completions", json=body).status_code == 200
        engine.stop()
        response = httpx2.post(server.url + "/v1/chat/completions", json=body)
        assert response.status_code == 503 and response.json()["error"]["code"] == "engine_down"
        assert response.headers["retry-after"]
        assert httpx2.get(server.url + "/health/ready").status_code == 503
        assert httpx2.get(server.url + "/health/live").status_code == 200


def test_an_engine_that_stops_in_the_middle_ends_the_stream_with_an_error(start, build_engine, parse_events):
    engine = build_engine()
    with start(create_app(ServeConfig(), engine, engine.tokenizer, "tiny", None, None), engine) as server:
        body = {"model": "tiny", "prompt": "The", "max_tokens": 250, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", server.url + "/v1/completions", json=body, timeout=30) as response:
            pieces = response.iter_text()
            text = next(pieces)
            engine.stop()
            text += "".join(pieces)
        last = parse_events(text)[-1]
        assert last["error"]["code"] == "engine_down" and "stopped" in last["error"]["message"]


def test_a_full_queue_turns_requests_away(start, build_engine, monkeypatch):
    with build_engine(max_running=1) as engine:
        config = ServeConfig(max_waiting=2)
        with start(create_app(config, engine, engine.tokenizer, "tiny", None, None), engine) as server:
            body = {"model": "tiny", "prompt": "The heap", "max_tokens": 3, "ignore_eos": True}
            gate, step = threading.Event(), engine.engine.step
            monkeypatch.setattr(engine.engine, "step", lambda: (gate.wait(60), step())[1])  # until opened, none ends
            with concurrent.futures.ThreadPoolExecutor(12) as pool:
                try:
                    url = server.url + "/v1/completions"
                    waiting = [pool.submit(httpx2.post, url, json=body, timeout=60) for _ in range(4)]
                    while engine.stats().waiting < config.max_waiting:  # one is in the step that is held
                        time.sleep(0.01)
                    refused = [httpx2.post(url, json=body, timeout=60) for _ in range(3)]
                finally:
                    gate.set()
                answers = [future.result() for future in waiting]
            assert [a.status_code for a in answers].count(200) >= 2
            assert {a.status_code for a in refused} == {503}
            assert all(a.headers["retry-after"] == "1" for a in refused)
            assert all(a.json()["error"]["code"] == "overloaded" for a in refused)
            server.wait_until_idle()


def test_a_crowd_in_one_moment_never_waits_in_more_places_than_there_are(start, build_engine, monkeypatch):
    with build_engine(max_running=1) as engine:
        config = ServeConfig(max_waiting=3)
        with start(create_app(config, engine, engine.tokenizer, "tiny", None, None), engine) as server:
            gate, step = threading.Event(), engine.engine.step
            monkeypatch.setattr(engine.engine, "step", lambda: (gate.wait(60), step())[1])
            body = {"model": "tiny", "prompt": "The heap", "max_tokens": 3, "ignore_eos": True}
            ask = functools.partial(httpx2.post, server.url + "/v1/completions", timeout=60)
            with concurrent.futures.ThreadPoolExecutor(30) as pool:
                crowd = [pool.submit(ask, json={**body, "stream": i % 2 == 0}) for i in range(30)]
                try:
                    while sum(one.done() for one in crowd) < 27:
                        assert engine.stats().waiting <= config.max_waiting
                        time.sleep(0.005)
                finally:
                    gate.set()
            assert sorted(one.result().status_code for one in crowd) == [200] * 3 + [503] * 27
            server.wait_until_idle()


def test_a_request_for_more_than_may_ever_wait_is_the_clients_mistake(start, build_engine):
    with build_engine() as engine:
        config = ServeConfig(max_waiting=8)
        with start(create_app(config, engine, engine.tokenizer, "tiny", None, None), engine) as server:
            body = {"model": "tiny", "prompt": "The heap", "max_tokens": 2}
            for more in ({"n": 9}, {"prompt": ["a"] * 3, "n": 3}, {"best_of": 9}):
                refused = httpx2.post(server.url + "/v1/completions", json={**body, **more}, timeout=60)
                assert refused.status_code == 400, refused.text
                assert refused.json()["error"]["code"] == "too_many_completions"
            for more in ({"n": 8}, {"prompt": ["a"] * 4, "n": 2}):
                answer = httpx2.post(server.url + "/v1/completions", json={**body, **more}, timeout=60)
                assert len(answer.json()["choices"]) == 8


def test_what_contradicts_itself_is_refused_before_anything_starts(build_engine, tmp_path, index):
    with pytest.raises(ConfigError, match="otlp_endpoint is 'localhost:4318'; expected a URL"):
        ServeConfig(otlp_endpoint="localhost:4318")
    engine = build_engine()
    with pytest.raises(ConfigError, match="nothing to serve"):
        create_app(ServeConfig(), None, None, "tiny", None, None)
    with pytest.raises(ConfigError, match="needs a model"):
        create_app(ServeConfig(answer_mode="generated"), None, None, "tiny", index, None)
    with pytest.raises(ConfigError, match="no index.html"):
        create_app(ServeConfig(), engine, engine.tokenizer, "tiny", None, tmp_path)
    with pytest.raises(ConfigError, match="max_waiting is 0"):
        ServeConfig(max_waiting=0)


def test_requests_that_do_not_move_make_the_server_unready(start, build_engine):
    with build_engine() as engine:
        app = create_app(ServeConfig(stall_seconds=0.2), engine, engine.tokenizer, "tiny", None, None)
        with start(app, engine) as server:
            pulse = app.state.served.pulse
            pulse.start()  # a request that gets no piece
            time.sleep(0.4)
            response = httpx2.get(server.url + "/health/ready")
            assert response.status_code == 503 and "nothing has moved" in response.json()["error"]["message"]
            body = {"model": "tiny", "prompt": "The heap", "max_tokens": 2}
            assert httpx2.post(server.url + "/v1/completions", json=body).status_code == 200
            assert httpx2.get(server.url + "/health/ready").status_code == 200  # the engine's steps are progress
            pulse.stop()
            time.sleep(0.4)
            assert httpx2.get(server.url + "/health/ready").status_code == 200  # nothing to do is no stall


def test_other_sites_may_ask_only_when_they_are_named(build_engine, start):
    config = ServeConfig(allowed=Allowed(origins=("https://app.example.org",)))
    with (
        build_engine() as engine,
        start(create_app(config, engine, engine.tokenizer, "tiny", None, None), engine) as server,
    ):
        named, other = {"origin": "https://app.example.org"}, {"origin": "https://evil.example.org"}
        answer = httpx2.get(f"{server.url}/v1/models", headers=named)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.example.org"
        refused = httpx2.get(f"{server.url}/v1/models", headers=other)
        assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        assert httpx2.options(f"{server.url}/v1/models", headers=named | asked).status_code == 200
        assert httpx2.options(f"{server.url}/v1/models", headers=other | asked).status_code == 400


def test_https_with_a_certificate_and_a_broken_one_is_refused(tmp_path, free_port):
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*make, *files, *name], check=True, capture_output=True)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom conftest import make_engine\n"
        "from modelwright.serve.app import ServeConfig, create_app, serve\n"
        "with make_engine() as engine:\n"
        "    app = create_app(ServeConfig(), engine, engine.tokenizer, 'tiny', None, None)\n"
        "    serve(app, port=int(sys.argv[2]), tls=(Path(sys.argv[3]), Path(sys.argv[4])))\n"
    )
    here = os.path.dirname(__file__)
    parts = [sys.executable, "-c", program, here, str(free_port), str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")]
    process = subprocess.Popen(parts)
    try:
        trust = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        deadline = time.monotonic() + 60
        while True:
            try:
                answer = httpx2.get(f"https://localhost:{free_port}/v1/models", verify=trust)
                break
            except httpx2.ConnectError:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.1)
        assert answer.json()["data"][0]["id"] == "tiny"
    finally:
        process.kill()
        process.wait(10)
    (tmp_path / "cert.pem").write_text("nonsense")
    with pytest.raises(ConfigError, match="cannot be used"):
        serve(FastAPI(), port=free_port, tls=(tmp_path / "cert.pem", tmp_path / "key.pem"))
