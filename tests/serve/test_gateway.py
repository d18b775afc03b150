"""The gateway against servers that speak each protocol, our own among them, and that fail in every way."""

import email.utils
import http.server
import json
import threading
import time

import numpy as np
import pytest

from modelwright.base.errors import ConfigError, RequestError
from modelwright.base.types import Completion, Delta, Message, SamplingParams, Usage
from modelwright.cli.main import main
from modelwright.serve.endpoint import AllFailedError, Breaker, EndpointConfig, EndpointError, retry_after
from modelwright.serve.gateway import BudgetError, Gateway, GatewayConfig
from modelwright.serve.ledger import CacheConfig

pytestmark = pytest.mark.service
TALK = [Message("system", "Be brief."), Message("user", "What is a heap?")]
GREEDY = SamplingParams(temperature=0, max_tokens=8)
KEY = "sk-very-secret-key"


def sse(*events):
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events)


# What each service answers, whole and streamed, as its API reference shows it.
BODIES = {
    "openai": {
        "choices": [{"message": {"role": "assistant", "content": "a tree"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
    },
    "anthropic": {
        "content": [{"type": "text", "text": "a tree"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 5, "output_tokens": 2, "cache_read_input_tokens": 4},
    },
    "gemini": {
        "candidates": [{"content": {"parts": [{"text": "a tree"}], "role": "model"}, "finishReason": "STOP"}],
        "usageMetadata": {"promptTokenCount": 9, "candidatesTokenCount": 2, "cachedContentTokenCount": 4},
    },
    "cohere": {
        "message": {"role": "assistant", "content": [{"type": "text", "text": "a tree"}]},
        "finish_reason": "COMPLETE",
        "usage": {"tokens": {"input_tokens": 9, "output_tokens": 2}},
    },
    "ollama": {
        "message": {"role": "assistant", "content": "a tree"},
        "done": True,
        "done_reason": "stop",
        "prompt_eval_count": 9,
        "eval_count": 2,
    },
}
STREAMS = {
    "openai": sse(
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"content": "a "}, "finish_reason": None}], "usage": None},
        {"choices": [{"index": 0, "delta": {"content": "tree"}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": BODIES["openai"]["usage"]},
    )
    + "data: [DONE]\n\n",
    "anthropic": sse(
        {"type": "message_start", "message": {"usage": {**BODIES["anthropic"]["usage"], "output_tokens": 1}}},
        {"type": "ping"},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a "}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "tree"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
        {"type": "message_stop"},
    ).replace("data: ", "event: x\ndata: "),
    "gemini": sse(
        {"candidates": [{"content": {"parts": [{"text": "a "}]}}]},
        {**BODIES["gemini"], "candidates": [{"content": {"parts": [{"text": "tree"}]}, "finishReason": "STOP"}]},
    ),
    "cohere": sse(
        {"type": "message-start", "delta": {"message": {"role": "assistant"}}},
        {"type": "content-start", "index": 0},
        {"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": "a "}}}},
        {"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": "tree"}}}},
        {"type": "message-end", "delta": {"finish_reason": "COMPLETE", "usage": BODIES["cohere"]["usage"]}},
    ),
    "ollama": "\n".join(
        json.dumps(line)
        for line in (
            {"message": {"role": "assistant", "content": "a "}, "done": False},
            {"message": {"role": "assistant", "content": "tree"}, "done": False},
            {**BODIES["ollama"], "message": {"role": "assistant", "content": ""}},
        )
    ),
}


class Service:
    """A server with a script: what it does with each request, the last one for ever."""

    def __init__(self):
        self.script = []
        self.seen = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.seen.append((self.path, dict(self.headers), body))
                act = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                act(self)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def send(body, status=200, headers=(), length=None):
    data = body if isinstance(body, str) else json.dumps(body)

    def act(handler):
        handler.send_response(status)
        for name, value in dict(headers).items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(length or len(data.encode())))
        handler.end_headers()
        handler.wfile.write(data.encode())

    return act


def hang(seconds):
    return lambda handler: time.sleep(seconds)


def cut(handler):
    handler.connection.close()


@pytest.fixture
def service():
    made = []

    def make(*script):
        one = Service()
        one.script = list(script)
        made.append(one)
        return one

    yield make
    for one in made:
        one.server.shutdown()
        one.server.server_close()


