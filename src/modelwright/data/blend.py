"""What a training run is fed, from the settings of its recipe: sources, their shares, and the order of their rows.

    data:
      sources:
        - {path: runs/web, weight: 3}         # a data set that mw data or mw data run made
        - {path: runs/book-tokens, weight: 1} # token shards that mw shards made
      temperature: 2.0
      rows: documents
      curriculum: {kind: stages, num_stages: 4}
      difficulty: {by: length}

Texts are encoded once into token shards beside the run, so that memory does not follow the size of the corpus and a
run that goes on after a kill reads the very same tokens. A curriculum orders the rows of each source by the difficulty
of their documents; documents of like difficulty are laid into rows together, since a row of an easy and a hard one is
neither.

Not done: a curriculum over the sources themselves (shares that change on the way).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from modelwright.base.artifact import MANIFEST
from modelwright.base.errors import ConfigError, DataError
from modelwright.data.curriculum import CurriculumConfig, Difficulties, order_by
from modelwright.data.feed import Feed, Order, RowSource, Sequencer, shuffled
from modelwright.data.mix import Mixture, mixing_weights
from modelwright.data.shards import read_rows, read_texts
from modelwright.data.token_shards import INDEX, PackedRows, StreamRows, TokenShards, write_token_shards
from modelwright.tokenizer.bpe import Tokenizer

MAX_GROUPS = 32  # of documents of like difficulty that share rows
_ROWS_PER_GROUP = 8  # at least; each group may leave one row part empty
_SEEDS_APART = 1009

Score = Callable[[TokenShards], Difficulties]  # the perplexity of each document


@dataclass(frozen=True)
class BlendSource:
    """One source of a run."""

    path: Path  # data set of mw data or mw data run, or token shards of mw shards
    weight: float | None = None  # share before the temperature; None, for all sources: as many tokens as it has


@dataclass(frozen=True)
class DifficultyConfig:
    """What makes a document difficult."""

    by: Literal["length", "perplexity", "field"]
    model: Path | None = None  # of "perplexity": folder of the language model that finds it; with the run's tokenizer
    field: str | None = None  # of "field": name of the number in each document or its metadata

    def __post_init__(self) -> None:
        for kind, name in (("perplexity", "model"), ("field", "field")):
            if (self.by == kind) != (getattr(self, name) is not None):
                raise ConfigError(
                    f"data.difficulty.by is {self.by!r} and {name} is {getattr(self, name)}; {name} belongs to "
                    f"by: {kind}, and that needs it."
                )


@dataclass(frozen=True)
class BlendConfig:
    """Sources of a run, their shares, and the order of their rows."""

    sources: tuple[BlendSource, ...]
    temperature: float = 1.0  # shares go with size ** (1 / temperature): 1 as they are, inf all equal
    rows: Literal["stream", "documents"] = "stream"  # cut every T tokens; or whole documents, attention inside each
    curriculum: CurriculumConfig = CurriculumConfig()
    difficulty: DifficultyConfig | None = None  # None: of random order
    num_workers: int = 0  # threads that fetch batches ahead

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("data.sources is empty; name at least one data set or folder of token shards.")
        has_weight = {source.weight is not None for source in self.sources}
        if len(has_weight) > 1:
            missing = next(source.path for source in self.sources if source.weight is None)
            raise ConfigError(
                f"data.sources: {missing} has no weight and others have one. Give all one, or none for their sizes."
            )
        if len(self.sources) == 1 and (self.temperature != 1.0 or self.sources[0].weight is not None):
            raise ConfigError("data has one source, so its weight and temperature change nothing. Leave them out.")
        if (self.curriculum.kind == "random") != (self.difficulty is None):
            raise ConfigError(
                f"data.curriculum.kind is {self.curriculum.kind!r} and data.difficulty is {self.difficulty}; an order "
                "other than random needs a difficulty, and a difficulty such an order."
            )
        if self.difficulty is not None and self.rows != "documents":
            raise ConfigError(
                f"data.rows is {self.rows!r}: a row of the stream mixes documents of all difficulties, so a curriculum "
                "would order nothing. Set data.rows to documents."
            )
        mixing_weights({str(i): source.weight or 1.0 for i, source in enumerate(self.sources)}, self.temperature)
        if any(source.weight is not None and not source.weight > 0 for source in self.sources):
            raise ConfigError("data.sources has a weight that is not above 0. Leave out what is not used.")


class Blend:
    """The rows of a run, ready to be fed.

    Args:
        config: Which they are.
        tokenizer: Of the model that reads them.
        row_len: T.
        work: Folder of the run; texts are encoded into it, and difficulties kept there, once.
        score: Gives the perplexity of each document where the settings ask for it.

    Raises:
        DataError: A source is missing, empty, or of another tokenizer; a difficulty is missing or no number.
    """

    def __init__(self, config: BlendConfig, tokenizer: Tokenizer, row_len: int, work: Path, score: Score | None = None):
        self.config = config
        self.names = [f"{number}-{source.path.name}" for number, source in enumerate(config.sources)]
        self.shards = [
            _open(source.path, tokenizer, work / f"tokens-{name}", config.difficulty)
            for source, name in zip(config.sources, self.names, strict=True)
        ]
        self.difficulties = [
            self._difficulties(shards, work / f"difficulties-{name}.npy", score)
            for shards, name in zip(self.shards, self.names, strict=True)
        ]
        self.rows = [
            _rows(shards, row_len, config.rows, found)
            for shards, found in zip(self.shards, self.difficulties, strict=True)
        ]
        sizes = [source.weight or shards.num_tokens for source, shards in zip(config.sources, self.shards, strict=True)]
        self.shares = mixing_weights(dict(zip(self.names, sizes, strict=True)), config.temperature)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sources, each counted once."""
        return sum(shards.num_tokens for shards in self.shards)

    def feed(self, batch_size: int, seed: int) -> Feed:
        """Return the batches of a run, from its first one."""
        orders = {name: self._order(number, seed) for number, name in enumerate(self.names)}
        sequencer: Sequencer = Mixture(orders, self.shares)
        return Feed(self.rows, sequencer, batch_size, num_workers=self.config.num_workers)

    def describe(self, num_rows: int) -> list[dict[str, Any]]:
        """Return what each source gives to a run of so many rows; more than a few epochs is repetition."""
        return [
            {
                "path": str(source.path),
                "num_tokens": shards.num_tokens,
                "num_documents": shards.num_documents,
                "share": self.shares[name],
                "num_epochs": num_rows * self.shares[name] / len(rows),
            }
            for source, shards, rows, name in zip(self.config.sources, self.shards, self.rows, self.names, strict=True)
        ]

    def _order(self, number: int, seed: int) -> Order:
        own_seed, rows, found = seed * _SEEDS_APART + number, self.rows[number], self.difficulties[number]
        if found is None:
            return shuffled(len(rows), own_seed)
        assert isinstance(rows, PackedRows)
        return order_by(rows.mean_over_rows(found), self.config.curriculum, own_seed)

    def _difficulties(self, shards: TokenShards, kept: Path, score: Score | None) -> Difficulties | None:
        difficulty = self.config.difficulty
        if difficulty is None:
            return None
        if difficulty.by == "length":
            return shards.lengths().astype(np.float64)
        if difficulty.by == "field":
            return shards.difficulties()
        if kept.is_file():
            return np.load(kept, allow_pickle=False)  # type: ignore[no-any-return]
        if score is None:
            raise ConfigError(
                "data.difficulty.by is 'perplexity', and nothing that scores was handed in. Give a score."
            )
        found = score(shards)
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, found)
        return found


