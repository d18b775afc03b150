"""The Responses API as the official client and as a careless one see it."""

import json

import httpx2
import openai
import pytest

pytestmark = pytest.mark.service
GREEDY = {"model": "tiny", "temperature": 0, "max_output_tokens": 8}


def chat_text(server, turns, **more):
    answer = server.client().chat.completions.create(
        model="tiny", messages=turns, temperature=0, max_tokens=8, **more
    )  # fmt: skip
    return answer.choices[0].message.content


def test_a_response_says_what_the_chat_says(server):
    answer = server.client().responses.create(**GREEDY, input="What is a heap?", instructions="Be brief.")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a heap?"}]
    assert answer.output_text == chat_text(server, turns)
    assert (
        answer.id.startswith("resp_") and answer.object == "response" and answer.status in ("completed", "incomplete")
    )
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    if answer.status == "incomplete":
        assert answer.incomplete_details.reason == "max_output_tokens"
    count = server.client().responses.input_tokens.count(
        model="tiny", input="What is a heap?", instructions="Be brief."
    )
    assert count.input_tokens == answer.usage.input_tokens
    parts = [{"type": "input_text", "text": "What is "}, {"type": "input_text", "text": "a heap?"}]
    same = server.client().responses.create(**GREEDY, input=[
        {"role": "developer", "content": "Be brief."}, {"type": "message", "role": "user", "content": parts},
    ])  # fmt: skip
    assert same.output_text == answer.output_text


def test_a_stream_builds_up_the_same_response(server):
    whole = server.client().responses.create(**GREEDY, input="Tell me of heaps.")
    events = list(server.client().responses.create(**GREEDY, input="Tell me of heaps.", stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type for e in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:-1] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
    ]  # fmt: skip
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    with server.client().responses.stream(**GREEDY, input="Tell me of heaps.") as stream:  # the client's own checks
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == text


def test_an_answer_goes_on_from_an_earlier_one(server):
    client = server.client()
    first = client.responses.create(**GREEDY, input="What is a heap?", instructions="Be long.")
    second = client.responses.create(**GREEDY, input="And then?", previous_response_id=first.id)
    turns = [
        {"role": "user", "content": "What is a heap?"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And then?"},
    ]  # the instructions of the first are not carried over
    assert second.output_text == chat_text(server, turns)
    assert client.responses.retrieve(second.id).output_text == second.output_text
    items = client.responses.input_items.list(second.id)
    assert items.data[0].content[0].text == "And then?"
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    third = client.responses.create(**GREEDY, input="More?", previous_response_id=second.id)
    assert third.previous_response_id == second.id


def test_a_response_that_is_not_to_be_kept_is_not(server):
    answer = server.client().responses.create(**GREEDY, input="Hush.", store=False)
    with pytest.raises(openai.NotFoundError, match="is not kept here"):
        server.client().responses.retrieve(answer.id)
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().responses.create(**GREEDY, input="x", previous_response_id=answer.id)
    assert caught.value.param == "previous_response_id"


def test_functions_are_called_and_answered(caller, weather):
    client, tool = caller.client(), {"type": "function", **weather}
    base = {"model": "caller", "temperature": 0, "tools": [tool], "max_output_tokens": 200}
    answer = client.responses.create(**base, input="Rain in Ulm and Bonn?")
    calls = [item for item in answer.output if item.type == "function_call"]
    assert [json.loads(call.arguments)["city"] for call in calls] == ["Ulm", "Bonn"] and answer.output_text == "I look."
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": told}
        for call, told in zip(calls, ["wet", "dry"], strict=True)
    ]
    done = client.responses.create(**base, input=results, previous_response_id=answer.id)
    assert done.output_text == "In Ulm only."
    sent = [{"role": "user", "content": "Rain in Ulm and Bonn?"}, *[i.model_dump() for i in answer.output], *results]
    assert client.responses.create(**base, input=sent).output_text == "In Ulm only."
    events = list(client.responses.create(**base, input="Rain in Ulm and Bonn?", stream=True))
    streamed = [e.arguments for e in events if e.type == "response.function_call_arguments.done"]
    assert streamed == [call.arguments for call in calls]
    forced = client.responses.create(**base, input="Hello.", tool_choice={"type": "function", "name": "weather"})
    assert forced.output[0].type == "function_call" and forced.output[0].name == "weather"


def test_the_form_of_a_text_is_held(server):
    schema = {
        "type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False,
    }  # fmt: skip
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    answer = server.client().responses.create(
        model="tiny", input="Say.", text=form, max_output_tokens=60, temperature=0
    )
    assert isinstance(json.loads(answer.output_text)["a"], bool)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
         "messages[0].content[0]"),
        ({"input": [{"role": "user", "content": "x", "colour": 1}]}, "input[0].colour"),
        ({"input": [{"type": "function_call_output", "call_id": "nobody", "output": "x"}]}, "messages[0].tool_call_id"),
        ({"instructions": 3}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "text", "shape": 1}}}, "text.format.shape"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "colour": 1}]}]},
         "input[0].content[0].colour"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
        ({"messages": []}, "messages"),
        ({"temperature": "hot"}, "temperature"),
    ],
)  # fmt: skip
def test_bad_requests_name_the_field(server, change, param):
    body = {**GREEDY, "input": "x", **change}
    answer = httpx2.post(f"{server.url}/v1/responses", json=body, timeout=30)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_prompt_beyond_the_context_is_refused(server):
    answer = httpx2.post(f"{server.url}/v1/responses", json={**GREEDY, "input": "heap " * 2000}, timeout=30)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
