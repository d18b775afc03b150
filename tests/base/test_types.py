"""Shared nouns: sampling parameters are checked where they are made."""

from typing import Any

import pytest

from modelwright.base.errors import RequestError
from modelwright.base.types import SamplingParams


def test_one_stop_text_and_several_are_the_same_kind():
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    assert SamplingParams(stop=None).stop == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("stop", ("",)),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: Any):
    with pytest.raises(RequestError, match=f"^{field} is") as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


def test_the_smallest_length_cannot_pass_the_largest():
    with pytest.raises(RequestError, match="min_tokens"):
        SamplingParams(max_tokens=3, min_tokens=4)