@pytest.fixture
def gateway(monkeypatch):
    monkeypatch.setenv("THEIR_KEY", KEY)
    made = []

    def make(*services, provider="openai", local=None, embed=None, more=None, **settings):
        fast = {"first_wait_seconds": 0.01, "max_wait_seconds": 1.0, "timeout_seconds": 2.0, "max_retries": 2}
        endpoints = tuple(
            EndpointConfig(provider, f"model-{i}", url=s.url, key_env="THEIR_KEY", **(fast | (more or {})))
            for i, s in enumerate(services)
        )
        made.append(Gateway(GatewayConfig(endpoints, **settings), local=local, embed=embed))
        return made[-1]

    yield make
    for one in made:
        one.close()


def joined(deltas):
    deltas = list(deltas)
    usage = [d.usage for d in deltas if d.usage is not None][-1]
    return "".join(d.text for d in deltas), [d.finish_reason for d in deltas if d.finish_reason], usage


# -- protocols ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", BODIES)
def test_each_protocol_whole_and_streamed(provider, service, gateway):
    one = service(send(BODIES[provider]), send(STREAMS[provider], headers={"content-type": "text/event-stream"}))
    made = gateway(one, provider=provider)
    answer = made.chat(TALK, GREEDY)
    assert answer.text == "a tree" and answer.finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 2)
    text, reasons, _ = joined(made.stream(TALK, GREEDY))
    assert (text, reasons) == ("a tree", ["stop"])
    path, headers, body = one.seen[0]
    assert any(KEY in value for value in headers.values()) and KEY not in path and KEY not in json.dumps(body)
    assert "What is a heap?" in json.dumps(body) and "Be brief." in json.dumps(body)
    spent = made.ledger.table()
    assert [(s.num_calls, s.prompt_tokens, s.completion_tokens) for s in spent] == [(2, 18, 4)]


def test_our_own_server_through_both_of_its_protocols(server, gateway):
    told = server.client().chat.completions.create(
        model="tiny", messages=[{"role": m.role, "content": m.content} for m in TALK], temperature=0, max_tokens=8
    )
    for provider, url in (("openai", f"{server.url}/v1"), ("anthropic", server.url)):
        endpoint = EndpointConfig(provider, "tiny", url=url)
        made = Gateway(GatewayConfig((endpoint,)))
        answer = made.chat(TALK, GREEDY)
        assert answer.text == told.choices[0].message.content and answer.usage.prompt_tokens == told.usage.prompt_tokens
        assert joined(made.stream(TALK, GREEDY))[0] == answer.text
        count, is_exact = made.count_tokens(TALK)
        assert is_exact == (provider == "anthropic") and (not is_exact or count == told.usage.prompt_tokens)
        with pytest.raises(RequestError, match="messages") if provider == "openai" else pytest.raises(RequestError):
            made.chat([Message("nobody", "x")], GREEDY)
        made.close()


@pytest.mark.parametrize(
    ("provider", "params"),
    [
        ("openai", {"top_k": 5}),
        ("anthropic", {"seed": 1}),
        ("gemini", {"min_p": 0.1}),
        ("cohere", {"logit_bias": {1: 1.0}}),
        ("ollama", {"typical_p": 0.5}),
        ("anthropic", {"temperature": 1.5}),
    ],
)
def test_a_setting_without_a_word_is_refused_not_left_out(provider, params, service, gateway):
    one = service(send(BODIES[provider]))
    with pytest.raises(RequestError) as caught:
        gateway(one, provider=provider).chat(TALK, SamplingParams(**params))
    assert caught.value.param == next(iter(params)) and not one.seen


def test_settings_reach_the_service_in_its_words(service, gateway):
    schema = {"type": "object"}
    params = SamplingParams(temperature=0.5, top_p=0.9, max_tokens=7, stop=("x",), json_schema=schema)
    expected = {
        "openai": {"max_completion_tokens": 7, "stop": ["x"], "top_p": 0.9},
        "anthropic": {"max_tokens": 7, "stop_sequences": ["x"], "system": "Be brief."},
        "cohere": {"max_tokens": 7, "stop_sequences": ["x"], "p": 0.9},
        "ollama": {"format": schema},
        "gemini": {"systemInstruction": {"parts": [{"text": "Be brief."}]}},
    }
    for provider, fields in expected.items():
        one = service(send(BODIES[provider]))
        gateway(one, provider=provider).chat(TALK, params)
        body = one.seen[0][2]
        assert {name: body[name] for name in fields} == fields
        assert json.dumps(schema) in json.dumps(body)


