"""Find evaluation items in training data: an index of their word n-grams, kept on disk and shared with `evaluate`.

An item counts as seen where a document holds one of its n-grams of 13 words, word for word whatever the case and the
blanks; an item of 8 to 12 words counts as a whole, and shorter ones are not indexed, since chance would find them
everywhere. A hit names item and document with the characters on both sides; neighbouring n-grams join into one hit.
n-grams that many items share (the frame of a prompt) are left out, and the index says how many. Proposals come from
64-bit hashes; the words themselves decide.

Source: Brown et al., "Language Models are Few-Shot Learners" (2020), appendix C (13-grams, items shorter than 8 words
left alone); Grattafiori et al., "The Llama 3 Herd of Models" (2024), section 5.1.4, for the share of an item that is
covered. Not done: paraphrases and translations, which no n-gram finds.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from modelwright.base.artifact import new_artifact
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import read_json, read_jsonl, write_json, write_jsonl
from modelwright.base.types import Document
from modelwright.data.shingles import Hashes, Places, hash_grams, hash_words, plain_words, word_places

ITEMS, GRAMS, SETTINGS = "items.jsonl", "ngrams.safetensors", "index.json"
TEXT_FIELDS = ("text", "question", "problem", "prompt", "instruction", "context", "passage", "input", "sentence")


@dataclass(frozen=True)
class IndexConfig:
    """Which n-grams of an item give it away."""

    num_words: int = 13
    min_words: int = 8  # an item of fewer words is not indexed; one between counts as a whole
    max_items: int | None = 10  # an n-gram of more items is the frame of a prompt and left out; None: all count

    def __post_init__(self) -> None:
        if not 1 <= self.min_words <= self.num_words <= 100:
            raise ConfigError(
                f"num_words is {self.num_words} and min_words {self.min_words}; expected 1 <= min_words <= num_words "
                "<= 100."
            )


@dataclass(frozen=True)
class Hit:
    """A passage that document and item have in common."""

    document: str
    item: str
    start: int  # characters of the document
    end: int
    item_start: int  # characters of the item
    item_end: int
    num_words: int


class EvaluationIndex:
    """The n-grams of evaluation items, sorted, with where each stands."""

    def __init__(self, items: Sequence[Document], config: IndexConfig | None = None):
        self.config = config or IndexConfig()
        self.items = list(items)
        self.grams: dict[int, tuple[Hashes, Places, Places]] = {}  # by length: sorted hashes, items, first words
        self.num_left_out = 0  # n-grams that too many items share
        words = hash_words([item.text for item in self.items])
        counts = np.diff(words.offsets)
        self.num_short = int((counts < self.config.min_words).sum())
        lengths = np.where(counts < self.config.min_words, 0, np.minimum(counts, self.config.num_words))
        for length in sorted(set(lengths.tolist()) - {0}):
            grams = hash_grams(words, length)
            owners = np.repeat(np.arange(len(self.items)), np.diff(grams.offsets))
            places = np.arange(len(owners)) - grams.offsets[owners]
            chosen = lengths[owners] == length
            self.grams[length] = self._sorted(grams.hashes[chosen], owners[chosen], places[chosen])

    def _sorted(self, hashes: Hashes, owners: Places, places: Places) -> tuple[Hashes, Places, Places]:
        order = np.argsort(hashes, kind="stable")
        hashes, owners, places = hashes[order], owners[order], places[order]
        if self.config.max_items is not None and len(hashes):
            which = np.unique(hashes, return_inverse=True)[1]
            pairs = np.unique(np.stack([which, owners]), axis=1)
            is_kept = (np.bincount(pairs[0]) <= self.config.max_items)[which]
            self.num_left_out += len(np.unique(which[~is_kept]))
            hashes, owners, places = hashes[is_kept], owners[is_kept], places[is_kept]
        return hashes, owners, places

    @property
    def num_grams(self) -> int:
        """How many n-grams are looked for."""
        return sum(len(hashes) for hashes, _, _ in self.grams.values())

    def find(self, document: Document) -> list[Hit]:
        """Return what the document has in common with items, in the order of its characters."""
        words = hash_words([document.text])
        found: list[tuple[int, int, int, int]] = []  # item, its word, the document's word, length
        for length, (hashes, owners, places) in self.grams.items():
            if len(words.hashes) < length:
                continue
            grams = hash_grams(words, length).hashes
            first, last = (np.searchsorted(hashes, grams, side=side) for side in ("left", "right"))
            for at in np.flatnonzero(last > first).tolist():
                rows = slice(int(first[at]), int(last[at]))
                pairs = zip(owners[rows].tolist(), places[rows].tolist(), strict=True)
                found += [(owner, place, at, length) for owner, place in pairs]
        return self._join(document, found) if found else []

    def _join(self, document: Document, found: list[tuple[int, int, int, int]]) -> list[Hit]:
        """Join n-grams that follow each other on both sides, check their words, and tell their characters."""
        found.sort(key=lambda f: (f[0], f[2] - f[1], f[2]))
        runs: list[list[int]] = []
        for item, place, at, length in found:
            last = runs[-1] if runs else None
            if last and last[0] == item and last[2] - last[1] == at - place and at <= last[2] + last[3]:
                last[3] = max(last[3], at + length - last[2])
            else:
                runs.append([item, place, at, length])
        words, places = plain_words(document.text), word_places(document.text)
        hits = []
        for item, place, at, length in runs:
            source = self.items[item]
            if plain_words(source.text)[place : place + length] != words[at : at + length]:
                continue
            theirs = word_places(source.text)
            hits.append(
                Hit(
                    document=document.id,
                    item=source.id,
                    start=places[at][0],
                    end=places[at + length - 1][1],
                    item_start=theirs[place][0],
                    item_end=theirs[place + length - 1][1],
                    num_words=length,
                )
            )
        return sorted(hits, key=lambda hit: (hit.start, hit.end, hit.item, hit.item_start))

    def save(self, path: Path) -> None:
        """Write an artifact of kind "index": the items, their n-grams, the settings."""
        with new_artifact(Path(path), "index", settings=asdict(self.config)) as (work, measured):
            write_jsonl(work / ITEMS, ({"id": item.id, "text": item.text} for item in self.items))
            tensors = {}
            for length, parts in self.grams.items():
                for name, values in zip(("hashes", "items", "words"), parts, strict=True):
                    tensors[f"{length}.{name}"] = np.ascontiguousarray(values)
            save_file(tensors, work / GRAMS)
            write_json(
                work / SETTINGS,
                {**asdict(self.config), "num_left_out": self.num_left_out, "num_short": self.num_short},
            )
            measured.update(num_items=len(self.items), num_ngrams=self.num_grams, num_short=self.num_short)


def load_index(path: Path) -> EvaluationIndex:
    """Read an index that was saved.

    Raises:
        DataError: The folder holds none.
    """
    path = Path(path)
    settings = read_json(path / SETTINGS)
    try:
        index = EvaluationIndex([], IndexConfig(**{k: settings[k] for k in ("num_words", "min_words", "max_items")}))
        index.items = [Document(row["id"], row["text"]) for row in read_jsonl(path / ITEMS)]
        index.num_left_out, index.num_short = settings["num_left_out"], settings["num_short"]
        tensors = load_file(path / GRAMS)
        for length in sorted({int(name.split(".")[0]) for name in tensors}):
            hashes, items, words = (tensors[f"{length}.{name}"] for name in ("hashes", "items", "words"))
            index.grams[length] = (hashes, items, words)
    except (KeyError, TypeError, OSError, SafetensorError) as error:
        raise DataError(f"{path} is not an index of evaluation items: {error}. Make it again.") from error
    return index


def read_items(path: Path, text_fields: Sequence[str] = TEXT_FIELDS) -> list[Document]:
    """Read evaluation items from JSON lines, one item a line; a row without an id is called by file and line.

    The text of an item is what stands in the fields named, one below the other.

    Raises:
        DataError: The file cannot be read, or a row has none of the fields.
    """
    items = []
    for number, row in enumerate(read_jsonl(Path(path)), start=1):
        parts = [row[field] for field in text_fields if isinstance(row.get(field), str) and row[field].strip()]
        if not parts:
            raise DataError(
                f"{path}, row {number}: none of the fields {', '.join(text_fields)} holds text; it has "
                f"{', '.join(map(str, row))}. Rename a field, or name it."
            )
        items.append(Document(str(row.get("id") or f"{Path(path).name}/{number}"), "\n".join(parts)))
    return items


@dataclass(frozen=True)
class ItemCoverage:
    """How much of one item the training data holds."""

    item: str
    covered_fraction: float  # of its words, in the document that covers most
    num_documents: int
    document: str  # that covers most


def coverage(index: EvaluationIndex, hits: Iterable[Hit]) -> list[ItemCoverage]:
    """Return what is seen of each item that has a hit, most first: what an evaluation flags its items by."""
    covered: dict[str, dict[str, set[int]]] = {}
    texts = {item.id: item.text for item in index.items}
    places: dict[str, list[tuple[int, int]]] = {}
    for hit in hits:
        words = places.setdefault(hit.item, word_places(texts[hit.item]))
        inside = {n for n, (start, end) in enumerate(words) if start >= hit.item_start and end <= hit.item_end}
        covered.setdefault(hit.item, {}).setdefault(hit.document, set()).update(inside)
    rows = []
    for item, documents in covered.items():
        best = max(documents, key=lambda name: (len(documents[name]), name))
        rows.append(ItemCoverage(item, len(documents[best]) / len(places[item]), len(documents), best))
    return sorted(rows, key=lambda row: (-row.covered_fraction, row.item))


@lru_cache(maxsize=4)
def _cached_index(index: Path | None, against: tuple[Path, ...], config: IndexConfig) -> EvaluationIndex:
    """Return the index of a step, made once in a process."""
    if index is not None:
        return load_index(index)
    return EvaluationIndex([item for file in against for item in read_items(file)], config)


@dataclass(frozen=True)
class Decontaminate:
    """Removes documents that hold an n-gram of an evaluation item."""

    index: Path | None = None  # folder of an index that was saved; None: made of the files in `against`
    against: tuple[Path, ...] = ()  # JSON lines of evaluation items
    ngrams: IndexConfig = IndexConfig()  # of an index made here

    def __post_init__(self) -> None:
        if (self.index is None) == (not self.against):
            raise ConfigError("Give either index, the folder of a saved index, or against, files of evaluation items.")

    def hits(self, document: Document) -> list[Hit]:
        """Return every hit of a document, for a report."""
        return _cached_index(self.index, self.against, self.ngrams).find(document)

    def reason(self, document: Document) -> str:
        """Say which item the document holds; empty if none."""
        hits = self.hits(document)
        if not hits:
            return ""
        longest = max(hits, key=lambda hit: hit.num_words)
        num_items = len({hit.item for hit in hits})
        more = f", and of {num_items - 1} more" if num_items > 1 else ""
        where = f"characters {longest.start} to {longest.end}"
        return f"{longest.num_words} words of evaluation item {longest.item} at {where}{more}"


def describe(index: EvaluationIndex, documents: Iterable[Document]) -> dict[str, Any]:
    """Return a report over documents: counts, every hit with its positions, and how far each item is covered."""
    num_documents, hits = 0, []
    for document in documents:
        num_documents += 1
        hits += index.find(document)
    by_document = Counter(hit.document for hit in hits)
    return {
        "num_documents": num_documents,
        "num_documents_hit": len(by_document),
        "num_items": len(index.items),
        "num_items_too_short": index.num_short,
        "num_ngrams": index.num_grams,
        "num_ngrams_left_out": index.num_left_out,
        "items": [asdict(row) for row in coverage(index, hits)],
        "hits": [asdict(hit) for hit in hits],
    }
