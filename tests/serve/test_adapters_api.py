"""Adapters over HTTP: asked for by model name, listed with their parent, managed from one folder by admins alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.engine.llm import LLM
from modelwright.nn.lora import add_lora, lora_parameters
from modelwright.serve.app import ServeConfig, create_app
from modelwright.serve.keys import add_key
from modelwright.serve.trace import replay
from modelwright.train.adapter import save_adapter

HELLO: Any = [{"role": "user", "content": "textwrap wraps"}]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, build_engine: Any, start: Any) -> Iterator[Any]:
    root = tmp_path_factory.mktemp("tuned")
    for seed, name in enumerate(("law", "poems", "outside")):
        with build_engine() as other:
            model = other.engine.model
            add_lora(model, ("q", "o", "down"), rank=4)
            with torch.no_grad():
                for parameter in lora_parameters(model):
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
            save_adapter(model, root / name if name == "outside" else root / "adapters" / name)
    (root / "adapters" / "bad").mkdir()
    (root / "adapters" / "link").symlink_to(root / "outside")
    file = root / "keys.yaml"
    keys = {name: add_key(file, name, scopes=[scope]) for name, scope in (("ann", "inference"), ("ops", "admin"))}
    with build_engine() as engine:
        config = ServeConfig(adapter_dir=root / "adapters", api_key_file=file)
        app = create_app(config, engine, engine.tokenizer, "tiny", None, None)
        with start(app, engine) as started:
            started.keys, started.root = keys, root
            yield started


def post(tuned: Any, route: str, who: str = "ops", **body: Any) -> httpx2.Response:
    header = {"authorization": f"Bearer {tuned.keys[who]}"}
    return httpx2.post(f"{tuned.url}/v1/{route}_lora_adapter", json=body, headers=header)


def ask(tuned: Any, model: str) -> str:
    client = openai.OpenAI(base_url=f"{tuned.url}/v1", api_key=tuned.keys["ann"], max_retries=0)
    answer = client.completions.create(model=model, prompt="textwrap wraps", max_tokens=12, temperature=0)
    assert answer.model == model
    chat = client.chat.completions.create(model=model, messages=HELLO, max_tokens=8, temperature=0)
    assert chat.model == model
    return answer.choices[0].text + "|" + str(chat.choices[0].message.content)


def test_adapters_come_answer_under_their_names_and_go(tuned):
    base = ask(tuned, "tiny")
    for name in ("law", "poems"):
        response = post(tuned, "load", lora_name=name, lora_path=name)
        assert response.status_code == 200, response.text
    assert len({ask(tuned, name) for name in ("tiny", "law", "poems")}) == 3
    client = openai.OpenAI(base_url=f"{tuned.url}/v1", api_key=tuned.keys["ann"], max_retries=0)
    assert {m.id: getattr(m, "parent", None) for m in client.models.list()} == {
        "tiny": None,
        "law": "tiny",
        "poems": "tiny",
    }
    same = anthropic.Anthropic(base_url=tuned.url, api_key=tuned.keys["ann"], max_retries=0)
    message = same.messages.create(model="law", max_tokens=8, messages=HELLO, extra_body={"temperature": 0})
    assert message.model == "law" and message.content[0].text == ask(tuned, "law").split("|")[1]
    response = client.responses.create(model="poems", input="textwrap wraps", max_output_tokens=8, temperature=0)
    assert response.output_text == ask(tuned, "poems").split("|")[1]
    assert post(tuned, "unload", lora_name="law").status_code == 200
    with pytest.raises(openai.NotFoundError, match="'law' is not served here"):
        ask(tuned, "law")
    assert post(tuned, "unload", lora_name="law").status_code == 404
    assert ask(tuned, "tiny") == base
    assert post(tuned, "unload", lora_name="poems").status_code == 200


@pytest.mark.parametrize(
    "path", ["../outside", "/etc", "link", ".", "", "nowhere", "law/adapter_config.json", "a\0b", "x" * 5000]
)
def test_no_path_leaves_the_folder(tuned, path):
    response = post(tuned, "load", lora_name="x", lora_path=path)
    assert response.status_code == 400 and response.json()["error"]["param"] == "lora_path"
    assert "x" not in {m["id"] for m in _models(tuned)}


def _models(tuned: Any) -> list[dict[str, Any]]:
    header = {"x-api-key": tuned.keys["ann"]}
    return list(httpx2.get(f"{tuned.url}/v1/models", headers=header).json()["data"])


@pytest.mark.parametrize("body", [
    {"lora_name": "tiny", "lora_path": "law"},
    {"lora_name": "../x", "lora_path": "law"},
    {"lora_name": 3, "lora_path": "law"},
    {"lora_name": "x"},
    {"lora_name": "x", "lora_path": "law", "base_model_name": "tiny"},
    {"lora_name": "x", "lora_path": "bad"},
])  # fmt: skip
def test_wrong_bodies_are_400_and_harm_nothing(tuned, body):
    before = ask(tuned, "tiny")
    assert post(tuned, "load", **body).status_code == 400
    assert ask(tuned, "tiny") == before


def test_a_name_is_replaced_only_when_asked(tuned):
    assert post(tuned, "load", lora_name="x", lora_path="law").status_code == 200
    law = ask(tuned, "x")
    assert post(tuned, "load", lora_name="x", lora_path="poems").status_code == 400
    assert post(tuned, "load", lora_name="x", lora_path="poems", load_inplace=True).status_code == 200
    assert ask(tuned, "x") != law
    post(tuned, "unload", lora_name="x")


def test_only_admins_manage(tuned):
    for route in ("load", "unload"):
        response = post(tuned, route, who="ann", lora_name="x", lora_path="law")
        assert response.status_code == 403 and "scope 'admin'" in response.json()["error"]["message"]
        assert httpx2.post(f"{tuned.url}/v1/{route}_lora_adapter", json={}).status_code == 401


def test_without_a_folder_nothing_is_loaded_over_the_network(server, tuned, tmp_path: Path):
    body = {"lora_name": "x", "lora_path": str(tuned.root / "adapters" / "law")}
    response = httpx2.post(f"{server.url}/v1/load_lora_adapter", json=body)
    assert response.status_code == 403 and "--adapter-dir" in response.json()["error"]["message"]
    with pytest.raises(ConfigError, match="that of a model served here"):
        server.app.state.served.load_adapter("tiny", tmp_path)


def test_a_trace_tells_adapters_apart(tuned, build_engine, start, tmp_path: Path):
    folder = tuned.root / "adapters" / "law"
    with build_engine() as engine:
        config = ServeConfig(adapters=(("law", folder),), trace_file=tmp_path / "trace.jsonl")
        app = create_app(config, engine, engine.tokenizer, "tiny", None, None)
        with start(app, engine) as started:
            for model in ("tiny", "law"):
                body = {"model": model, "prompt": "textwrap", "max_tokens": 8, "temperature": 0}
                assert httpx2.post(f"{started.url}/v1/completions", json=body).status_code == 200
        model, tokenizer = engine.engine.model, engine.tokenizer
    llm = LLM(model, tokenizer=tokenizer)
    assert replay(tmp_path / "trace.jsonl", llm).num_skipped == 1
    llm.load_adapter("again", folder)
    replayed = replay(tmp_path / "trace.jsonl", llm)
    assert (replayed.num_completions, replayed.num_skipped, replayed.differences) == (2, 0, [])
