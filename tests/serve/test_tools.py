"""Calls of tools as the official client sees them: chosen, forced, streamed, answered, refused."""

import json

import httpx2
import openai
import pytest

from modelwright.base.errors import RequestError
from modelwright.base.types import SamplingParams
from modelwright.serve.tool_calls import HERMES, LLAMA3, MISTRAL
from modelwright.serve.tools import call_grammar, constrain, read_plan

pytestmark = pytest.mark.service

ASKED = [{"role": "user", "content": "Rain in Ulm and Bonn?"}]
SETTINGS = {"model": "caller", "temperature": 0, "max_tokens": 120}
HEAP = {
    "type": "function",
    "function": {
        "name": "push_heap",
        "parameters": {
            "type": "object",
            "properties": {"size": {"$ref": "#/$defs/small"}, "kind": {"enum": ["a", "b"]}},
            "required": ["size", "kind"],
            "additionalProperties": False,
            "$defs": {"small": {"type": "integer", "minimum": 0, "maximum": 9}},
        },
    },
}


@pytest.fixture
def tool(weather):
    return {"type": "function", "function": weather}


def post(server, **more):
    body = {"messages": ASKED, **SETTINGS, **more}
    return httpx2.post(server.url + "/v1/chat/completions", json=body, timeout=60)


def test_a_conversation_with_a_tool_from_question_to_answer(caller, tool):
    client = caller.client()
    first = client.chat.completions.create(messages=ASKED, tools=[tool], **SETTINGS)
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
    calls = choice.message.tool_calls
    assert [json.loads(c.function.arguments) for c in calls] == [{"city": "Ulm"}, {"city": "Bonn"}]
    assert all(c.id.startswith("call_") and c.type == "function" and c.function.name == "weather" for c in calls)
    assert len({c.id for c in calls}) == 2
    answers = [
        {"role": "tool", "tool_call_id": c.id, "content": text} for c, text in zip(calls, ["wet", "dry"], strict=True)
    ]
    turns = [*ASKED, choice.message.model_dump(exclude_none=True), *answers]
    last = client.chat.completions.create(messages=turns, tools=[tool], **SETTINGS).choices[0]
    assert last.message.content == "In Ulm only." and last.finish_reason == "stop" and not last.message.tool_calls


def test_a_stream_has_the_same_calls_piece_by_piece(caller, tool):
    client = caller.client()
    text, calls, reasons = "", [], []
    for chunk in client.chat.completions.create(messages=ASKED, tools=[tool], stream=True, **SETTINGS):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        reasons.append(chunk.choices[0].finish_reason)
        for call in delta.tool_calls or []:
            if call.id:
                assert call.index == len(calls) and call.type == "function"
                calls.append([call.function.name, []])
            calls[call.index][1].append(call.function.arguments)
    assert text == "I look." and reasons[-1] == "tool_calls"
    assert [(n, "".join(a)) for n, a in calls] == [("weather", '{"city": "Ulm"}'), ("weather", '{"city": "Bonn"}')]
    assert all(len(pieces) > 2 for _, pieces in calls)  # the arguments came in pieces
    with client.chat.completions.stream(messages=ASKED, tools=[tool], **SETTINGS) as stream:
        final = stream.get_final_completion().choices[0]
    assert [c.function.arguments for c in final.message.tool_calls] == ["".join(a) for _, a in calls]


def test_one_call_at_most_without_parallel_calls(caller, tool):
    made = post(caller, tools=[tool], parallel_tool_calls=False).json()["choices"][0]
    assert len(made["message"]["tool_calls"]) == 1 and made["finish_reason"] == "tool_calls"


def test_none_leaves_the_tools_out(caller, tool):
    with_none, without = post(caller, tools=[tool], tool_choice="none", max_tokens=5), post(caller, max_tokens=5)
    assert with_none.json()["usage"]["prompt_tokens"] == without.json()["usage"]["prompt_tokens"] < 60
    assert "tool_calls" not in with_none.json()["choices"][0]["message"]


def test_a_call_cut_off_by_its_length_says_so(caller, tool):
    whole = post(caller, tools=[tool]).json()["usage"]["completion_tokens"]
    for length in range(2, whole):
        choice = post(caller, tools=[tool], max_tokens=length).json()["choices"][0]
        assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "push_heap"}}])
def test_a_forced_call_keeps_to_its_schema(caller, tool, choice):
    pytest.importorskip("llguidance")
    for seed in range(3):
        made = post(
            caller, tools=[tool, HEAP], tool_choice=choice, temperature=1.5, seed=seed, parallel_tool_calls=False,
            max_tokens=400, messages=[{"role": "user", "content": "heap"}],
        ).json()["choices"][0]  # fmt: skip
        if made["finish_reason"] == "length":  # a text of its schema may be endless
            continue
        (call,) = made["message"]["tool_calls"]
        assert made["finish_reason"] == "tool_calls" and made["message"]["content"] is None
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "push_heap":
            assert 0 <= arguments["size"] <= 9 and arguments["kind"] in ("a", "b") and len(arguments) == 2
        else:
            assert choice == "required" and set(arguments) == {"city"}
    if choice != "required":
        assert call["function"]["name"] == "push_heap"