# -- failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [
        send({"error": {"message": "busy"}}, 429, {"retry-after-ms": "20"}),
        send("upstream down", 503),
        send({"error": "x"}, 529),
        send("{half", 200),
        send({"choices": []}, 200),
        send({"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}, 200),
        send("short", 200, length=100),
        cut,
    ],
)
def test_a_passing_failure_is_asked_again(failure, service, gateway):
    one = service(failure, failure, send(BODIES["openai"]))
    assert gateway(one).chat(TALK, GREEDY).text == "a tree"
    assert len(one.seen) == 3
    lasting, other = service(failure), service(send(BODIES["openai"]))
    made = gateway(lasting, other)
    assert made.chat(TALK, GREEDY).text == "a tree"
    assert len(lasting.seen) == 3 and [s.num_failed for s in made.ledger.table()].count(1) == 1


def test_a_service_that_hangs_is_given_up(service, gateway):
    slow, other = service(hang(3)), service(send(BODIES["openai"]))
    start = time.monotonic()
    more = {"timeout_seconds": 0.2, "max_retries": 1}
    assert gateway(slow, other, more=more).chat(TALK, GREEDY).text == "a tree"
    assert time.monotonic() - start < 2


def test_retry_after_is_kept_to_and_a_long_one_passed_over(service, gateway):
    one = service(send("", 429, {"retry-after": "0.3"}), send(BODIES["openai"]))
    start = time.monotonic()
    assert gateway(one).chat(TALK, GREEDY).text == "a tree"
    assert time.monotonic() - start >= 0.3
    long, other = service(send("", 429, {"retry-after": "3600"})), service(send(BODIES["openai"]))
    assert gateway(long, other).chat(TALK, GREEDY).text == "a tree" and len(long.seen) == 1
    in_a_minute = email.utils.formatdate(1060, usegmt=True)
    assert retry_after({"retry-after": in_a_minute}, lambda: 1000) == pytest.approx(60)


def test_a_wrong_key_or_a_full_context_moves_on_and_a_wrong_request_does_not(service, gateway):
    good = send(BODIES["openai"])
    for failure in (
        send({"error": {"message": "bad key"}}, 401),
        send({"error": {"message": "no such model"}}, 404),
        send({"error": {"message": "long", "code": "context_length_exceeded"}}, 400),
    ):
        bad, other = service(failure), service(good)
        assert gateway(bad, other).chat(TALK, GREEDY).text == "a tree" and len(bad.seen) == 1
    wrong, other = service(send({"error": {"message": "temperature is 9"}}, 400)), service(good)
    with pytest.raises(RequestError, match="model-0 answered 400: temperature is 9"):
        gateway(wrong, other).chat(TALK, GREEDY)
    assert not other.seen


def test_when_all_fail_each_says_why_and_no_key_is_told(service, gateway, caplog):
    made = gateway(service(send("a", 500)), service(send({"error": {"message": "who?"}}, 401)))
    with pytest.raises(
        AllFailedError, match=r"model-0 gave no answer in 3 tries.*model-1 answered 401: who\?"
    ) as caught:
        made.chat(TALK, GREEDY)
    assert KEY not in str(caught.value) and KEY not in caplog.text
    with pytest.raises(AllFailedError):
        list(made.stream(TALK, GREEDY))


def test_a_stream_falls_back_before_its_first_word_and_never_after(service, gateway):
    head = {"content-type": "text/event-stream"}
    word = sse({"choices": [{"index": 0, "delta": {"content": "a "}, "finish_reason": None}]})
    good = send(STREAMS["openai"], headers=head)
    for failure in (send("", 503), send(sse({"error": {"message": "down"}}), headers=head), send("", headers=head)):
        bad, other = service(failure), service(good)
        assert joined(gateway(bad, other).stream(TALK, GREEDY))[0] == "a tree"
    for failure in (send(word, headers=head), send(word + sse({"error": {"message": "down"}}), headers=head)):
        broken, other = service(failure), service(good)
        deltas = gateway(broken, other).stream(TALK, GREEDY)
        assert next(deltas).text == "a "
        with pytest.raises(EndpointError, match="model-0 broke off its answer"):
            list(deltas)
        assert not other.seen


