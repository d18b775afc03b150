"""Every table of every room: each entry imports, is documented, and is not there twice by accident."""

import importlib
import pkgutil
from typing import Any

import pytest

import modelwright
from modelwright.base.registry import lookup
from modelwright.cli.main import VERBS


def find_tables() -> dict[str, dict[str, str]]:
    """Every dictionary from names to ``"module:attribute"`` in the first file of a room."""
    found = {}
    for room in pkgutil.iter_modules(modelwright.__path__):
        module = importlib.import_module(f"modelwright.{room.name}")
        for name, value in vars(module).items():
            is_table = isinstance(value, dict) and name.isupper()
            if is_table and value and all(isinstance(v, str) and ":" in v for v in value.values()):
                found[f"{room.name}.{name}"] = value
    found["cli.VERBS"] = {name: verb.target for name, verb in VERBS.items()}
    return found


TABLES = find_tables()
ENTRIES = [(table, name) for table, entries in TABLES.items() for name in entries]


def test_the_rooms_have_tables():
    assert {"models.FAMILIES", "train.METHODS", "optim.OPTIMIZERS", "data.PARSERS"} <= set(TABLES)


@pytest.mark.parametrize(("table", "name"), ENTRIES, ids=[f"{table}[{name}]" for table, name in ENTRIES])
def test_every_entry_imports_and_is_documented(table: str, name: str):
    found: Any = lookup(TABLES[table], name, table)
    if isinstance(found, dict):  # a family: published architecture names to classes
        assert found and all(callable(c) and hasattr(c, "config_class") for c in found.values())
        return
    assert callable(found)
    assert (found.__doc__ or "").strip(), f"{TABLES[table][name]} has no docstring"


def test_methods_and_their_settings_have_the_same_names():
    assert set(TABLES["train.METHODS"]) == set(TABLES["train.METHOD_CONFIGS"])
