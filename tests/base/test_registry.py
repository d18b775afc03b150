"""The one reader of tables."""

import pytest

from modelwright.base.errors import ConfigError
from modelwright.base.registry import lookup

TABLE = {"path": "pathlib:Path", "join": "posixpath:join"}


def test_a_name_is_imported_when_it_is_asked_for():
    assert lookup(TABLE, "join", "function")("a", "b") == "a/b"


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    with pytest.raises(ConfigError, match=r"function is 'jion'; known: join, path\. Did you mean 'join'\?"):
        lookup(TABLE, "jion", "function")
    with pytest.raises(ConfigError, match=r"'zzz'; known: join, path\.$"):
        lookup(TABLE, "zzz", "function")
