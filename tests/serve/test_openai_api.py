"""The API as the official client and as a careless one see it."""

import concurrent.futures
import http.client
import json
import random
import socket
import time
from urllib.parse import urlparse

import httpx2
import openai
import pytest

pytestmark = pytest.mark.service

HELLO = [{"role": "user", "content": "What does textwrap.wrap do?"}]


def post(server, path, body, **more):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(server.url + path, content=content, timeout=30, **more)


def chat_body(**more):
    return {"model": "tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0, **more}


# -- the official client ---------------------------------------------------------------------------------------------


def test_models_are_listed_and_described(server):
    client = server.client()
    assert [m.id for m in client.models.list()] == ["tiny", "tiny-documents"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        client.models.retrieve("other")


def test_a_chat_completion_has_every_field_that_clients_read(server):
    answer = server.client().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=8, temperature=0, user="me", metadata={"a": "b"}, n=1, logprobs=False
    )
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == "tiny"
    choice = answer.choices[0]
    assert choice.index == 0 and choice.message.role == "assistant" and choice.logprobs is None
    assert choice.finish_reason in ("stop", "length")
    assert 1 <= answer.usage.completion_tokens <= 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_repeated_prompt_is_found_in_the_cache(server):
    client = server.client()
    turns = [{"role": "user", "content": "A long enough question about the heap, " * 4}]
    first = client.chat.completions.create(model="tiny", messages=turns, max_tokens=4, temperature=0)
    second = client.chat.completions.create(model="tiny", messages=turns, max_tokens=4, temperature=0)
    assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens_details.cached_tokens
    assert second.usage.prompt_tokens_details.cached_tokens >= 32
    assert second.choices[0].message.content == first.choices[0].message.content


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1, "seed": 7}, {"top_p": 0.5, "seed": -3}])
def test_a_stream_is_the_same_text_as_a_whole_answer(server, settings):
    client = server.client()
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=40, **settings)
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_completion_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
            **settings,
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_the_client_accumulates_a_stream(server):
    with server.client().chat.completions.stream(
        model="tiny-documents", messages=HELLO, stream_options={"include_usage": True}
    ) as stream:
        final = stream.get_final_completion()
    assert "[1]" in final.choices[0].message.content
    assert final.choices[0].message.citations[0]["doc"] == "textwrap.md"


def test_a_text_completion_takes_text_ids_and_many(server):
    client = server.client()
    ids = post(server, "/tokenize", {"prompt": "The heap"}).json()["tokens"]
    by_text = client.completions.create(model="tiny", prompt="The heap", max_tokens=6, temperature=0)
    by_ids = client.completions.create(model="tiny", prompt=ids, max_tokens=6, temperature=0)
    many = client.completions.create(model="tiny", prompt=["The heap", "Text"], max_tokens=6, temperature=0)
    assert by_text.id.startswith("cmpl-") and by_text.object == "text_completion"
    assert by_text.choices[0].text == by_ids.choices[0].text == many.choices[0].text
    assert [c.index for c in many.choices] == [0, 1]
    streamed = ["", ""]
    for chunk in client.completions.create(
        model="tiny", prompt=["The heap", "Text"], max_tokens=6, temperature=0, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [c.text for c in many.choices]
    assert client.completions.create(model="tiny", prompt="The", temperature=0).usage.completion_tokens <= 16


def test_a_stop_text_is_left_out(server):
    client = server.client()
    whole = client.completions.create(model="tiny", prompt="The heap", max_tokens=30, temperature=0).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    cut = client.completions.create(model="tiny", prompt="The heap", max_tokens=30, temperature=0, stop=[stop])
    assert cut.choices[0].text == whole[: whole.index(stop)] and cut.choices[0].finish_reason == "stop"


def test_tokens_go_there_and_back(server):
    text = "heap 🦊 äöü <|im_end|>"
    found = post(server, "/tokenize", {"model": "tiny", "prompt": text}).json()
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == 256
    assert post(server, "/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": text}
    turns = post(server, "/tokenize", {"messages": HELLO}).json()
    usage = server.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=1).usage
    assert turns["count"] == usage.prompt_tokens


