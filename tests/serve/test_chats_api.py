"""The page's conversations over HTTP: kept, shown to the model through a memory, each key's its own."""

import httpx2
import pytest

from modelwright.serve.app import ServeConfig, create_app
from modelwright.serve.keys import add_key

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def model_server(start, build_engine):
    with build_engine() as engine:
        app = create_app(ServeConfig(), engine, engine.tokenizer, "tiny", None, None)
        with start(app, engine) as server:
            yield server


def ask(server, id, question, **more):
    body = {"question": question, "temperature": 0, "max_tokens": 8, **more}
    answer = httpx2.post(f"{server.url}/api/chats/{id}/ask", json=body, timeout=60)
    return answer


def test_a_conversation_is_kept_and_goes_on(model_server, parse_events):
    url = model_server.url
    chat = httpx2.post(f"{url}/api/chats", json={"system": "Be brief."}).json()
    texts = []
    for question in ("What is a heap?", "And then?"):
        found = parse_events(ask(model_server, chat["id"], question).text)
        assert found[-1] == "[DONE]"
        texts.append("".join(c["delta"].get("content") or "" for e in found[:-1] for c in e["choices"]))
    shown = httpx2.get(f"{url}/api/chats/{chat['id']}").json()
    assert [(t["role"], t["content"]) for t in shown["turns"]] == [
        ("user", "What is a heap?"), ("assistant", texts[0]), ("user", "And then?"), ("assistant", texts[1]),
    ]  # fmt: skip
    turns = [{"role": "system", "content": "Be brief."}, *shown["turns"][:3]]
    whole = model_server.client().chat.completions.create(model="tiny", messages=turns, temperature=0, max_tokens=8)
    assert whole.usage.prompt_tokens < 192  # all of it was shown
    assert whole.choices[0].message.content == texts[1]
    assert httpx2.get(f"{url}/api/chats").json()["chats"][0]["title"] == "What is a heap?"
    assert httpx2.delete(f"{url}/api/chats/{chat['id']}").json()["deleted"]
    assert httpx2.get(f"{url}/api/chats/{chat['id']}").status_code == 404


def test_a_conversation_longer_than_the_context_goes_on(model_server, parse_events):
    id = httpx2.post(f"{model_server.url}/api/chats", json={}).json()["id"]
    for i in range(8):
        question = f"Tell me number {i} of the heap and the queue of lists."
        found = parse_events(ask(model_server, id, question, max_tokens=16).text)
        assert found[-1] == "[DONE]" and "error" not in found[0]
    assert len(httpx2.get(f"{model_server.url}/api/chats/{id}").json()["turns"]) == 16
    long = ask(model_server, id, "heap " * 400)
    assert long.status_code == 400 and long.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/api/chats", {"system": 5}, 400),
        ("/api/chats", {"colour": "red"}, 400),
        ("/api/chats/1/ask", {"question": " "}, 400),
        ("/api/chats/1/ask", {"question": "x", "n": 2}, 400),
        ("/api/chats/999999/ask", {"question": "x"}, 404),
        ("/api/chats/..%2f/ask", {"question": "x"}, 404),
    ],
)
def test_bad_requests_are_refused(model_server, path, body, status):
    answer = httpx2.post(model_server.url + path, json=body)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_keys_do_not_see_each_others_conversations(build_engine, start, tmp_path):
    secrets = [add_key(tmp_path / "keys.yaml", name) for name in ("alice", "bob")]
    config = ServeConfig(api_key_file=tmp_path / "keys.yaml", state_dir=tmp_path / "state")
    with (
        build_engine() as engine,
        start(create_app(config, engine, engine.tokenizer, "tiny", None, None), engine) as server,
    ):
        alice, bob = ({"authorization": f"Bearer {secret}"} for secret in secrets)
        id = httpx2.post(f"{server.url}/api/chats", json={}, headers=alice).json()["id"]
        body = {"question": "Mine?", "max_tokens": 4}
        assert httpx2.post(f"{server.url}/api/chats/{id}/ask", json=body, headers=alice, timeout=60).status_code == 200
        assert httpx2.post(f"{server.url}/api/chats/{id}/ask", json=body, headers=bob).status_code == 404
        assert httpx2.get(f"{server.url}/api/chats", headers=bob).json() == {"chats": []}
        assert len(httpx2.get(f"{server.url}/api/chats", headers=alice).json()["chats"]) == 1
    assert (tmp_path / "state" / "chats.sqlite").stat().st_mode & 0o077 == 0
