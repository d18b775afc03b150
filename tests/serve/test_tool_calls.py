"""Calls are found however the stream is cut; what is no call stays text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.serve.tool_calls import HERMES, LLAMA3, MISTRAL, CallParser, form_of


def read(form, pieces, is_parallel=True):
    parser, text, calls = CallParser(form, is_parallel), "", []
    for found in [*(parser.push(piece) for piece in pieces), parser.finish()]:
        text += found.text
        for delta in found.calls:
            if delta.id is not None:
                assert delta.index == len(calls) and delta.name
                calls.append([delta.name, ""])
            calls[delta.index][1] += delta.arguments
    return text, [tuple(call) for call in calls]


TWO = [("f", '{"x": 1}'), ("g", "{}")]
CASES = [
    (
        HERMES,
        'Hi.\n<tool_call>\n{"name": "f", "arguments": {"a": ["[{\\"}"], "b": {}}}\n</tool_call>\n'
        '<tool_call>{"arguments": {}, "name": "g"}</tool_call>\n',
        ("Hi.", [("f", '{"a": ["[{\\"}"], "b": {}}'), ("g", "{}")]),
    ),
    (HERMES, "no <tool_ cal", ("no <tool_ cal", [])),
    (HERMES, "<tool_call>oops</tool_call> x", ("<tool_call>oops</tool_call> x", [])),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', ("", [("f", "{}")])),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call> z', (" z", [("f", '{"a": 1}')])),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a"', ("", [("f", '{"a"')])),  # cut off by its length
    (HERMES, '<tool_call>{"nam', ('<tool_call>{"nam', [])),
    (HERMES, "  hello  ", ("  hello  ", [])),
    (LLAMA3, '{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}', ("", TWO)),
    (LLAMA3, '<|python_tag|>{"name": "f", "parameters": {"x": 1}}', ("", [("f", '{"x": 1}')])),
    (LLAMA3, '{"a": 1}', ('{"a": 1}', [])),
    (LLAMA3, 'plain {"name": "f"}', ('plain {"name": "f"}', [])),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "g"}]', ("", TWO)),
    (MISTRAL, ' [{"name": "f", "arguments": {"x": 1}}]', ("", [("f", '{"x": 1}')])),
    (MISTRAL, "[1] is a citation", ("[1] is a citation", [])),
]  # fmt: skip


@pytest.mark.parametrize("form, text, expected", CASES)
def test_every_cut_of_a_stream_gives_the_same_calls(form, text, expected):
    assert read(form, [text]) == expected
    assert read(form, list(text)) == expected
    for cut in range(len(text)):
        assert read(form, [text[:cut], text[cut:]]) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OBJECT = st.dictionaries(st.text(max_size=5), JSON, max_size=3)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from(["f", "get_it"]), OBJECT), min_size=1, max_size=3),
    st.sampled_from([HERMES, LLAMA3, MISTRAL]),
    st.booleans(),
    st.integers(1, 7),
)
def test_whatever_the_arguments_are_they_come_through_whole(wanted, form, is_ascii, step):
    bodies = [json.dumps({"name": n, form.arguments: a}, ensure_ascii=is_ascii) for n, a in wanted]
    text = {
        "hermes": "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies),
        "llama3": "; ".join(bodies),
        "mistral": "[TOOL_CALLS][" + ", ".join(bodies) + "]",
    }[form.name]
    said, calls = read(form, [text[i : i + step] for i in range(0, len(text), step)])
    assert said == "" and [(name, json.loads(arguments)) for name, arguments in calls] == wanted
    assert len(read(form, [text], is_parallel=False)[1]) == 1


@settings(deadline=None)
@given(st.text(alphabet='<tool_call>/{}[]",: \\name\n1', max_size=60), st.sampled_from([HERMES, LLAMA3, MISTRAL]))
def test_noise_is_read_alike_in_one_piece_and_in_many(text, form):
    assert read(form, [text]) == read(form, list(text))


def test_the_form_is_told_by_the_template():
    assert form_of("{{ '[TOOL_CALLS]' }}") is MISTRAL and form_of("<tool_call>") is HERMES
    assert form_of('{"name": function name, "parameters": dictionary}') is LLAMA3
    assert form_of("<tool_call>", takes_tools=False) is HERMES and form_of(None) is HERMES
    assert len(MISTRAL.new_id()) == 9 and MISTRAL.new_id().isalnum() and HERMES.new_id().startswith("call_")