def test_the_server_sent_events_are_exact(server, parse_events):
    response = post(server, "/v1/chat/completions", chat_body(stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    values = parse_events(response.content.decode())
    assert values[-1] == "data: [DONE]"[6:]
    assert all(v["object"] == "chat.completion.chunk" for v in values[:-1])
    assert all("usage" not in v for v in values[:-1])


# -- mistakes --------------------------------------------------------------------------------------------------------

REFUSED = {
    "temperature": ("hot", "a number"),
    "top_p": (0, "above 0"),
    "top_k": (1.5, "whole number"),
    "max_tokens": (0, "at least 1"),
    "max_completion_tokens": (True, "whole number"),
    "seed": (2**70, "64 bits"),
    "stop": ([""], "non-empty"),
    "stream": ("yes", "true or false"),
    "stream_options": ({"include_usage": True}, "unless stream"),
    "messages": ([], "1 to"),
    "n": (0, "from 1 to 128"),
    "logprobs": (3, "true or false"),
    "top_logprobs": (3, "unless logprobs"),
    "frequency_penalty": (2.5, "from -2 to 2"),
    "logit_bias": ({"five": 1}, "token ids"),
    "min_p": (1.5, "below 1"),
    "bad_words": ([""], "non-empty"),
    "suffix": ("x", "not supported"),
    "tools": ("x", "a list"),
    "tool_choice": ("required", "no tools are given"),
    "parallel_tool_calls": (1, "true or false"),
    "response_format": ({"type": "yaml"}, "json_object"),
    "structured_outputs": ("x", "an object"),
    "audio": ({"voice": "x"}, "not supported"),
    "store": (True, "not supported"),
    "user": (5, "a text"),
    "metadata": ("x", "an object"),
    "temprature": (0, "Unrecognized"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_cannot_be_obeyed_is_refused_by_name(server, name):
    value, words = REFUSED[name]
    response = post(server, "/v1/chat/completions", {**chat_body(), name: value})
    error = response.json()["error"]
    assert response.status_code == 400 and set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"] == name and error["code"]
    assert name in error["message"] and words in error["message"]


@pytest.mark.parametrize(
    "message, words",
    [
        ("hello", "an object"),
        ({"role": "wizard", "content": "x"}, "system, developer, user, assistant or tool"),
        ({"role": "tool", "content": "x"}, "the id of a call"),
        ({"role": "user", "content": "x", "tool_call_id": "a"}, "left out"),
        ({"role": "user"}, "a text"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}, "text only"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "an object with id"),
        ({"role": "user", "content": "x", "colour": "red"}, "Unrecognized"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "colour": 1}]}, "[0].content[0].colour"),
    ],
)
def test_a_message_that_cannot_be_read_is_refused(server, message, words):
    response = post(server, "/v1/chat/completions", chat_body(messages=[message]))
    assert response.status_code == 400 and words in response.json()["error"]["message"]


@pytest.mark.parametrize("where", ["response_format", "response_format.json_schema"])
def test_what_stands_beside_a_schema_is_not_passed_over(server, where):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "boolean"}}}
    assert post(server, "/v1/chat/completions", chat_body(response_format=wanted)).status_code == 200
    (wanted if where == "response_format" else wanted["json_schema"])["schemaa"] = {}
    error = post(server, "/v1/chat/completions", chat_body(response_format=wanted)).json()["error"]
    assert error["param"] == f"{where}.schemaa" and error["code"] == "unknown_parameter"


def test_neutral_and_harmless_fields_pass(server):
    more = {
        "n": 1, "logprobs": False, "top_logprobs": None, "frequency_penalty": 0, "presence_penalty": 0.0,
        "logit_bias": {}, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False,
        "service_tier": "auto", "user": "u", "safety_identifier": "s", "parallel_tool_calls": False, "seed": None,
        "stop": None, "stream_options": None, "top_k": 5,
    }  # fmt: skip
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "Hi", "name": "ann"},
        {"role": "assistant", "content": "Yes?", "refusal": None, "tool_calls": None, "citations": []},
        {"role": "user", "content": "Go on"},
    ]
    assert post(server, "/v1/chat/completions", chat_body(messages=turns, **more)).status_code == 200


