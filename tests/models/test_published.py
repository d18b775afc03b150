"""Checks of published configs name the field, what it holds and what was expected."""

from types import SimpleNamespace

import pytest

from modelwright.base.errors import ConfigError
from modelwright.models.published import (
    check_heads,
    check_published,
    check_sizes,
    required,
    split_hidden,
    token_ids_from_hf,
    token_ids_to_hf,
    whole_rope_from_hf,
)


def test_ids_go_there_and_back():
    for eos in (None, 2, [1, 106]):
        values = {"bos_token_id": 0, "eos_token_id": eos, "pad_token_id": None}
        assert token_ids_to_hf(SimpleNamespace(**token_ids_from_hf(values))) == values


def test_sizes_and_heads():
    check_sizes(SimpleNamespace(a=1), "a")
    check_heads(4, 2)
    assert split_hidden(64, 4) == 16 and required({"n": 3}, "n") == 3
    for wrong in (0, True, 1.0, None):
        with pytest.raises(ConfigError, match="a is .*at least 1"):
            check_sizes(SimpleNamespace(a=wrong), "a")
    with pytest.raises(ConfigError, match="num_kv_heads is 3"):
        check_heads(4, 3)
    with pytest.raises(ConfigError, match="hidden_size is 65"):
        split_hidden(65, 4)
    with pytest.raises(ConfigError, match="n is '3'"):
        required({"n": "3"}, "n")


def test_another_family_or_value_is_refused_and_a_missing_one_is_fine():
    check_published({"model_type": "a", "x": 1}, "a", x=1, y=2)
    with pytest.raises(ConfigError, match="model_type is 'b'"):
        check_published({"model_type": "b"}, "a")
    with pytest.raises(ConfigError, match="x is 2; the a model here computes 1 only"):
        check_published({"x": 2}, "a", x=1)


def test_part_of_a_head_is_refused_where_whole_heads_are_rotated():
    assert whole_rope_from_hf({"rope_theta": 5.0}).theta == 5.0
    for values in ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}):
        with pytest.raises(ConfigError, match="partial_rotary_factor is 0.5"):
            whole_rope_from_hf(values)
