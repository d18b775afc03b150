"""Every field that the official client can send is implemented, harmless, neutral, or refused by name."""

import inspect

import httpx2
import pytest
from anthropic.resources.messages import Messages
from hypothesis import given
from hypothesis import strategies as st
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions
from openai.resources.embeddings import Embeddings
from openai.resources.responses import Responses

from modelwright.base.errors import RequestError
from modelwright.serve import conversation, fields, schema, tools

TOOLS = {"tools", "tool_choice", "parallel_tool_calls"}
NOT_FIELDS = {"self", "timeout"}
# Each route, and the method of the official client that asks it.
METHODS = {
    "/v1/chat/completions": ChatCompletions.create,
    "/v1/completions": Completions.create,
    "/v1/responses": Responses.create,
    "/v1/embeddings": Embeddings.create,
    "/v1/messages": Messages.create,
    "/v1/messages/count_tokens": Messages.count_tokens,
}
USUAL = {
    "/v1/completions": {"prompt": "The heap", "max_tokens": 2},
    "/v1/responses": {"input": "The heap", "max_output_tokens": 2},
    "/v1/embeddings": {"input": "The heap"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
}


def fields_of(method):
    """Return the names of a client's method that go into the body of its request."""
    return {name for name in inspect.signature(method).parameters if not name.startswith("extra_")} - NOT_FIELDS


def refusal(server, path, body):
    answer = httpx2.post(server.url + path, json={"model": "tiny", **USUAL[path], **body}, timeout=60)
    error = answer.json().get("error") or {}
    return answer.status_code, error.get("param"), error.get("message", "")


@pytest.mark.parametrize("path", METHODS)
def test_each_field_of_the_official_client_has_one_decision(path):
    sent = fields_of(METHODS[path])
    assert len(sent) >= 5 and {"model"} < sent
    implemented, harmless, neutral, _ = schema.BODIES[path]
    # A client newer than this list has more; those are refused by name (below) until they have a decision.
    new = sent - implemented - set(harmless) - set(neutral)
    assert len(new) <= 3, f"fields that nobody has thought of: {sorted(new)}"
    assert not set(harmless) & set(neutral)


@pytest.mark.service
@pytest.mark.parametrize("path", sorted(set(METHODS) - {"/v1/embeddings"}))
def test_each_decision_is_kept_over_http(server, path):
    implemented, harmless, neutral, _ = schema.BODIES[path]
    for name, kind in harmless.items():
        if name not in implemented:
            right = {str: "x", dict: {"a": "b"}, bool: True}[kind]
            assert refusal(server, path, {name: right})[0] == 200, name
            status, param, told = refusal(server, path, {name: 3.5})
            assert status == 400 and name in (param or told), name
    for name, values in neutral.items():
        if name not in implemented:
            for value in (None, *values):
                assert refusal(server, path, {name: value})[0] == 200, (name, value)
            status, param, told = refusal(server, path, {name: "something else"})
            assert status == 400 and name in (param or told), name
    for name in {"temprature"} | fields_of(METHODS[path]) - implemented - set(harmless) - set(neutral):
        status, param, told = refusal(server, path, {name: 0})
        assert status == 400 and name in (param or told)


@pytest.mark.service
@pytest.mark.parametrize("path", sorted(set(METHODS) - {"/v1/embeddings", "/v1/messages/count_tokens"}))
def test_an_implemented_field_is_read(server, path):
    """What no reader looks at would pass with any value."""
    free = {"metadata", "input", "prompt", "user"}  # anything is a text, or a note
    for name in sorted(schema.BODIES[path][0] - free):
        status, _, told = refusal(server, path, {name: [{"colour": 3.5}]})
        assert status in (400, 404) and told, name


def test_the_classes_of_fields_do_not_overlap():
    for implemented in (fields.CHAT, fields.COMPLETIONS):
        # The documents, which quote and draw nothing, take the settings of drawing with neutral values only.
        only_here = implemented - fields.DRAWING - {"echo", "top_logprobs", "response_format"} - TOOLS
        assert not only_here & (set(fields.HARMLESS) | set(fields.NEUTRAL))
    assert not set(fields.HARMLESS) & set(fields.NEUTRAL)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(sorted(fields.CHAT | fields.COMPLETIONS | set(fields.HARMLESS) | set(fields.NEUTRAL) | {"x"}))


@given(st.dictionaries(NAMES, JSON, max_size=6))
def test_any_values_are_read_or_refused(body):
    readers = [
        lambda: fields.check_names(body, fields.CHAT),
        lambda: fields.sampling(body, fields.max_tokens(body) or 1),
        lambda: fields.streaming(body),
        lambda: conversation.messages(body),
        lambda: tools.read_plan(body),
        lambda: fields.prompts(body, 4),
    ]
    for read in readers:
        try:
            read()
        except RequestError as error:
            assert error.status == 400 and error.param and str(error)


def test_both_spellings_of_the_length_mean_the_same():
    assert fields.max_tokens({"max_tokens": 5}) == fields.max_tokens({"max_completion_tokens": 5}) == 5
    assert fields.max_tokens({"max_tokens": 5, "max_completion_tokens": 5}) == 5
    with pytest.raises(RequestError, match="left out, or equal"):
        fields.max_tokens({"max_tokens": 5, "max_completion_tokens": 6})


def test_false_is_not_zero():
    with pytest.raises(RequestError, match="logprobs is not supported"):
        fields.check_names({"logprobs": 0}, fields.DOCUMENTS)
    with pytest.raises(RequestError, match="n is not supported"):
        fields.check_names({"n": True}, fields.DOCUMENTS)
