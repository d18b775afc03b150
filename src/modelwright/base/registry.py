"""Names to things: the one reader of every room's hand-written table.

A table is a plain dictionary from a name to ``"package.module:attribute"``, imported when it is asked for.
"""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from modelwright.base.errors import ConfigError


def lookup(table: Mapping[str, str], name: str, what: str) -> Any:
    """Import and return the thing called ``name``.

    Args:
        table: Name to ``"module:attribute"``.
        name: The name that was asked for.
        what: What the table holds, for the error: ``"architecture"``.

    Raises:
        ConfigError: The name is not in the table; the message lists those that are.
    """
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{what} is {name!r}; known: {', '.join(sorted(table))}.{hint}")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
