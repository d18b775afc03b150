"""One settings tree, three spellings, and refusals that name the right word."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from modelwright.base.config import build, convert, load, read_recipe, to_dict
from modelwright.base.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    learning_rate: float = 1e-3
    name: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, ...] = (0.9, 0.95)


@dataclass(frozen=True)
class Outer:
    out: Path
    num_steps: int | None = None
    is_shuffled: bool = False
    title: str = "run"
    words: list[str] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    other: Inner | None = None


WANTED = Outer(
    out=Path("runs/a"),
    num_steps=10,
    is_shuffled=True,
    title="t",
    words=["a", "b"],
    inner=Inner(learning_rate=0.5, name="muon", betas=(0.8, 0.9)),
    other=Inner(),
)


def test_python_yaml_and_command_line_spell_the_same_tree(tmp_path: Path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "out: runs/a\nnum_steps: 10\nis_shuffled: true\ntitle: t\nwords: [a, b]\n"
        "inner: {learning_rate: 0.5, name: muon, betas: [0.8, 0.9]}\nother: {}\n"
    )
    spelled = [
        "--out=runs/a --num_steps=10 --is_shuffled=true --title=t --words=a,b".split(),
        "--inner.learning_rate=0.5 --inner.name=muon --inner.betas=0.8,0.9 --other.learning_rate=0.001".split(),
    ]
    assert load(Outer, recipe) == WANTED
    assert load(Outer, None, spelled[0] + spelled[1]) == WANTED
    assert load(Outer, to_dict(WANTED)) == WANTED


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("out: x\nnum_steps: 5\ntitle: from recipe\n")
    found = load(Outer, recipe, ["--num_steps=7"])
    assert (found.num_steps, found.title, found.is_shuffled) == (7, "from recipe", False)


@dataclass(frozen=True)
class Rule:
    name: str = "plain"
    rate: float = 1.0
    steps: int = 3

    def choose(self, name: str) -> "Rule":
        return Rule(name, rate=self.rate)


@dataclass(frozen=True)
class Loop:
    rule: Rule = field(default_factory=Rule)
    size: int = 16
    inner: Inner = field(default_factory=Inner)
    other: Inner | None = None


@dataclass(frozen=True)
class Method:
    loop: Loop = field(default_factory=lambda: Loop(Rule("lean", 0.1, 9), 8, Inner(0.5, "muon")))


def test_an_override_is_laid_over_the_defaults_of_its_section():
    assert load(Method, {}).loop == Method().loop
    found = load(Method, {"loop": {"size": 4, "rule": {"steps": 5}}}, ["--loop.inner.learning_rate=0.25"]).loop
    assert found == Loop(Rule("lean", 0.1, 5), 4, Inner(0.25, "muon"))
    assert load(Method, {"loop": {"other": {"name": "muon"}}}).loop.other == Inner(name="muon")
    assert load(Method, to_dict(Method(Loop()))) == Method(Loop())


def test_a_section_with_another_name_begins_with_the_defaults_of_that_choice():
    assert load(Method, {}, ["--loop.rule.name=wide"]).loop.rule == Rule("wide", 0.1, 3)
    assert load(Method, {}, ["--loop.inner.name=adamw"]).loop.inner == Inner()
    assert load(Method, {}, ["--loop.inner.name=muon"]).loop.inner == Inner(0.5, "muon")
    with pytest.raises(ConfigError, match=r"loop\.inner\.name is 'nuon'"):
        load(Method, {}, ["--loop.inner.name=nuon"])


def test_a_tree_survives_yaml_and_back():
    assert build(Outer, yaml.safe_load(yaml.safe_dump(to_dict(WANTED)))) == WANTED


def test_values_read_from_a_recipe_are_not_changed_by_arguments():
    values = {"out": "x", "inner": {"name": "muon"}}
    load(Outer, values, ["--inner.name=adamw"])
    assert values == {"out": "x", "inner": {"name": "muon"}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"out": "x", "num_step": 3}, r"num_step is not a setting\. Did you mean num_steps\?"),
        ({"out": "x", "inner": {"learning_rat": 1}}, r"Did you mean inner\.learning_rate\?"),
        ({"out": "x", "zzz": 1}, r"zzz is not a setting\. Known here: .*num_steps"),
        ({}, r"out is required .* --out="),
        ({"out": "x", "inner": 3}, r"inner is 3; expected a section"),
        ({"out": "x", "inner": {"name": "muno"}}, r"'muno'; known: adamw, muon\. Did you mean 'muon'\?"),
        ({"out": "x", "num_steps": "many"}, r"num_steps is 'many'; it must be a whole number"),
        ({"out": "x", "num_steps": 1.5}, r"num_steps is 1\.5; it must be a whole number"),
        ({"out": "x", "num_steps": True}, r"num_steps is True; it must be a whole number"),
        ({"out": "x", "is_shuffled": 1}, r"is_shuffled is 1; it must be true or false"),
        ({"out": "x", "is_shuffled": "yes"}, r"is_shuffled is 'yes'; it must be true or false"),
        ({"out": "x", "inner": {"learning_rate": "fast"}}, r"inner\.learning_rate is 'fast'; it must be a number"),
        ({"out": "x", "inner": {"learning_rate": "nan"}}, r"inner\.learning_rate is 'nan'; it must be a number"),
        ({"out": "x", "inner": {"learning_rate": float("nan")}}, r"inner\.learning_rate is nan; it must be a number"),
        ({"out": "x", "words": 3}, r"words is 3; expected a list"),
        ({"out": "x", "inner": {"betas": ["x"]}}, r"inner\.betas\[0\] is 'x'"),
        ({"out": "x", "shares": 3}, r"shares is 3; expected a mapping"),
        ({"out": 3}, r"out is 3"),
    ],
)
def test_wrong_names_and_types_are_refused_by_place_and_value(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        build(Outer, values)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not valid YAML"), ("- 1\n- 2\n", "holds a list"), ("just words", "holds a str")],
)
def test_a_recipe_that_is_no_mapping_is_refused_by_name(tmp_path: Path, text: str, message: str):
    recipe = tmp_path / "broken.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=rf"broken\.yaml.*{message}"):
        read_recipe(recipe)


def test_a_missing_recipe_and_one_that_is_not_text_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bytes\.yaml"):
        read_recipe(tmp_path / "bytes.yaml")


def test_an_empty_recipe_means_defaults(tmp_path: Path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load(Inner, tmp_path / "empty.yaml") == Inner()


@pytest.mark.parametrize("argument", ["num_steps=3", "--num_steps", "--=3", "-num_steps=3"])
def test_an_argument_that_is_no_setting_is_refused(argument: str):
    with pytest.raises(ConfigError, match=r"write --section\.field=value"):
        load(Outer, {"out": "x"}, [argument])


def test_a_value_cannot_be_used_as_a_section():
    with pytest.raises(ConfigError, match="title is a single value"):
        load(Outer, {"out": "x", "title": "t"}, ["--title.words=3"])


def test_none_is_spelled_none_or_null():
    assert load(Outer, {"out": "x", "num_steps": 3}, ["--num_steps=none"]).num_steps is None
    assert load(Outer, {"out": "x", "other": None}).other is None
    assert load(Outer, {"out": "x", "other": {}}, ["--other=none"]).other is None


@given(st.integers())
def test_any_whole_number_is_read_back_from_its_spelling(value: int):
    assert convert(str(value), int, "x") == value
    assert convert(f"{value:_}", int, "x") == value


@given(st.floats(allow_nan=False))
def test_any_number_is_read_back_from_its_spelling(value: float):
    assert convert(repr(value), float, "x") == value


@given(st.text())
def test_any_text_stays_itself(value: str):
    assert convert(value, str, "x") == value


@dataclass(frozen=True)
class Either:
    data: Path | Inner
    more: Inner | None = None


def test_of_a_path_and_a_section_the_value_says_which_is_meant():
    assert build(Either, {"data": "runs/a"}) == Either(Path("runs/a"))
    assert load(Either, {"data": {"name": "muon"}}, ["--data.learning_rate=2"]) == Either(Inner(2.0, "muon"))
    assert load(Either, {"data": {"name": "muon"}}, ["--data=runs/b"]) == Either(Path("runs/b"))
    for config in (Either(Path("a")), Either(Inner(), Inner())):
        assert build(Either, to_dict(config)) == config
    with pytest.raises(ConfigError, match="data.nam is not a setting. Did you mean data.name?"):
        build(Either, {"data": {"nam": "muon"}})
    with pytest.raises(ConfigError, match="more is 'x'; expected a section of settings"):
        build(Either, {"data": "a", "more": "x"})


def test_a_recipe_is_found_one_folder_below_where_no_other_has_its_name(tmp_path: Path):
    for folder, name in (("finetune", "one"), ("finetune", "two"), ("pretrain", "two")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.yaml").write_text(f"method: {folder}\n")
    assert read_recipe(tmp_path / "one.yaml") == {"method": "finetune"}
    with pytest.raises(ConfigError, match=r"two\.yaml does not exist.*one of .*finetune/two\.yaml, .*pretrain/two"):
        read_recipe(tmp_path / "two.yaml")
