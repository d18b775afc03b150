"""The public entry points: every name resolves and is documented, and importing the package loads nothing heavy."""

import inspect
import subprocess
import sys

import pytest

import modelwright

NAMES = [name for name in modelwright.__all__ if name != "__version__"]
HEAVY = {"torch", "numpy", "transformers", "fastapi", "tokenizers", "matplotlib", "typer", "rich"}


def loaded_after(code: str) -> set[str]:
    """Heavy packages that are loaded once ``code`` has run in an interpreter of its own."""
    report = f"import sys; print(*{HEAVY!r} & sys.modules.keys())"
    shown = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(shown.stdout.split())


def test_the_names_that_checks_from_outside_use_are_there():
    wanted = {"load_model", "save_model", "load_tokenizer", "LLM", "SamplingParams", "Index", "ask"}
    assert wanted <= set(NAMES) <= set(dir(modelwright))


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_resolves_and_is_documented(name: str):
    found = getattr(modelwright, name)
    assert inspect.getdoc(found)
    assert found.__name__ == name


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_after("import modelwright") == set()


def test_shared_nouns_and_the_verb_table_load_no_torch():
    assert loaded_after("import modelwright as mw; mw.SamplingParams(temperature=0); mw.Message('user', 'x')") == set()
    assert loaded_after("import modelwright.cli.main") == set()


def test_the_check_itself_sees_torch():
    assert "torch" in loaded_after("import torch")


def test_an_unknown_name_lists_those_that_are_there():
    with pytest.raises(AttributeError, match=r"has no attribute 'load_modle'; it has: .*load_model"):
        _ = modelwright.load_modle
