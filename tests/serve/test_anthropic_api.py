"""Anthropic's Messages API as its official client sees it."""

import inspect
import json

import anthropic
import httpx2
import pytest
from anthropic.resources.messages import Messages

from modelwright.serve import anthropic_fields

pytestmark = pytest.mark.service

ASKED = [{"role": "user", "content": "Rain in Ulm and Bonn?"}]
SETTINGS = {"model": "caller", "max_tokens": 120, "extra_body": {"temperature": 0}}


@pytest.fixture
def client(caller):
    return anthropic.Anthropic(base_url=caller.url, api_key="unused", max_retries=0, timeout=60)


@pytest.fixture
def tool(weather):
    return {"name": weather["name"], "description": weather["description"], "input_schema": weather["parameters"]}


def post(server, path="/v1/messages", **more):
    body = {"model": "caller", "max_tokens": 20, "messages": ASKED, "temperature": 0, **more}
    return httpx2.post(server.url + path, json={k: v for k, v in body.items() if v != "absent"}, timeout=60)


def test_a_message_has_every_field_and_is_what_the_other_api_says(caller, client):
    turns = [{"role": "user", "content": [{"type": "text", "text": "Rain", "cache_control": {"type": "ephemeral"}}]}]
    made = client.messages.create(messages=turns, system="Be brief.", **SETTINGS)
    assert made.id.startswith("msg_") and made.type == "message" and made.role == "assistant"
    assert made.model == "caller" and made.stop_reason in ("end_turn", "max_tokens") and made.stop_sequence is None
    same = caller.client().chat.completions.create(
        model="caller", temperature=0, max_tokens=120,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain"}],
    )  # fmt: skip
    assert made.content[0].text == same.choices[0].message.content
    assert made.usage.output_tokens == same.usage.completion_tokens
    assert made.usage.input_tokens + made.usage.cache_read_input_tokens == same.usage.prompt_tokens
    counted = client.messages.count_tokens(model="caller", messages=turns, system="Be brief.")
    assert counted.input_tokens == same.usage.prompt_tokens


def test_a_conversation_with_a_tool_from_question_to_answer(client, tool):
    first = client.messages.create(messages=ASKED, tools=[tool], **SETTINGS)
    assert first.stop_reason == "tool_use" and [b.type for b in first.content] == ["text", "tool_use", "tool_use"]
    assert first.content[0].text == "I look."
    assert [b.input for b in first.content[1:]] == [{"city": "Ulm"}, {"city": "Bonn"}]
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": text}]}
        for block, text in zip(first.content[1:], ["wet", "dry"], strict=True)
    ]
    turns = [*ASKED, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    last = client.messages.create(messages=turns, tools=[tool], **SETTINGS)
    assert [b.text for b in last.content] == ["In Ulm only."] and last.stop_reason == "end_turn"


def test_a_stream_builds_the_same_message(caller, client, tool):
    whole = client.messages.create(messages=ASKED, tools=[tool], **SETTINGS)
    with client.messages.stream(messages=ASKED, tools=[tool], **SETTINGS) as stream:
        kinds = [made.type for made in stream]
        final = stream.get_final_message()
    assert [b.model_dump(exclude={"id"}) for b in final.content] == [
        b.model_dump(exclude={"id"}) for b in whole.content
    ]
    assert final.stop_reason == "tool_use" and final.usage.output_tokens == whole.usage.output_tokens
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    response = post(caller, stream=True, tools=[tool], max_tokens=120)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [part.split("\n") for part in response.text.removesuffix("\n\n").split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    values = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert names == [v["type"] for v in values] and names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert [v["index"] for v in values if v["type"] == "content_block_start"] == [0, 1, 2]
    assert values[0]["message"]["usage"]["input_tokens"] > 0


def test_the_stop_sequence_that_ended_the_answer_is_told(client, tool):
    made = client.messages.create(messages=ASKED, tools=[tool], stop_sequences=["xyz", "ook"], **SETTINGS)
    assert made.stop_reason == "stop_sequence" and made.stop_sequence == "ook" and made.content[0].text == "I l"


def test_a_call_can_be_forced_and_a_form_be_given(client, tool):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"size": {"enum": [1, 2]}}, "required": ["size"]}
    odd = {"name": "grow", "input_schema": {**schema, "additionalProperties": False}}
    for choice in ({"type": "any"}, {"type": "tool", "name": "grow", "disable_parallel_tool_use": True}):
        made = client.messages.create(messages=ASKED, tools=[odd], tool_choice=choice, **SETTINGS)
        assert made.content[0].type == "tool_use" and made.content[0].input["size"] in (1, 2)
    form = {"type": "json_schema", "schema": odd["input_schema"]}
    made = client.messages.create(messages=ASKED, output_config={"format": form}, **SETTINGS)
    assert json.loads(made.content[0].text)["size"] in (1, 2)


def test_no_field_of_the_official_client_is_unheard_of():
    known = anthropic_fields.IMPLEMENTED | set(anthropic_fields.HARMLESS) | set(anthropic_fields.NEUTRAL)
    for method in (Messages.create, Messages.count_tokens):
        sent = set(inspect.signature(method).parameters) - {"self", "timeout"}
        assert {name for name in sent if not name.startswith("extra_")} <= known


IMAGE = {"type": "image", "source": {"type": "url", "url": "file:///etc/passwd"}}
RESULT = {"type": "tool_result", "tool_use_id": "x", "content": "y"}


@pytest.mark.parametrize(
    "more, words",
    [
        ({"max_tokens": "absent"}, "max_tokens is null"),
        ({"messages": []}, "a list of messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "user or assistant"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "this model reads text only"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "the id of a call"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "I"}]}, "to continue it is not supported"),
        ({"temperature": 1.5}, "between 0 and 1"),
        ({"stop_sequences": "x"}, "a list"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking is not supported"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, '"custom"'),
        ({"tool_choice": {"type": "any"}}, "no tools are given"),
        ({"output_config": {"effort": "high"}}, "output_config.effort"),
        ({"n": 2}, "Unrecognized field: n"),
        ({"max_tokens": 5000}, "maximum context length is 1024"),
        ({"stream": "yes"}, "true or false"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_in_anthropics_form(caller, more, words):
    response = post(caller, **more)
    body = response.json()
    assert response.status_code == 400 and set(body) == {"type", "error"} and body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error" and words in body["error"]["message"]


def test_the_client_raises_its_own_errors(caller, client, server):
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        client.messages.create(model="claude", max_tokens=5, messages=ASKED)
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="caller", max_tokens=0, messages=ASKED)
    assert httpx2.get(caller.url + "/v1/messages").json()["error"]["type"] == "invalid_request_error"
    refused = post(server, model="tiny-documents")
    assert refused.status_code == 400 and "/v1/chat/completions" in refused.json()["error"]["message"]
    foreign = httpx2.post(caller.url + "/v1/messages", json={}, headers={"origin": "http://evil.example"})
    assert foreign.status_code == 403 and foreign.json()["error"]["type"] == "permission_error"
