"""What the pages say can be done can be done: commands, targets, recipes and links."""

import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from modelwright.base.registry import lookup
from modelwright.cli.main import VERBS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
TARGETS = {verb: entry.target for verb, entry in VERBS.items()}


def shell_lines(text: str) -> list[str]:
    """Every command line in the fenced blocks of a page; continued lines are joined, prompts and comments cut."""
    lines = []
    for block in re.findall(r"^```(?:bash|sh|console|shell|text)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ").strip()
            lines += [part.strip() for part in re.split(r"&&|;|\|", re.sub(r"\s#.*", "", line)) if part.strip()]
    return lines


def commands(program: str) -> list[tuple[str, str]]:
    """Every (page, command line) that starts with ``program``."""
    found = []
    for page in PAGES:
        for line in shell_lines(page.read_text(encoding="utf-8")):
            if re.match(rf"(\.venv/bin/)?{program}(\s|$)", line):
                found.append((page.name, line))
    return found


@cache
def parts_of(verb: str) -> dict[str, Any]:
    """The commands below a verb of several by name; none where the verb is one command."""
    found = lookup(TARGETS, verb, "verb")
    return dict(typer.main.get_group(found).commands) if isinstance(found, typer.Typer) else {}


def default_part(verb: str) -> str:
    """The part that is meant where none is named; empty where one must be."""
    found = lookup(TARGETS, verb, "verb")
    return getattr(found.info.cls, "default_part", "") if isinstance(found, typer.Typer) else ""


@cache
def options_of(verb: str, part: str = "") -> set[str]:
    app = typer.Typer(add_completion=False)
    if not part:
        app.command(verb)(lookup(TARGETS, verb, "verb"))
    parameters: list[Any] = (parts_of(verb)[part] if part else typer.main.get_command(app)).params
    return {"--help", *(name for p in parameters for name in (*p.opts, *p.secondary_opts) if name.startswith("-"))}


def mistake_in(line: str) -> str:
    """Say what is wrong with a command line of ``mw``, or nothing."""
    words = shlex.split(re.sub(r"\[([^\]]*)\]", r"\1", line))[1:]  # brackets mark what may be left out
    if not words or words[0].startswith("--") or words[0] in ("VERB", "..."):
        return ""
    if words[0] not in VERBS:
        return f"no verb {words[0]}"
    parts, default = parts_of(words[0]), default_part(words[0])
    if default and words[1:2] and words[1] not in parts:
        words.insert(1, default)
    if parts and words[1:2] and words[1] not in parts:
        return f"mw {words[0]} has no part {words[1]}"
    part = words[1] if parts and words[1:2] else ""
    if parts and not part:
        return ""
    for word in words[1:]:
        is_setting = VERBS[words[0]].takes_settings and re.fullmatch(r"--[a-z_.0-9]+=.*", word)
        if word.startswith("--") and not is_setting and word.split("=")[0] not in options_of(words[0], part):
            return f"mw {words[0]} has no option {word}"
    return ""


@pytest.mark.parametrize(("page", "line"), commands("mw"), ids=lambda value: value)
def test_every_mw_command_on_a_page_names_a_verb_and_options_that_exist(page: str, line: str):
    assert not mistake_in(line), page


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_in_the_help_are_right(verb: str):
    assert VERBS[verb].example.startswith(f"mw {verb} ")
    assert not mistake_in(VERBS[verb].example)


def test_the_check_finds_wrong_commands():
    assert mistake_in("mw quikstart") == "no verb quikstart"
    assert mistake_in("mw serve --prot 3") == "mw serve has no option --prot"
    assert mistake_in("mw serve --loop.seed=3") != ""
    assert mistake_in("mw tokenizer runs/data") == "mw tokenizer has no part runs/data"
    assert mistake_in("mw tokenizer train runs/data --on x") == "mw tokenizer has no option --on"
    assert not mistake_in("mw train recipes/x.yaml --loop.seed=3 [--resume]")
    assert shell_lines("```bash\nmw a && mw b  # c\n```\nmw none\n") == ["mw a", "mw b"]


@pytest.mark.parametrize(("page", "line"), commands("make"), ids=lambda value: value)
def test_every_make_target_on_a_page_exists(page: str, line: str):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in shlex.split(line)[1:]:
        assert "=" in word or word in targets, page
        if word.startswith("ARGS="):
            assert not mistake_in(f"mw quickstart {word.removeprefix('ARGS=')}"), page


def test_every_recipe_and_example_named_on_a_page_exists():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"\b(?:recipes|examples|benchmarks)/[\w/.-]+\.(?:yaml|py|json)", text):
            assert (ROOT / name).is_file(), f"{page.name} names {name}"
    for verb in VERBS.values():
        for name in re.findall(r"recipes/\S+", verb.example):
            assert (ROOT / name).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        assert (page.parent / target.split("#")[0]).exists(), f"{page.name} links to {target}"


def test_the_readme_opens_with_the_two_commands():
    lines = shell_lines((ROOT / "README.md").read_text(encoding="utf-8"))
    assert lines[:2] == ["make quickstart", "make test"]


def test_the_makefile_and_the_package_want_the_same_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch = next(name for name in project["dependencies"] if name.startswith("torch"))
    assert f"TORCH := {torch}\n" in (ROOT / "Makefile").read_text()
