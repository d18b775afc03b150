"""``mw serve`` as a process of its own: it answers, and Ctrl-C ends it cleanly."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Toy

from modelwright.base.errors import ConfigError
from modelwright.cli.main import main
from modelwright.cli.server import Plan, start_with
from modelwright.serve.port import Address
from modelwright.serve.served import ServeConfig

pytestmark = pytest.mark.service
MW = [sys.executable, "-c", "from modelwright.cli.main import run; run()"]


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        text = reply.read().decode()
    return json.loads(text) if "json" in reply.headers["content-type"] else text


def test_a_model_and_an_index_are_served_until_ctrl_c(toy: Toy, tmp_path: Path, free_port: int):
    index = tmp_path / "index"
    assert main(["index", str(toy.documents), "--out", str(index), "--has_vectors=false"]) == 0
    command = [*MW, "serve", str(toy.model), "--index", str(index), "--port", str(free_port), "--name", "toy"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = re.search(r"http://[\d.:]+", server.stdout.readline())
        assert address is not None
        wait_until_live(address[0])
        assert "<html" in ask(address[0] + "/")
        assert [model["id"] for model in ask(address[0] + "/v1/models")["data"]] == ["toy", "toy-documents"]
        question = {"role": "user", "content": "What does textwrap.dedent do?"}
        for model, settings in (("toy", {"max_tokens": 8}), ("toy-documents", {})):
            body = {"model": model, "messages": [question], **settings}
            reply = ask(address[0] + "/v1/chat/completions", body)
            assert reply["choices"][0]["message"]["role"] == "assistant"
        server.send_signal(signal.SIGINT)
        shown, complaints = server.communicate(timeout=30)
        assert server.returncode == 0, complaints
        assert "Traceback" not in complaints and "error" not in complaints
    finally:
        server.kill()
        server.communicate()


def wait_until_live(address: str) -> None:
    for _ in range(200):
        try:
            assert ask(address + "/health/live")["status"] == "live"
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{address} did not come up")


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_several_adapters_stand_behind_one_flag(toy: Toy, free_port: int, capsys: pytest.CaptureFixture[str]):
    command = ["serve", str(toy.model), "--port", str(free_port), "--adapters", "law=nowhere", "poems=nowhere"]
    assert main(command) == 1
    assert "nowhere/adapter_config.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("engine", "count", "config", "said"),
    [
        ("local", 2, ServeConfig(), "need --engine ray"),
        ("cluster", 1, ServeConfig(), "'local' or 'ray'"),
        ("ray", 0, ServeConfig(), "at least 1"),
        ("ray", 2, ServeConfig(trace_file=Path("t.jsonl")), "one process"),
        ("ray", 2, ServeConfig(adapter_dir=Path("adapters")), "--adapters where --engine is ray"),
    ],
)
def test_settings_of_replicas_that_contradict_each_other_are_refused(
    engine: str, count: int, config: ServeConfig, said: str
):
    with pytest.raises(ConfigError, match=said):
        start_with(engine, Plan(config, None, None, "nothing"), Address(), count)