def test_a_redirect_is_not_followed_with_the_key(service, gateway):
    thief = service(send(BODIES["openai"]))
    sly = service(send("", 302, {"location": f"{thief.url}/chat/completions"}))
    with pytest.raises((AllFailedError, RequestError)):
        gateway(sly).chat(TALK, GREEDY)
    assert not thief.seen


def test_an_endpoint_that_fails_again_and_again_is_left_alone(service, gateway):
    bad, other = service(send("", 500)), service(send(BODIES["openai"]))
    more = {"max_retries": 0, "breaker_failures": 3, "breaker_seconds": 0.3}
    made = gateway(bad, other, more=more)
    for _ in range(6):
        made.chat(TALK, GREEDY)
    assert len(bad.seen) == 3
    time.sleep(0.35)
    bad.script = [send(BODIES["openai"])]
    made.chat(TALK, GREEDY)
    made.chat(TALK, GREEDY)
    assert len(bad.seen) == 5 and len(other.seen) == 6


def test_an_open_breaker_lets_one_try():
    now = [0.0]
    breaker = Breaker(2, 10, lambda: now[0])
    for _ in range(2):
        assert breaker.may_pass()
        breaker.note(False)
    assert not breaker.may_pass()
    now[0] = 11
    assert breaker.may_pass() and not breaker.may_pass()
    breaker.note(False)
    assert not breaker.may_pass()
    now[0] = 22
    assert breaker.may_pass()
    breaker.note(True)
    assert breaker.may_pass() and breaker.may_pass()


# -- local models, caches, costs ---------------------------------------------------------------------------------


class Parrot:
    """A `ChatModel` that says the last message again."""

    num_calls = 0

    def chat(self, messages, params):
        self.num_calls += 1
        return Completion(messages[-1].content, (), "stop", Usage(3, 3))

    def stream(self, messages, params):
        yield Delta(self.chat(messages, params).text, (), "stop", Usage(3, 3))


def test_a_local_model_stands_in_the_chain(service, gateway):
    down, parrot = service(send("", 500)), Parrot()
    made = gateway(down, local={"parrot": parrot})
    assert made.chat(TALK, GREEDY).text == "What is a heap?" == joined(made.stream(TALK, GREEDY))[0]
    assert {s.endpoint: s.dollars for s in made.ledger.table()} == {"model-0": 0.0, "parrot": 0.0}


def test_an_equal_question_is_asked_once_a_tenant(service, gateway, tmp_path):
    one = service(send(BODIES["openai"]))
    made = gateway(one, cache=CacheConfig(tmp_path / "cache.sqlite"))
    first, again = made.chat(TALK, GREEDY), made.chat(TALK, GREEDY)
    assert first.text == again.text and len(one.seen) == 1
    assert joined(made.stream(TALK, GREEDY))[0] == "a tree" and len(one.seen) == 1
    for other in ([TALK[1]], [*TALK[:1], Message("user", "what is a heap?")]):
        made.chat(other, GREEDY)
    made.chat(TALK, SamplingParams(temperature=0, max_tokens=9))
    assert len(one.seen) == 4
    made.for_tenant("bob").chat(TALK, GREEDY)
    assert len(one.seen) == 5  # nobody reads another's answers
    made.chat(TALK, SamplingParams(max_tokens=8))
    made.chat(TALK, SamplingParams(max_tokens=8))
    assert len(one.seen) == 7  # drawn at random: each is another
    assert (
        gateway(one, cache=CacheConfig(tmp_path / "cache.sqlite", seconds=0)).chat(TALK, GREEDY) and len(one.seen) == 8
    )


