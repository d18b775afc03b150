"""One dataclass tree, three spellings: Python, a YAML recipe, and ``--section.field=value``.

Precedence: defaults in the dataclass < recipe < command line. A name that no field has, a value of the wrong type
or a required field left out is a `ConfigError` that names the place and the nearest right name.
"""

import copy
import dataclasses
import difflib
import glob
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from modelwright.base.errors import ConfigError

T = TypeVar("T")


def load(cls: type[T], recipe: Path | Mapping[str, Any] | None = None, arguments: Sequence[str] = ()) -> T:
    """Build a ``cls`` from its defaults, a YAML recipe (or what was read from one) and ``--a.b=value`` arguments.

    Raises:
        ConfigError: The recipe cannot be read, or a name or value in it or in the arguments is wrong.
    """
    values = copy.deepcopy(dict(recipe)) if isinstance(recipe, Mapping) else read_recipe(recipe) if recipe else {}
    for argument in arguments:
        name, sep, value = argument.removeprefix("--").partition("=")
        if not (argument.startswith("--") and sep and name):
            raise ConfigError(f"{argument!r} is not a setting; write --section.field=value.")
        _place(values, name, value)
    return build(cls, values)


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe as nested plain values.

    ``recipes/qlora-8b.yaml`` finds ``recipes/finetune/qlora-8b.yaml`` where no other folder beside it has that name.

    Raises:
        ConfigError: No such file, not YAML, or not a mapping of settings.
    """
    path = Path(path)
    if not path.is_file():
        below = sorted(path.parent.glob(f"*/{glob.escape(path.name)}")) if path.name else []
        if len(below) != 1:
            hint = f"Is it one of {', '.join(map(str, below))}?" if below else "recipes/ holds examples."
            raise ConfigError(f"The recipe {path} does not exist. Give the path of a .yaml file. {hint}")
        path = below[0]
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The recipe {path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"The recipe {path} holds a {type(values).__name__}; expected settings as name: value.")
    return values


def _place(values: dict[str, Any], name: str, value: str) -> None:
    *path, last = name.split(".")
    place = values
    for part in path:
        inner = place.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--{name}: {part} is a single value ({inner!r}), not a section of settings.")
        place = inner
    place[last] = value


def build(cls: type[T], values: Mapping[str, Any], where: str = "", default: T | None = None) -> T:
    """Make a ``cls`` from nested plain values, checking every name and type.

    What is not given stays as it is in ``default``, in nested sections too: an override of one setting leaves a
    method's other ones alone. A section whose ``name`` is chosen anew begins with the defaults of that choice, which
    its class may tell by a method ``choose(name)``.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where.rstrip('.')} is {values!r}; expected a section of settings.")
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {where}{near[0]}?" if near else f"Known here: {', '.join(sorted(known))}."
            raise ConfigError(f"{where}{name} is not a setting. {hint}")
    hints = typing.get_type_hints(cls)
    default = _chosen_anew(default, values.get("name"))
    arguments = {}
    for name, field in known.items():
        if name in values:
            arguments[name] = convert(values[name], hints[name], f"{where}{name}", _default_of(field, default))
        elif default is not None:
            arguments[name] = getattr(default, name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(
                f"{where}{name} is required and was not given. Write it in the recipe or --{where}{name}=..."
            )
    return cls(**arguments)


def _default_of(field: dataclasses.Field[Any], default: Any) -> Any:
    if default is not None:
        return getattr(default, field.name)
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _chosen_anew(default: Any, name: Any) -> Any:
    """Return a section's defaults for the ``name`` that is given, if it is another one."""
    if default is None or not isinstance(name, str) or name == getattr(default, "name", name):
        return default
    return default.choose(name) if hasattr(default, "choose") else None


def convert(value: Any, hint: Any, where: str, default: Any = None) -> Any:
    """Turn one YAML or command-line value into the annotated type; a section is laid over ``default``.

    >>> convert("3e-4", float, "optimizer.learning_rate")
    0.0003
    >>> convert("none", int | None, "seed") is None
    True
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None or value == "none":
            return None
        return convert(value, _member_for(value, args), where, default)
    if is_dataclass(hint):
        kind = typing.cast(type, hint)
        under = default if isinstance(default, kind) else None
        return value if isinstance(value, kind) else build(kind, value, f"{where}.", under)
    if origin is typing.Literal:
        if value not in args:
            near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
            extra = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{where} is {value!r}; known: {', '.join(map(str, args))}.{extra}")
        return value
    if origin in (list, tuple):
        return _convert_sequence(value, origin, args, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {value!r}; expected a mapping.")
        return {str(k): convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
    return _convert_scalar(value, hint, where)


def _member_for(value: Any, members: Sequence[Any]) -> Any:
    """Return the member of a union that a value is meant for: a section for settings, anything else for the others."""
    kinds = [member for member in members if member is not type(None)]
    is_section = isinstance(value, Mapping) or is_dataclass(value)
    return next((kind for kind in kinds if is_dataclass(kind) == is_section), kinds[0])


def _convert_sequence(value: Any, origin: type, args: tuple[Any, ...], where: str) -> Any:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        raise ConfigError(f"{where} is {value!r}; expected a list.")
    return origin(convert(item, args[0] if args else Any, f"{where}[{i}]") for i, item in enumerate(items))


def _convert_scalar(value: Any, hint: Any, where: str) -> Any:
    words = {"true": True, "false": False}
    if hint is bool and isinstance(value, str) and value in words:
        return words[value]
    is_lossless = isinstance(value, hint) or isinstance(value, str) or (hint is float and isinstance(value, int))
    if hint is Path and isinstance(value, str):
        return Path(value)
    try:
        if not is_lossless or (isinstance(value, bool) != (hint is bool)):
            raise TypeError
        if hint is int and isinstance(value, str):
            return int(value.replace("_", ""))
        if hint is float and math.isnan(float(value)):  # no bound that a setting has would refuse it
            raise ValueError
        return hint(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{where} is {value!r}; it must be {_describe(hint)}.") from None


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def to_dict(config: Any) -> Any:
    """Return a settings tree as plain values that YAML and JSON can hold, and that `build` reads back."""
    if is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, (list, tuple)):
        return [to_dict(item) for item in config]
    if isinstance(config, Mapping):
        return {str(k): to_dict(v) for k, v in config.items()}
    return str(config) if isinstance(config, Path) else config
