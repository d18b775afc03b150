"""Files and batches as the official client sees them; a server that is killed goes on with its batches."""

import json
import os
import signal
import subprocess
import sys
import time

import httpx2
import openai
import pytest

from modelwright.serve import batches_api
from modelwright.serve.app import ServeConfig, create_app
from modelwright.serve.batches_api import MAX_ERRORS
from modelwright.serve.keys import add_key

pytestmark = pytest.mark.service


def lines(count, **more):
    body = {"model": "tiny", "prompt": "The heap", "max_tokens": 4, "temperature": 0, **more}
    return [
        {"custom_id": f"row-{i}", "method": "POST", "url": "/v1/completions", "body": {**body, "prompt": f"The {i}"}}
        for i in range(count)
    ]


def upload(client, rows):
    data = b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)
    return client.files.create(file=("rows.jsonl", data), purpose="batch")


def wait(client, batch, seconds=60):
    deadline = time.monotonic() + seconds
    while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    return batch


def submit(client, rows, endpoint="/v1/completions"):
    sent = upload(client, rows)
    return client.batches.create(input_file_id=sent.id, endpoint=endpoint, completion_window="24h")


def content(client, name):
    return [json.loads(line) for line in client.files.content(name).text.splitlines()]


def test_files_come_back_as_they_were(server):
    client = server.client()
    data = os.urandom(3_000_000)
    sent = client.files.create(file=("../../etc/passwd", data), purpose="user_data")
    assert sent.bytes == 3_000_000 and sent.filename == "passwd" and sent.object == "file"
    assert client.files.content(sent.id).read() == data
    assert client.files.retrieve(sent.id).id == sent.id
    assert sent.id in [f.id for f in client.files.list(purpose="user_data")]
    assert sent.id not in [f.id for f in client.files.list(purpose="batch")]
    client.files.delete(sent.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(sent.id)


def test_lines_that_find_no_room_are_sent_again(start, build_engine, monkeypatch):
    monkeypatch.setattr(batches_api, "AGAIN_SECONDS", (0.01, 0.02))
    with build_engine(max_running=1) as engine:
        app = create_app(ServeConfig(max_waiting=1), engine, engine.tokenizer, "tiny", None, None)
        with start(app, engine) as server:
            client = server.client()
            alone = client.completions.create(**lines(12, max_tokens=40)[3]["body"]).choices[0].text
            batch = wait(client, submit(client, lines(12, max_tokens=40)))
            assert batch.request_counts.to_dict() == {"total": 12, "completed": 12, "failed": 0}
            told = {row["custom_id"]: row["response"]["body"] for row in content(client, batch.output_file_id)}
            assert told["row-3"]["choices"][0]["text"] == alone
            text = httpx2.get(server.url + "/metrics").text  # some of them did find none
            assert 'route="/v1/completions",status="503"' in text


def test_a_batch_answers_what_the_routes_answer(server):
    client = server.client()
    rows = lines(20)
    rows[7]["body"]["temperature"] = "hot"
    batch = wait(client, submit(client, rows))
    assert batch.status == "completed" and batch.request_counts.to_dict() == {"total": 20, "completed": 19, "failed": 1}
    answers = {row["custom_id"]: row["response"] for row in content(client, batch.output_file_id)}
    assert len(answers) == 19 and "row-7" not in answers
    for i in (0, 13):
        alone = client.completions.create(**rows[i]["body"])
        assert answers[f"row-{i}"]["body"]["choices"][0]["text"] == alone.choices[0].text
        assert answers[f"row-{i}"]["status_code"] == 200
    (error,) = content(client, batch.error_file_id)
    assert error["custom_id"] == "row-7" and error["response"]["status_code"] == 400
    assert error["response"]["body"]["error"]["param"] == "temperature"
    assert batch.id in [b.id for b in client.batches.list(limit=3)]


def test_chats_and_responses_go_in_batches_too(server):
    client = server.client()
    turns = [{"role": "user", "content": "What is a heap?"}]
    bodies = {
        "/v1/chat/completions": {"messages": turns, "max_tokens": 4},
        "/v1/responses": {"input": "What is a heap?", "max_output_tokens": 4},
    }
    for url, body in bodies.items():
        row = {"custom_id": "a", "url": url, "body": {"model": "tiny", "temperature": 0, **body}}
        batch = wait(client, submit(client, [row], url))
        (answer,) = content(client, batch.output_file_id)
        assert answer["response"]["body"]["model"] == "tiny"


def test_a_file_of_faults_fails_with_each_line_named(server):
    client = server.client()
    good = lines(1)[0]
    rows = [
        good,
        b"{broken\n",
        b"[1]\n",
        good,
        {**good, "custom_id": ""},
        {**good, "custom_id": "b", "url": "/v1/chat/completions"},
        {**good, "custom_id": "c", "method": "GET"},
        {**good, "custom_id": "d", "body": None},
        {**good, "custom_id": "e", "body": {"stream": True}},
    ]
    batch = wait(client, submit(client, rows))
    assert batch.status == "failed" and batch.output_file_id is None
    assert [(e.line, e.code) for e in batch.errors.data] == [
        (2, "invalid_json_line"), (3, "invalid_json_line"), (4, "duplicate_custom_id"),
        (5, "missing_required_parameter"), (6, "mismatched_endpoint"), (7, "invalid_method"), (8, "invalid_request"),
        (9, "invalid_request"),
    ]  # fmt: skip
    many = wait(client, submit(client, [b"x\n"] * 1000))
    assert len(many.errors.data) == MAX_ERRORS
    assert wait(client, submit(client, [b"\n"])).errors.data[0].code == "empty_file"


def test_a_batch_that_is_cancelled_keeps_what_it_has(server):
    client = server.client()
    batch = submit(client, lines(400, max_tokens=100, ignore_eos=True))
    deadline = time.monotonic() + 60
    while not client.batches.retrieve(batch.id).request_counts.completed and time.monotonic() < deadline:
        time.sleep(0.02)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = wait(client, batch)
    assert batch.status == "cancelled" and 0 < batch.request_counts.completed < 400
    assert len(content(client, batch.output_file_id)) == batch.request_counts.completed
    with pytest.raises(openai.BadRequestError, match="only a running one ends"):
        client.batches.cancel(batch.id)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"endpoint": "/v1/files"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"input_file_id": "../secret"}, "input_file_id"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bad_batches_name_the_field(server, body, param):
    full = {"endpoint": "/v1/completions", "completion_window": "24h", "input_file_id": "x", **body}
    if "input_file_id" not in body:
        full["input_file_id"] = upload(server.client(), lines(1)).id
    answer = httpx2.post(f"{server.url}/v1/batches", json=full)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_bad_uploads_are_refused(server):
    url = f"{server.url}/v1/files"
    assert httpx2.post(url, json={"purpose": "batch"}).json()["error"]["param"] == "content-type"
    assert httpx2.post(url, files={"file": ("a", b"x")}).json()["error"]["param"] == "purpose"
    assert httpx2.post(url, data={"purpose": "batch"}, files={"x": b"x"}).json()["error"]["param"] == "x"
    empty = httpx2.post(url, data={"purpose": "batch"}, files={"file": ("a", b"")})
    assert empty.status_code == 400 and "from 1 byte" in empty.json()["error"]["message"]
    broken = httpx2.post(url, content=b"--x\r\nnonsense", headers={"content-type": "multipart/form-data; boundary=x"})
    assert broken.status_code == 400
    for path in ("/v1/files/..%2f..%2fsecret/content", "/v1/batches/..%2fx"):
        assert httpx2.get(server.url + path).status_code == 404