def test_a_similar_question_is_found_by_its_vector(gateway):
    def embed(texts):
        return np.array([[text.count("heap"), text.count("queue"), 0.1] for text in texts], np.float32)

    parrot = Parrot()
    made = gateway(local={"parrot": parrot}, cache=CacheConfig(similarity=0.95), embed=embed)
    first = made.chat([TALK[0], Message("user", "Tell me of the heap")], GREEDY)
    assert made.chat([TALK[0], Message("user", "What is a heap?")], GREEDY).text == first.text
    assert made.chat([TALK[0], Message("user", "What is a queue?")], GREEDY).text == "What is a queue?"
    assert (
        made.chat([Message("system", "Be rude."), Message("user", "What is a heap?")], GREEDY).text == "What is a heap?"
    )
    assert made.for_tenant("bob").chat(TALK, GREEDY).text == "What is a heap?"
    assert parrot.num_calls == 4
    with pytest.raises(ConfigError, match="Pass embed"):
        gateway(local={"parrot": parrot}, cache=CacheConfig(similarity=0.95))


def test_costs_are_counted_and_budgets_end(service, gateway, tmp_path):
    one = service(send(BODIES["openai"]))
    prices = {"model-0": {"input": 1e6, "output": 2e6, "cached": 0.5e6}}  # a dollar a token, to see it
    made = gateway(one, prices=prices, tenant_budget_dollars=20.0, ledger=tmp_path / "costs.sqlite")
    made.chat(TALK, GREEDY)  # 5 fresh, 4 cached, 2 written: 5 + 2 + 4
    assert made.ledger.dollars() == pytest.approx(11)
    made.chat(TALK, GREEDY)
    with pytest.raises(BudgetError, match="the tenant 'default' is 20.00 dollars, and 22.00 are spent"):
        made.chat(TALK, GREEDY)
    made.for_tenant("bob").chat(TALK, GREEDY)
    assert len(one.seen) == 3
    again = gateway(one, prices=prices, tenant_budget_dollars=20.0, ledger=tmp_path / "costs.sqlite")
    with pytest.raises(BudgetError):
        again.chat(TALK, GREEDY)
    with pytest.raises(ConfigError, match="no price for 'model-0'"):
        gateway(one, budget_dollars=1.0)
    unpriced = gateway(one)
    unpriced.chat(TALK, GREEDY)
    assert unpriced.ledger.table()[0].num_unpriced == 1


def test_a_gateway_from_a_file_and_its_faults(service, tmp_path, monkeypatch):
    one = service(send(BODIES["openai"]))
    path = tmp_path / "gateway.yaml"
    path.write_text(
        f"endpoints:\n  - {{provider: openai, model: m, url: '{one.url}', name: mine}}\n"
        "prices:\n  m: {input: 1.0, output: 2.0}\nbudget_dollars: 5\n"
    )
    made = Gateway(path)
    assert made.chat(TALK, GREEDY).text == "a tree" and made.ledger.table()[0].endpoint == "mine"
    made.close()
    for text, match in (
        ("endpoints:\n  - {provider: openay, model: m}\n", "provider is 'openay'; known: openai"),
        (
            "endpoints:\n  - {provider: openai, model: m, key_env: NO_SUCH}\n",
            "takes its key from NO_SUCH, which is not",
        ),
        ("endpoints:\n  - {provider: openai, model: m, url: 'file:///etc'}\n", "begins with http"),
        ("endpoints: []\n", "has no endpoint"),
        ("endpoints:\n  - {provider: ollama, model: m}\nprices:\n  m: {input: -1, output: 1}\n", "from 0 on"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=match):
            Gateway(path)


def test_the_verb_and_its_page_show_the_costs(service, gateway, tmp_path, capsys):
    one = service(send(BODIES["openai"]))
    path = tmp_path / "costs.sqlite"
    made = gateway(one, prices={"model-0": {"input": 1e6, "output": 2e6}}, ledger=path)
    made.chat(TALK, GREEDY)
    made.for_tenant("<b>eve</b>").chat(TALK, GREEDY)
    assert main(["costs", str(path), "--html", str(tmp_path / "costs.html")]) == 0
    shown = capsys.readouterr().out
    assert "model-0" in shown and "26.0000 dollars" in shown
    page = (tmp_path / "costs.html").read_text()
    assert "26.0000 dollars in 2 calls" in page and "&lt;b&gt;eve" in page and "<b>eve" not in page
    assert "<rect" in page and "http" not in page.replace("http-equiv", "")
    assert main(["costs", str(tmp_path / "none.sqlite")]) == 1