def _open(path: Path, tokenizer: Tokenizer, encoded: Path, difficulty: DifficultyConfig | None) -> TokenShards:
    """Return a source as token shards; texts are encoded into a folder of the run, unless they are there already."""
    if (path / INDEX).is_file():
        return TokenShards(path, tokenizer)
    if not (encoded / INDEX).is_file():
        parents = [path] if (path / MANIFEST).is_file() else []
        field = None if difficulty is None else difficulty.field
        numbers = None if field is None else read_difficulties(path, field)
        write_token_shards(read_texts(path), tokenizer, encoded, parents=parents, difficulties=numbers)
    return TokenShards(encoded, tokenizer)


def read_difficulties(folder: Path, field: str) -> Iterator[float]:
    """Yield the number that each document of a data set has under a name, in itself or its metadata.

    Raises:
        DataError: A document has none, or what it has is no finite number; file and entry are named.
    """
    for path, number, row in read_rows(folder):
        found = row.get(field, (row.get("metadata") or {}).get(field))
        try:
            value = math.nan if found is None or isinstance(found, bool) else float(found)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise DataError(
                f"{path}, entry {number}: {field} is {found!r:.60}; expected a number, the difficulty of the document. "
                "Score the documents first, or order them by length or perplexity."
            )
        yield value


def _rows(shards: TokenShards, row_len: int, kind: str, difficulties: Difficulties | None) -> RowSource:
    if kind == "stream":
        return StreamRows(shards, row_len)
    return PackedRows(shards, row_len, None if difficulties is None else _groups(difficulties, shards, row_len))


def _groups(difficulties: Difficulties, shards: TokenShards, row_len: int) -> npt.NDArray[np.int64]:
    """Return the group of each document: from easy to hard, about as many tokens in each."""
    lengths = shards.lengths()
    num = int(np.clip(shards.num_tokens // (_ROWS_PER_GROUP * row_len), 1, MAX_GROUPS))
    ranked = np.argsort(difficulties, kind="stable")
    before = np.cumsum(lengths[ranked]) - lengths[ranked]
    groups = np.empty(len(lengths), np.int64)
    groups[ranked] = before * num // shards.num_tokens
    return groups


def source_paths(data: Path | BlendConfig) -> Sequence[Path]:
    """Return the folders that a run reads."""
    return [data] if isinstance(data, Path) else [source.path for source in data.sources]
