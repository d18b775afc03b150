"""Bodies are parsed strictly, and whatever is wrong is a RequestError, never another exception."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.base.errors import RequestError
from modelwright.serve.body import parse_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_any_object_of_valid_text_is_read_back(value):
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        with pytest.raises(RequestError, match="surrogate"):
            parse_json(json.dumps(value).encode())
    else:
        assert parse_json(json.dumps(value).encode()) == value


@given(st.binary(max_size=60))
def test_any_bytes_give_an_object_or_a_refusal(data):
    try:
        assert isinstance(parse_json(data), dict)
    except RequestError as error:
        assert error.status == 400 and error.code == "malformed_json"
