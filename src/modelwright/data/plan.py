"""A pipeline as its file says it, and the passes over the documents that it takes.

    source: my-docs/                # or a list of {path, licence, text_column, id_column}
    steps:
      - clean                       # a step alone, or with its settings
      - step: near_duplicates
        threshold: 0.8
    out: runs/corpus

Steps that look at one document run one after another in the same pass. A step that compares documents ends a pass:
its signatures are made there, the decision falls between, and the next pass begins with carrying it out.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from modelwright.base.config import build, load, read_recipe, to_dict
from modelwright.base.errors import ConfigError
from modelwright.base.files import hash_file, hash_folder
from modelwright.base.registry import lookup
from modelwright.data import STEPS
from modelwright.data.entry import Limits
from modelwright.data.ocr import OcrConfig
from modelwright.data.shards import MAX_LINE_BYTES, ShardConfig
from modelwright.data.source import Kind, ReadConfig
from modelwright.data.step import CorpusStep, Filter, Mapper, Step

_MAX_PATH_CHARS = 255


@dataclass(frozen=True)
class SourceConfig:
    """One place that documents come from."""

    path: str  # folder or file; also a data set or documents that mw data made, or with kind "dataset" a name
    licence: str = ""  # as an SPDX name where there is one; kept with each document that states none
    kind: Kind = "auto"  # this and the rest as in data/source.py: ReadConfig
    text_column: str = "text"
    id_column: str | None = None
    title_column: str | None = None
    metadata_columns: tuple[str, ...] | None = None
    delimiter: str | None = None
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    datasets: Path | None = None
    ocr: OcrConfig = OcrConfig()
    limits: Limits = Limits()

    def reading(self) -> ReadConfig:
        """Return what a reader of files wants to know."""
        return ReadConfig(**{f.name: getattr(self, f.name) for f in fields(self) if f.name != "licence"})


@dataclass(frozen=True)
class NamedStep:
    """A step, and what the funnel calls it."""

    name: str
    step: Step
    settings: Mapping[str, Any]  # as the file spells them, all resolved


@dataclass(frozen=True)
class PipelineConfig:
    """Where documents come from, what is done to them, and where they go."""

    source: tuple[SourceConfig, ...]
    steps: tuple[NamedStep, ...]
    out: Path
    format: Literal["jsonl", "parquet"] = "jsonl"  # of the shards
    validation_fraction: float = 0.0  # of documents, chosen by a hash of their id
    shard: ShardConfig = ShardConfig()
    document_seconds: float | None = 600.0  # one document may hold a worker for so long; None means for ever
    max_line_bytes: int = MAX_LINE_BYTES  # a longer line of JSON is set aside unread

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError("source is empty; name at least one folder or file that documents come from.")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction is {self.validation_fraction}; it must be from 0 to below 1.")
        if min(*to_dict(self.shard).values(), self.max_line_bytes) < 1:
            raise ConfigError("shard.documents, shard.bytes, shard.out_bytes and max_line_bytes must be at least 1.")


@dataclass(frozen=True)
class _Rest:
    """What a pipeline file holds beside its sources and steps."""

    out: Path
    format: Literal["jsonl", "parquet"] = "jsonl"
    validation_fraction: float = 0.0
    shard: ShardConfig = ShardConfig()
    document_seconds: float | None = 600.0
    max_line_bytes: int = MAX_LINE_BYTES


def read_pipeline(
    recipe: Path | Mapping[str, Any], arguments: Sequence[str] = (), source: Path | None = None
) -> PipelineConfig:
    """Read a pipeline from its file, or from what was read from one, and ``--name=value`` arguments.

    Args:
        recipe: The file, or what it holds.
        arguments: Settings beside the sources and steps.
        source: Read instead of the path that the recipe names; its other settings of the source stay.

    Raises:
        ConfigError: A name, a value or a step in it is wrong; the message says where and what was meant.
    """
    values = dict(recipe) if isinstance(recipe, Mapping) else read_recipe(recipe)
    for name in ("source", "steps"):
        if name not in values:
            raise ConfigError(
                f"The pipeline has no {name} (it has: {', '.join(map(str, values)) or 'nothing'}). "
                "It needs source (a folder or file), steps (a list) and out (a folder)."
            )
    sources, steps = values.pop("source"), values.pop("steps")
    rest = load(_Rest, values, arguments)
    return PipelineConfig(
        source=_replace_path(_build_sources(sources), source),
        steps=build_steps(steps),
        **{field.name: getattr(rest, field.name) for field in fields(rest)},
    )


def _build_sources(value: Any) -> tuple[SourceConfig, ...]:
    entries = value if isinstance(value, list) else [value]
    return tuple(
        build(SourceConfig, {"path": str(entry)} if isinstance(entry, (str, Path)) else entry, f"source[{i}].")
        for i, entry in enumerate(entries)
    )


def _replace_path(sources: tuple[SourceConfig, ...], path: Path | None) -> tuple[SourceConfig, ...]:
    if path is None:
        return sources
    if len(sources) != 1:
        raise ConfigError(f"--source {path} stands for one source, and the pipeline has {len(sources)}. Edit the file.")
    return (replace(sources[0], path=str(path)),)


def build_steps(value: Any) -> tuple[NamedStep, ...]:
    """Make steps from a list of names and of mappings with ``step`` and its settings."""
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"steps is {value!r}; expected a list, each a name or step: name with settings.")
    made, seen = [], Counter[str]()
    for index, entry in enumerate(value):
        settings = {"step": entry} if isinstance(entry, str) else entry
        where = f"steps[{index}]"
        if not isinstance(settings, Mapping) or not isinstance(settings.get("step"), str):
            raise ConfigError(f"{where} is {entry!r}; expected a name, or step: name with settings.")
        name = settings["step"]
        step = build(
            lookup(STEPS, name, f"{where}.step"), {k: v for k, v in settings.items() if k != "step"}, f"{where}."
        )
        seen[name] += 1
        made.append(name_step(name if seen[name] == 1 else f"{name} {seen[name]}", step))
    return tuple(made)


def name_step(name: str, step: Step) -> NamedStep:
    """Give a step the name that the funnel shows."""
    if not isinstance(step, (Filter, Mapper, CorpusStep)):
        raise ConfigError(
            f"{name} is a {type(step).__name__}; expected a Filter, a Mapper or a CorpusStep (data/step.py)."
        )
    return NamedStep(name, step, to_dict(step) if is_dataclass(step) else {"is": repr(step)})


@dataclass(frozen=True)
class Pass:
    """One way through all documents: carry a decision out, run steps on each, sign for the next decision."""

    steps: tuple[NamedStep, ...]
    apply: NamedStep | None = None
    sign: NamedStep | None = None


def plan_passes(steps: Sequence[NamedStep]) -> list[Pass]:
    """Cut the list of steps after each that compares documents."""
    passes: list[Pass] = []
    held: list[NamedStep] = []
    apply: NamedStep | None = None
    for named in steps:
        if is_corpus_step(named.step):
            passes.append(Pass(tuple(held), apply, named))
            held, apply = [], named
        else:
            held.append(named)
    return [*passes, Pass(tuple(held), apply)]


def is_corpus_step(step: Step) -> bool:
    """Tell whether a step must see all documents."""
    return isinstance(step, CorpusStep) and not isinstance(step, (Filter, Mapper))


def step_key(named: NamedStep) -> str:
    """Return what a step's result depends on beside the documents: its settings, and the files that they name."""
    contents = [_hash_path(path) for path in _paths_in(named.step)]
    return json.dumps([named.name, named.settings, contents], sort_keys=True, default=str)


def _paths_in(value: Any) -> list[Path]:
    if isinstance(value, Path):
        return [value]
    if isinstance(value, str) and len(value) < _MAX_PATH_CHARS and "\0" not in value and Path(value).is_file():
        return [Path(value)]
    if is_dataclass(value):
        return [path for field in fields(value) for path in _paths_in(getattr(value, field.name))]
    if isinstance(value, (list, tuple)):
        return [path for item in value for path in _paths_in(item)]
    return []


def _hash_path(path: Path) -> str:
    return hash_file(path) if path.is_file() else hash_folder(path) if path.is_dir() else "missing"


def make_key(*parts: str) -> str:
    """Return a short name for a work folder that changes when any part does."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]
