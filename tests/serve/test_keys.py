"""Keys: who may ask, for what, how much; and that no key leaks or is guessed from a file."""

import math
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest
import yaml

from modelwright.base.errors import ConfigError
from modelwright.serve.app import ServeConfig, create_app
from modelwright.serve.keys import KeyConfig, KeyMeter, KeyRing, LimitError, add_key, digest_of

HELLO = [{"role": "user", "content": "Hello"}]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def meter(clock: Clock, **limits: Any) -> KeyMeter:
    return KeyMeter(KeyConfig("a", digest_of("x"), **limits), clock=clock)


def test_requests_refill_steadily():
    clock = Clock()
    one = meter(clock, requests_per_minute=3)
    for _ in range(3):
        one.enter()
    with pytest.raises(LimitError, match="3 requests a minute. Wait 20.0 seconds") as caught:
        one.enter()
    assert caught.value.status == 429 and caught.value.retry_after == 20
    clock.now = 20.0
    one.enter()
    with pytest.raises(LimitError):
        one.enter()
    clock.now = 1000.0  # no more than a minute's worth is saved up
    for _ in range(3):
        one.enter()
    with pytest.raises(LimitError):
        one.enter()


def test_tokens_may_be_overdrawn_once_and_are_waited_for():
    clock = Clock()
    one = meter(clock, tokens_per_minute=60)
    one.enter()
    one.spend(90)
    with pytest.raises(LimitError, match="60 tokens a minute") as caught:
        one.enter()
    assert caught.value.retry_after == 31
    clock.now = 31.0
    one.enter()


def test_what_was_refused_is_given_back_and_a_flood_of_it_ends():
    clock = Clock()
    one = meter(clock, requests_per_minute=3)
    for _ in range(3):
        one.enter()
        one.leave()
        one.give_back()
    with pytest.raises(LimitError, match="3 refused requests a minute. Wait 20.0 seconds"):
        one.enter()
    assert one.num_running == 0
    clock.now = 20.0
    for _ in range(2):  # what was given back is there; one refusal more may come
        one.enter()
    one.give_back()
    with pytest.raises(LimitError, match="refused"):
        one.enter()


def test_concurrency_and_budget():
    one = meter(Clock(), max_concurrent=2, token_budget=10)
    one.enter()
    one.enter()
    with pytest.raises(LimitError, match="2 requests running"):
        one.enter()
    one.leave()
    one.enter()
    one.leave()
    one.leave()
    one.spend(10)
    with pytest.raises(LimitError, match="budget of 10 tokens") as caught:
        one.enter()
    assert caught.value.code == "insufficient_quota"


def test_the_file_keeps_no_key_and_is_readable_by_its_owner_alone(tmp_path: Path):
    file = tmp_path / "keys.yaml"
    secret = add_key(file, "ann", requests_per_minute=5)
    other = add_key(file, "bob", scopes=["metrics"])
    assert secret.startswith("mw-") and len(secret) > 40 and secret != other
    assert secret not in file.read_text() and other not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    ring = KeyRing.load(file)
    found = ring.find(secret)
    assert found is not None and found.config.name == "ann" and found.config.requests_per_minute == 5
    assert ring.find(secret + "x") is None and ring.find("") is None and ring.find("\udcff") is None
    before = file.read_text()
    with pytest.raises(ConfigError, match="named 'ann' already"):
        add_key(file, "ann")
    with pytest.raises(ConfigError, match="scope 'root'; known: inference"):
        add_key(file, "eve", scopes=["root"])
    assert file.read_text() == before


def test_spending_outlives_the_process(tmp_path: Path):
    file = tmp_path / "keys.yaml"
    secret = add_key(file, "ann", token_budget=100)
    ring = KeyRing.load(file)
    ring.find(secret).spend(70)  # type: ignore[union-attr]
    ring.save_usage()
    again = KeyRing.load(file).find(secret)
    assert again is not None and again.spent == 70


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no keys"),
        ("a: 1", "expected a list of keys"),
        ("- [", "is not YAML .line"),
        ("- name: x", "has no sha256"),
        ("- {name: x, sha256: abc}", "no SHA-256"),
        (f"- {{name: x, sha256: {'a' * 64}, rpm: 4}}", "field 'rpm'; known:"),
        (f"- {{name: x, sha256: {'a' * 64}, max_concurrent: 0}}", "max_concurrent 0"),
        ("- {name: x, key: mw-secret-in-the-open}", "stands there in the open"),
        (f"- {{name: x, sha256: {'a' * 64}}}\n- {{name: x, sha256: {'b' * 64}}}", "'x' twice"),
    ],
)
def test_a_wrong_file_is_refused_without_quoting_it(tmp_path: Path, text: str, words: str):
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        KeyRing.load(file)
    assert "mw-secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyRing.load(tmp_path / "nowhere.yaml")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, page: Path, request: Any) -> Iterator[Any]:
    from tests.serve.conftest import make_engine, running

    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    secrets = {
        "ann": add_key(file, "ann"),
        "bob": add_key(file, "bob", requests_per_minute=2),
        "cat": add_key(file, "cat", max_concurrent=1, token_budget=10_000),
        "dan": add_key(file, "dan", requests_per_minute=10),
        "eve": add_key(file, "eve", requests_per_minute=3),
        "ops": add_key(file, "ops", scopes=["metrics"]),
        "boss": add_key(file, "boss", scopes=["admin"]),
    }
    with make_engine() as engine:
        config = ServeConfig(api_key_file=file)
        app = create_app(config, engine, engine.tokenizer, "tiny", None, page)
        with running(app, engine) as started:
            started.secrets, started.file = secrets, file
            yield started