def test_uploads_have_a_limit_and_keys_do_not_see_each_other(build_engine, start, tmp_path):
    secrets = {name: add_key(tmp_path / "keys.yaml", name) for name in ("alice", "bob")}
    config = ServeConfig(max_file_bytes=1000, api_key_file=tmp_path / "keys.yaml", state_dir=tmp_path / "state")
    with (
        build_engine() as engine,
        start(create_app(config, engine, engine.tokenizer, "tiny", None, None), engine) as server,
    ):
        alice, bob = (openai.OpenAI(base_url=f"{server.url}/v1", api_key=s, max_retries=0) for s in secrets.values())
        with pytest.raises(openai.APIStatusError) as caught:
            alice.files.create(file=("a", b"x" * 3_000_000), purpose="batch")
        assert caught.value.status_code == 413
        batch = submit(alice, lines(2))
        with pytest.raises(openai.NotFoundError):
            bob.batches.retrieve(batch.id)
        with pytest.raises(openai.NotFoundError):
            bob.files.retrieve(batch.input_file_id)
        assert list(bob.files.list()) == [] and list(bob.batches.list()) == []
        assert wait(alice, batch).request_counts.completed == 2
        meter = next(
            m for m in server.app.user_middleware[1].kwargs["keys"].meters.values() if m.config.name == "alice"
        )
        assert meter.spent > 0