def test_strict_functions_bind_a_model_that_may_choose(caller, tool):
    pytest.importorskip("llguidance")
    strict = {**tool, "function": {**tool["function"], "strict": True}}
    schema = {"type": "object", "properties": {"city": {"enum": ["Bonn"]}}, "required": ["city"]}
    other = {**tool, "function": {**strict["function"], "parameters": {**schema, "additionalProperties": False}}}
    free = post(caller, tools=[strict], temperature=0).json()["choices"][0]["message"]
    assert free["content"].startswith("I look.")
    made = post(caller, tools=[other], temperature=0).json()["choices"][0]["message"]
    assert all(json.loads(c["function"]["arguments"]) == {"city": "Bonn"} for c in made.get("tool_calls", []))


def test_a_schema_that_cannot_be_checked_is_refused_where_it_would_have_to_be(caller):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    odd = {"type": "function", "function": {"name": "odd", "parameters": schema}}
    refused = post(caller, tools=[odd], tool_choice="required")
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "tools"
    assert "uniqueItems" in refused.json()["error"]["message"]
    assert post(caller, tools=[odd], max_tokens=2).status_code == 200


@pytest.mark.parametrize(
    "more, param, words",
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", '"function"'),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
        ({"tools": [HEAP, HEAP]}, "tools", "a different name"),
        ({"tools": [HEAP], "tool_choice": "any"}, "tool_choice", "required"),
        ({"tools": [HEAP], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "push_heap"),
        ({"tools": [HEAP], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "function"),
        ({"tools": [HEAP], "response_format": {"type": "json_object"}}, "response_format", "no room for calls"),
        ({"tools": [{**HEAP, "colour": 1}]}, "tools[0].colour", "Unrecognized"),
    ],
)
def test_tools_that_cannot_be_obeyed_are_refused(caller, more, param, words):
    error = post(caller, **more).json()["error"]
    assert error["param"] == param and words in error["message"]


def test_the_client_raises_what_is_refused(caller, tool):
    with pytest.raises(openai.BadRequestError, match="no tools are given"):
        caller.client().chat.completions.create(messages=ASKED, tool_choice="required", **SETTINGS)


@pytest.mark.parametrize("form", [HERMES, LLAMA3, MISTRAL])
@pytest.mark.parametrize(
    "more", [{"tool_choice": "required"}, {"parallel_tool_calls": False, "tool_choice": "required"}]
)
def test_the_grammar_of_every_form_compiles_and_is_read_back(caller, form, more):
    pytest.importorskip("llguidance")
    plan = read_plan({"tools": [HEAP], **more})
    compiler, tokenizer = caller.engine.engine.grammars, caller.engine.tokenizer
    grammar = compiler.start(constrain(plan, SamplingParams(), form, {}))
    body = json.dumps({"name": "push_heap", form.arguments: {}})[:-3] + '{"size":3,"kind":"a"}}'
    text = {"hermes": f"<tool_call>\n{body}\n</tool_call>", "llama3": body, "mistral": f"[TOOL_CALLS][{body}]"}[
        form.name
    ]
    assert all(grammar.accept(token) for token in tokenizer.encode(text, add_special_tokens=False))
    assert grammar.accept(tokenizer.stop_ids[0])
    assert "<[7]>" in call_grammar(plan, form, {form.open: 7}) or form is LLAMA3


@pytest.mark.parametrize("form", [HERMES, LLAMA3, MISTRAL])
@pytest.mark.parametrize("is_special", [False, True])
def test_a_strict_function_leaves_words_free_and_checks_calls(caller, form, is_special):
    pytest.importorskip("llguidance")
    plan = read_plan({"tools": [{**HEAP, "function": {**HEAP["function"], "strict": True}}]})
    compiler, tokenizer = caller.engine.engine.grammars, caller.engine.tokenizer
    token = tokenizer.special_ids["<|im_start|>"]  # stands for the tag

    def takes(text: str, kind: str) -> bool:
        body = f'{{"name": "push_heap", "{form.arguments}": {{"size":3,"kind":"{kind}"}}}}'
        ending = {"hermes": f"\n{body}\n</tool_call>", "llama3": body, "mistral": f"[{body}]"}[form.name]
        pieces = [text, *([] if kind == "none" else [form.open, ending])]
        ids = [
            i
            for piece in pieces
            for i in (
                [token] if is_special and piece == form.open else tokenizer.encode(piece, add_special_tokens=False)
            )
        ]
        grammar = compiler.start(constrain(plan, SamplingParams(), form, {form.open: token} if is_special else {}))
        for i in ids:
            if not grammar.allowed()[i] or not grammar.accept(i):
                return False
        return grammar.accept(tokenizer.stop_ids[0])

    assert takes("In words.", "none") and takes("", "a") and not takes("", "c")
    assert takes("In words.", "a") or form.is_bare


def test_a_fixed_form_and_forced_calls_exclude_each_other():
    plan = read_plan({"tools": [HEAP], "tool_choice": "required"})
    with pytest.raises(RequestError, match="no room for calls"):
        constrain(plan, SamplingParams(regex="a"), HERMES, {})
