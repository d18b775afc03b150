"""Read a training recipe: its ``method`` names the settings that the rest is read into."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelwright.base.config import load, read_recipe
from modelwright.base.errors import ConfigError
from modelwright.base.registry import lookup
from modelwright.train import METHOD_CONFIGS


def read_training_recipe(recipe: Path, arguments: Sequence[str] = ()) -> tuple[str, Any]:
    """Return the method's name and its settings, from the recipe and ``--section.field=value`` arguments.

    Raises:
        ConfigError: The recipe names no known method, or a name or value in it or in the arguments is wrong.
    """
    values = read_recipe(recipe)
    method = values.pop("method", None)
    values.pop("tracking", None)  # read by mw train; no part of what is learned
    if not isinstance(method, str):
        known = ", ".join(METHOD_CONFIGS)
        raise ConfigError(f"The recipe {recipe} has no method (found {method!r}). Add a line method: {known}.")
    return method, load(lookup(METHOD_CONFIGS, method, "method"), values, arguments)