def test_lines_wait_for_their_keys_rates_and_end_with_its_budget(build_engine, start, tmp_path, monkeypatch):
    file = tmp_path / "keys.yaml"
    monkeypatch.setattr(batches_api, "TURN_SECONDS", 0.01)
    rated, poor = add_key(file, "rated", requests_per_minute=4), add_key(file, "poor", token_budget=20)
    with build_engine() as engine:
        config = ServeConfig(api_key_file=file, state_dir=tmp_path / "state")
        app = create_app(config, engine, engine.tokenizer, "tiny", None, None)
        keys = app.user_middleware[1].kwargs["keys"]
        with start(app, engine) as server:
            asker, spender = (openai.OpenAI(base_url=f"{server.url}/v1", api_key=s) for s in (rated, poor))
            batch = submit(asker, lines(6))  # sending the file and the batch took two of the four
            deadline = time.monotonic() + 30
            while asker.batches.retrieve(batch.id).request_counts.completed < 2:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(0.2)
            assert asker.batches.retrieve(batch.id).request_counts.completed == 2
            keys.find(rated)._requests.take(-4)  # a minute later
            assert wait(asker, batch).request_counts.completed == 6
            batch = wait(spender, submit(spender, lines(12)))
            assert 0 < batch.request_counts.completed < 12
            refused = content(spender, batch.error_file_id)
            assert {row["response"]["status_code"] for row in refused} == {429}
            assert {row["response"]["body"]["error"]["code"] for row in refused} == {"insufficient_quota"}
            spent = json.loads((tmp_path / "keys.yaml.usage.json").read_text())["poor"]
            assert spent == keys.find(poor).spent >= 20


PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from conftest import make_engine
from modelwright.serve.app import ServeConfig, create_app, serve
with make_engine() as engine:
    app = create_app(ServeConfig(state_dir=Path(sys.argv[1])), engine, engine.tokenizer, "tiny", None, None)
    print("at work", flush=True)
    serve(app, port=int(sys.argv[3]))
"""


def test_a_killed_server_goes_on_with_its_batch(tmp_path, free_port):
    here = os.path.dirname(__file__)

    def begin():
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "state"), here, str(free_port)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None and process.stdout.readline() == b"at work\n"
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{free_port}/v1", api_key="x", max_retries=8)
        client.models.list()
        return process, client

    process, client = begin()
    try:
        batch = submit(client, lines(120, max_tokens=40, ignore_eos=True))
        deadline = time.monotonic() + 60
        while client.batches.retrieve(batch.id).request_counts.completed < 10 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        (output,) = (tmp_path / "state" / "batches").glob("*.jsonl")
        with open(output, "a", encoding="utf-8") as handle:
            handle.write('{"custom_id": "row-119", "resp')  # as a kill in the middle of a line leaves it
        before = len(output.read_bytes().splitlines()) - 1
        process, client = begin()
        batch = wait(client, client.batches.retrieve(batch.id))
        rows = content(client, batch.output_file_id)
        assert batch.status == "completed" and batch.request_counts.completed == 120 and 10 <= before < 120
        assert sorted(row["custom_id"] for row in rows) == sorted(f"row-{i}" for i in range(120))
    finally:
        process.kill()
        process.wait(10)