def client(guarded: Any, name: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=guarded.secrets[name], max_retries=0, timeout=60)


def test_nothing_but_the_page_and_the_probes_is_open(guarded):
    assert httpx2.get(f"{guarded.url}/").status_code == 200
    assert httpx2.get(f"{guarded.url}/health/live").status_code == 200
    for path in ("/v1/models", "/api/info", "/metrics", "/openapi.json", "/v1/nothing", "//v1/models"):
        response = httpx2.get(guarded.url + path)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "missing_api_key"
    wrong = httpx2.get(f"{guarded.url}/v1/models", headers={"authorization": "Bearer mw-guess"})
    assert wrong.status_code == 401 and "mw-guess" not in wrong.text
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="no", max_retries=0).models.list()
    with pytest.raises(anthropic.AuthenticationError, match="authentication_error"):
        anthropic.Anthropic(base_url=guarded.url, api_key="no", max_retries=0).messages.create(
            model="tiny", max_tokens=4, messages=HELLO
        )


def test_a_key_opens_what_its_scopes_say(guarded):
    answer = client(guarded, "ann").chat.completions.create(model="tiny", messages=HELLO, max_tokens=4)
    assert answer.choices[0].message.content is not None
    same = anthropic.Anthropic(base_url=guarded.url, api_key=guarded.secrets["ann"], max_retries=0)
    assert same.messages.create(model="tiny", max_tokens=4, messages=HELLO).role == "assistant"
    header = {"x-api-key": guarded.secrets["ann"]}
    assert httpx2.get(f"{guarded.url}/v1/models", headers=header).status_code == 200
    assert httpx2.get(f"{guarded.url}/metrics", headers=header).status_code == 403
    header = {"authorization": f"Bearer {guarded.secrets['ops']}"}
    metrics = httpx2.get(f"{guarded.url}/metrics", headers=header)
    assert metrics.status_code == 200 and not any(s in metrics.text for s in guarded.secrets.values())
    with pytest.raises(openai.PermissionDeniedError, match="'ops' may not use"):
        client(guarded, "ops").chat.completions.create(model="tiny", messages=HELLO)


def test_rates_are_429_with_a_time_to_come_back(guarded):
    bob = client(guarded, "bob")
    for _ in range(2):
        bob.completions.create(model="tiny", prompt="A", max_tokens=1)
    with pytest.raises(openai.RateLimitError) as caught:
        bob.completions.create(model="tiny", prompt="A", max_tokens=1)
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30
    assert bob.models.list()  # reading what there is costs nothing


def test_a_clients_mistake_does_not_use_up_its_rate(guarded):
    eve, hello = client(guarded, "eve"), {"model": "tiny", "prompt": "A", "max_tokens": 1}
    with pytest.raises(openai.BadRequestError):
        eve.completions.create(**{**hello, "max_tokens": 10_000})
    with pytest.raises(openai.NotFoundError):
        eve.completions.create(**{**hello, "model": "none"})
    for _ in range(3):
        eve.completions.create(**hello)
    with pytest.raises(openai.RateLimitError, match="3 requests a minute"):
        eve.completions.create(**hello)


def test_concurrency_is_held_and_freed_and_spending_is_kept(guarded):
    cat = client(guarded, "cat")

    def ask(_: int) -> int:
        try:
            cat.completions.create(model="tiny", prompt="word " * 20, max_tokens=100, extra_body={"ignore_eos": True})
        except openai.RateLimitError:
            return 429
        return 200

    with ThreadPoolExecutor(6) as threads:
        statuses = list(threads.map(ask, range(6)))
    assert 200 in statuses and 429 in statuses
    assert ask(0) == 200  # all places were given back
    usage = yaml.safe_load((guarded.file.parent / "keys.yaml.usage.json").read_text())
    assert usage["cat"] >= 100


def test_a_crowd_at_once_gets_exactly_what_the_limit_lets_in(guarded):
    dan, begun = client(guarded, "dan"), time.monotonic()

    def ask(_: int) -> int:
        try:
            dan.completions.create(model="tiny", prompt="A", max_tokens=1)
        except openai.RateLimitError as error:
            assert int(error.response.headers["retry-after"]) >= 1
            return 429
        return 200

    with ThreadPoolExecutor(25) as threads:
        statuses = list(threads.map(ask, range(100)))
    refilled = math.ceil((time.monotonic() - begun) * 10 / 60)
    assert 10 <= statuses.count(200) <= 10 + refilled and set(statuses) == {200, 429}


def test_nobody_but_an_admin_goes_before_the_others(guarded):
    hello = {"model": "tiny", "prompt": "A", "max_tokens": 1}
    with pytest.raises(openai.PermissionDeniedError, match="priority is -1"):
        client(guarded, "ann").completions.create(**hello, extra_body={"priority": -1})
    assert client(guarded, "ann").completions.create(**hello, extra_body={"priority": 1}).choices
    assert client(guarded, "boss").completions.create(**hello, extra_body={"priority": -1}).choices


def test_prefixes_are_not_shared_between_keys(guarded):
    turns = [{"role": "user", "content": "A rather long question about nothing at all, " * 3}]
    asked: dict[str, Any] = dict(model="tiny", messages=turns, max_tokens=2)
    client(guarded, "ann").chat.completions.create(**asked)
    again = client(guarded, "ann").chat.completions.create(**asked)
    other = client(guarded, "cat").chat.completions.create(**asked)
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    assert other.usage.prompt_tokens_details.cached_tokens == 0
