"""Every field that the official client can send is implemented, harmless, neutral, or refused by name."""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions

from modelwright.base.errors import RequestError
from modelwright.serve import conversation, fields, tools

TOOLS = {"tools", "tool_choice", "parallel_tool_calls"}
NOT_FIELDS = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}


@pytest.mark.parametrize("method, implemented", [(ChatCompletions, fields.CHAT), (Completions, fields.COMPLETIONS)])
def test_no_field_of_the_official_client_is_unheard_of(method, implemented):
    sent = set(inspect.signature(method.create).parameters) - NOT_FIELDS
    assert len(sent) > 15
    assert sent <= implemented | set(fields.HARMLESS) | set(fields.NEUTRAL)


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
