"""A pipeline file says exactly one thing, and what is misspelt in it is named with the nearest right name."""

from pathlib import Path

import pytest
from tests.data import trial_steps

import modelwright.data
from modelwright.base.errors import ConfigError
from modelwright.data.plan import make_key, plan_passes, read_pipeline, step_key


@pytest.fixture(autouse=True)
def _trial_steps(monkeypatch: pytest.MonkeyPatch):
    for name, target in trial_steps.TABLE.items():
        monkeypatch.setitem(modelwright.data.STEPS, name, target)


def pipeline(**values: object):
    return read_pipeline({"source": "docs", "steps": ["shout"], "out": "runs/x", **values})


def test_a_file_is_read_with_short_and_long_spellings(tmp_path: Path):
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        "source:\n  - docs\n  - {path: more.jsonl, licence: CC0-1.0, text_column: body}\n"
        "steps:\n  - shout\n  - step: at_least\n    chars: 3\n  - shout\nout: runs/x\nshard: {documents: 7}\n"
    )
    config = read_pipeline(file, ["--validation_fraction=0.1", "--shard.bytes=99"])
    assert [str(source.path) for source in config.source] == ["docs", "more.jsonl"]
    assert config.source[1].licence == "CC0-1.0" and config.source[1].text_column == "body"
    assert [named.name for named in config.steps] == ["shout", "at_least", "shout 2"]
    assert config.steps[1].step == trial_steps.AtLeast(3) and config.steps[1].settings == {"chars": 3}
    assert (config.shard.documents, config.shard.bytes, config.validation_fraction) == (7, 99, 0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": ["shuot"]}, r"steps\[0\].step is 'shuot'.*Did you mean 'shout'"),
        ({"steps": ["shout", {"step": "at_least", "chrs": 3}]}, r"steps\[1\].chrs.*Did you mean steps\[1\].chars"),
        ({"steps": [{"step": "at_least", "chars": "many"}]}, r"steps\[0\].chars is 'many'; it must be a whole number"),
        ({"steps": "shout"}, "steps is 'shout'; expected a list"),
        ({"steps": [{"chars": 3}]}, r"steps\[0\] is \{'chars': 3\}; expected a name"),
        ({"source": {"path": "a", "license": "MIT"}}, r"source\[0\].license.*Did you mean source\[0\].licence"),
        ({"source": []}, "source is empty"),
        ({"formt": "jsonl"}, "formt is not a setting. Did you mean format"),
        ({"format": "csv"}, "format is 'csv'; known: jsonl, parquet"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"shard": {"documents": 0}}, "must be at least 1"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(values: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        pipeline(**values)


def test_a_file_without_its_parts_says_which():
    with pytest.raises(ConfigError, match="has no steps"):
        read_pipeline({"source": "docs", "out": "x"})
    with pytest.raises(ConfigError, match="out is required"):
        read_pipeline({"source": "docs", "steps": []})


def test_passes_end_where_documents_are_compared():
    names = [["shout", "drop_copies", "drop_copies", "at_least"], ["drop_copies"], ["shout"], []]
    shapes = []
    for steps in names:
        passes = plan_passes(pipeline(steps=steps).steps)
        shapes.append([(p.apply and p.apply.name, [s.name for s in p.steps], p.sign and p.sign.name) for p in passes])
    assert shapes[0] == [
        (None, ["shout"], "drop_copies"),
        ("drop_copies", [], "drop_copies 2"),
        ("drop_copies 2", ["at_least"], None),
    ]
    assert shapes[1:] == [
        [(None, [], "drop_copies"), ("drop_copies", [], None)],
        [(None, ["shout"], None)],
        [(None, [], None)],
    ]


def test_the_key_of_a_step_changes_with_its_settings_and_the_files_that_they_name(tmp_path: Path):
    from dataclasses import dataclass

    from modelwright.data.plan import name_step

    @dataclass(frozen=True)
    class Against:
        files: tuple[Path, ...] = ()

        def reason(self, document: object) -> str:
            return ""

    listed = tmp_path / "list.txt"
    listed.write_text("a")
    step = name_step("against", Against((listed,)))
    first = step_key(step)
    assert step_key(name_step("against", Against((listed,)))) == first
    listed.write_text("b")
    assert step_key(step) != first
    one, two = (pipeline(steps=[{"step": "at_least", "chars": n}]).steps[0] for n in (1, 2))
    assert step_key(one) != step_key(two)
    assert make_key("ab", "c") != make_key("a", "bc")


def test_what_is_no_step_is_refused():
    from modelwright.data.plan import name_step

    with pytest.raises(ConfigError, match="expected a Filter, a Mapper or a CorpusStep"):
        name_step("thing", object())  # type: ignore[arg-type]