BAD_BODIES = {
    "nothing": b"",
    "half": b'{"model": "tiny"',
    "list": b"[1, 2]",
    "nan": b'{"model": "tiny", "temperature": NaN}',
    "latin": '{"model": "ä"}'.encode("latin-1"),
    "surrogate": b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "deep": b"[" * 100_000,
    "huge number": b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_malformed_body_is_a_400(server, path, name):
    response = post(server, path, BAD_BODIES[name])
    assert response.status_code == 400 and response.json()["error"]["code"] == "malformed_json"


def test_an_unknown_model_is_a_404_and_a_missing_one_a_400(server):
    with pytest.raises(openai.NotFoundError) as caught:
        server.client().chat.completions.create(model="gpt-9", messages=HELLO)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    assert post(server, "/v1/chat/completions", {"messages": HELLO}).status_code == 400
    response = post(server, "/v1/completions", {"model": "tiny-documents", "prompt": "x"})
    assert response.status_code == 400 and "/v1/chat/completions" in response.json()["error"]["message"]


def test_a_request_beyond_the_context_says_so_in_the_words_that_clients_look_for(server):
    long = [{"role": "user", "content": "heap " * 500}]
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(model="tiny", messages=long)
    assert caught.value.code == "context_length_exceeded" and "maximum context length is 256" in str(caught.value)
    for body in ({"prompt": "x", "max_tokens": 300}, {"prompt": [5] * 300}, {"prompt": [5] * 256, "stream": True}):
        response = post(server, "/v1/completions", {"model": "tiny", **body})
        assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("prompt", [None, "", [], [[]], [1.5], ["a", 1], [-1], [10**6], {"a": 1}, ["x"] * 1000])
def test_a_prompt_that_is_none_is_refused(server, prompt):
    response = post(server, "/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 2})
    assert response.status_code == 400 and response.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("tokens", [None, "x", [1.5], [True], [10**9], [-1]])
def test_tokens_that_are_none_are_refused(server, tokens):
    assert post(server, "/detokenize", {"tokens": tokens}).status_code == 400


def test_a_body_too_large_is_a_413_however_it_is_sent(server):
    body = json.dumps(chat_body(user="x" * 300_000)).encode()
    assert post(server, "/v1/chat/completions", body).status_code == 413
    pieces = (body[i : i + 5000] for i in range(0, len(body), 5000))
    response = httpx2.post(server.url + "/v1/chat/completions", content=pieces, timeout=30)
    assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"


def test_what_is_not_there_is_told_in_the_same_form(server):
    missing, wrong = httpx2.get(server.url + "/v2/chat"), httpx2.get(server.url + "/v1/chat/completions")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"
    assert wrong.status_code == 405 and wrong.json()["error"]["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"


# -- clients that leave ----------------------------------------------------------------------------------------------


def open_request(server, body):
    """Send a request over a bare socket and return it unread."""
    address = urlparse(server.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    return connection


def test_a_client_that_leaves_frees_its_blocks(server):
    server.wait_until_idle()
    before = server.engine.stats()
    endless = {"model": "tiny", "prompt": "The heap", "max_tokens": 240, "ignore_eos": True}
    for is_streamed in (True, False):
        connections = [open_request(server, {**endless, "stream": is_streamed}) for _ in range(4)]
        if is_streamed:
            for connection in connections:
                assert connection.getresponse().read(10)
        else:
            deadline = time.monotonic() + 10
            while server.engine.stats().running == 0 and time.monotonic() < deadline:
                time.sleep(0.002)
        for connection in connections:
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
        server.wait_until_idle()
    after = server.engine.stats()
    assert after.free_blocks == after.total_blocks
    assert after.completion_tokens - before.completion_tokens < 8 * 240


def test_a_client_that_leaves_while_sending_does_no_harm(server):
    address = urlparse(server.url)
    for sent in (b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{", b"POST /v1"):
        with socket.create_connection((address.hostname, address.port)) as bare:
            bare.sendall(sent)
    assert httpx2.get(server.url + "/health/ready").status_code == 200


# -- many at once ----------------------------------------------------------------------------------------------------


def ask_once(client, job):
    number, is_streamed = job
    rng = random.Random(number % 50)
    settings = {
        "model": "tiny",
        "max_tokens": rng.randint(1, 24),
        "seed": number % 50,
        "temperature": rng.choice([0, 0.7, 1.0]),
    }
    words = "heap text queue wrap " * rng.randint(1, 8)
    if number % 2:
        answer = client.chat.completions.create(
            messages=[{"role": "user", "content": words}], stream=is_streamed, **settings
        )
        if is_streamed:
            return "".join(c.choices[0].delta.content or "" for c in answer)
        return answer.choices[0].message.content
    answer = client.completions.create(prompt=words, stream=is_streamed, **settings)
    return "".join(c.choices[0].text for c in answer) if is_streamed else answer.choices[0].text


def test_200_mixed_requests_from_8_clients_are_answered_and_streams_equal_wholes(server):
    jobs = [(number, is_streamed) for number in range(100) for is_streamed in (True, False)]
    random.Random(0).shuffle(jobs)
    clients = [server.client() for _ in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda pair: ask_once(clients[pair[0] % 8], pair[1]), enumerate(jobs)))
    by_job = dict(zip(jobs, texts, strict=True))
    assert len(by_job) == 200
    for number in range(100):
        assert by_job[number, True] == by_job[number, False]
        assert by_job[number, True] == by_job[(number + 50) % 100, True]  # the same request, among other neighbours
    server.wait_until_idle()


def test_several_choices_and_log_probabilities_in_a_chat(server):
    client = server.client()
    asked = dict(
        model="tiny", messages=HELLO, max_tokens=6, temperature=1.0, seed=3, n=3, logprobs=True, top_logprobs=2
    )
    whole = client.chat.completions.create(**asked)
    assert [c.index for c in whole.choices] == [0, 1, 2]
    assert len({c.message.content for c in whole.choices}) > 1
    for choice in whole.choices:
        told = choice.logprobs.content
        assert all(len(t.top_logprobs) == 2 and t.logprob <= 0 for t in told)
        assert all(t.top_logprobs[0].logprob >= t.top_logprobs[1].logprob for t in told)
        joined = b"".join(bytes(t.bytes) for t in told).decode("utf-8", "replace")
        assert joined.startswith(choice.message.content)  # the end-of-text token has no text
    texts, told = ["", "", ""], [0, 0, 0]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            told[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
    assert texts == [c.message.content for c in whole.choices]
    assert told == [len(c.logprobs.content) for c in whole.choices]
    assert whole.usage.completion_tokens == sum(told)


def test_a_completion_echoes_its_prompt_with_log_probabilities(server):
    client = server.client()
    asked = dict(model="tiny", prompt="The heap is a tree", max_tokens=3, temperature=0, logprobs=2, echo=True)
    done = client.completions.create(**asked)
    choice = done.choices[0]
    assert choice.text.startswith("The heap is a tree")
    told = choice.logprobs
    assert told.token_logprobs[0] is None and all(p <= 0 for p in told.token_logprobs[1:])
    assert len(told.tokens) == done.usage.prompt_tokens + done.usage.completion_tokens == len(told.text_offset)
    assert "".join(told.tokens[: done.usage.prompt_tokens]) == "The heap is a tree"
    for token, offset in zip(told.tokens[: done.usage.prompt_tokens], told.text_offset, strict=False):
        assert choice.text[offset : offset + len(token)] == token
    assert told.top_logprobs[-1] and len(told.top_logprobs[-1]) == 2
    streamed, logprobs = "", []
    for chunk in client.completions.create(**asked, stream=True):
        for piece in chunk.choices:
            streamed += piece.text
            logprobs += piece.logprobs.token_logprobs if piece.logprobs else []
    assert streamed == choice.text and logprobs == told.token_logprobs
    two = client.completions.create(model="tiny", prompt=["A", "B"], n=2, max_tokens=2, seed=1)
    assert [c.index for c in two.choices] == [0, 1, 2, 3]
    plain = client.completions.create(model="tiny", prompt="A", max_tokens=4, temperature=0, logit_bias={"70": 100})
    assert plain.choices[0].logprobs is None and len(set(plain.choices[0].text)) == 1


def test_the_documents_refuse_what_cannot_change_a_quote(server):
    response = post(server, "/v1/chat/completions", {**chat_body(), "model": "tiny-documents", "n": 2})
    assert response.status_code == 400 and "n is not supported" in response.json()["error"]["message"]


def test_structured_output_is_what_was_asked_for(server):
    pytest.importorskip("llguidance")
    client = server.client()
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["heap", "tree"]}, "size": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["kind", "size"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=60, seed=seed, response_format=wanted
        )
        value = json.loads(answer.choices[0].message.content)
        assert value["kind"] in ("heap", "tree") and 0 <= value["size"] <= 9 and len(value) == 2
        assert answer.choices[0].finish_reason == "stop"
    any_object = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=30, response_format={"type": "json_object"}
    )
    assert any_object.choices[0].message.content.startswith("{")
    chosen = client.completions.create(
        model="tiny", prompt="Pick: ", extra_body={"structured_outputs": {"choice": ["left", "right"]}}
    )
    assert chosen.choices[0].text in ("left", "right")
    bad = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "object", "minProperties": 1, "propertyNames": 5}},
    }
    response = post(server, "/v1/chat/completions", {**chat_body(), "response_format": bad})
    assert response.status_code == 400 and "json_schema" in response.json()["error"]["message"]
    response = post(server, "/v1/completions", {"model": "tiny", "prompt": "x", "structured_outputs": {"xml": "x"}})
    assert response.status_code == 400 and "structured_outputs.xml" in response.json()["error"]["message"]
