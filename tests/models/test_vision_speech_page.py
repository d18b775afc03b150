"""The examples on docs/vision_speech.md run as they stand, and are short."""

import re
from pathlib import Path

import pytest

pytest.importorskip("PIL")
PAGE = Path(__file__).parents[2] / "docs" / "vision_speech.md"
SECTIONS = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("section", SECTIONS)
def test_an_example_runs_as_it_stands(section):
    lines = [line for line in SECTIONS[section].splitlines() if line and not line.startswith(("import ", "from "))]
    assert len(lines) <= 10
    exec(compile(SECTIONS[section], f"{PAGE.name}: {section}", "exec"), {})


def test_every_family_has_one():
    assert len(SECTIONS) == 5
