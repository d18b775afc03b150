"""Texts, pairs and labels from JSON lines to ids with an encoder's own tokenizer.

Rows are ``{"text": ..., "label": ...}``, with ``"pair"`` for a second text; a label is a class's name or number, or a
number to predict. A text that spells out a special token does not become one. Texts beyond the context are cut, the
longer of a pair first, and counted. Not done: labels of tokens from files (see `modelwright.data.tagger`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch

from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import read_jsonl
from modelwright.data.examples import TextBatch, length_mask, pad


class TextEncoder:
    """A folder's tokenizer for an encoder.

    Args:
        folder: With ``tokenizer.json``.
        max_tokens: Of a text or pair, special tokens included.
        has_types: Whether the model tells the first text of a pair from the second.
    """

    def __init__(self, folder: Path, max_tokens: int, has_types: bool = False):
        file = folder / "tokenizer.json"
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for a missing or damaged file
            raise DataError(f"{file} cannot be read as a tokenizer: {error}. Give the model's folder.") from error
        self.backend.encode_special_tokens = True
        self.backend.no_padding()
        self.backend.no_truncation()
        self.max_tokens, self.has_types = max_tokens, has_types
        self.num_cut = 0
        pad_id = self.find("[PAD]", "<pad>", "<|endoftext|>")
        self.pad_id = 0 if pad_id is None else pad_id

    def find(self, *spellings: str) -> int | None:
        """Return the id of the first of several spellings that the vocabulary has."""
        found = (self.backend.token_to_id(text) for text in spellings)
        return next((i for i in found if i is not None), None)

    def encode(self, texts: Sequence[str | tuple[str, str]]) -> list[tokenizers.Encoding]:
        """Return the encodings of texts or pairs, cut to the context."""
        found = self.backend.encode_batch(list(texts))
        self.num_cut += sum(len(e.ids) > self.max_tokens for e in found)
        if any(len(e.ids) > self.max_tokens for e in found):
            self.backend.enable_truncation(self.max_tokens, strategy="longest_first")
            found = self.backend.encode_batch(list(texts))
            self.backend.no_truncation()
        return found

    def batch(self, encodings: Sequence[tokenizers.Encoding], labels: torch.Tensor) -> TextBatch:
        """Return encodings as one batch."""
        ids = [e.ids for e in encodings]
        types = pad([e.type_ids for e in encodings], 0) if self.has_types else None
        return TextBatch(pad(ids, self.pad_id), labels, length_mask(ids), types)


@dataclass(frozen=True)
class Labelled:
    """Texts or pairs with their labels."""

    texts: list[str | tuple[str, str]]
    labels: np.ndarray  # (N,) int64 classes, or (N,) float32 values
    names: tuple[str, ...]  # of the classes; (): values


def read_labelled(file: Path, names: Sequence[str] | None = None, *, is_value: bool = False) -> Labelled:
    """Read labelled rows.

    Args:
        file: JSON lines.
        names: The classes in their order; None: those of the file, sorted.
        is_value: Labels are numbers to predict, not classes.

    Raises:
        DataError: A row has no text, or a label that is none of the classes or no finite number; it says which row.
    """
    texts: list[str | tuple[str, str]] = []
    raw: list[object] = []
    for number, row in enumerate(read_jsonl(file), start=1):
        text, second = row.get("text"), row.get("pair")
        if not isinstance(text, str) or not (second is None or isinstance(second, str)) or "label" not in row:
            raise DataError(
                f"{file}, row {number} has the fields {', '.join(map(str, row))}; expected a text, a label, and a text "
                "as pair if there is one. Mend or remove the row."
            )
        texts.append(text if second is None else (text, second))
        raw.append(row["label"])
    if not texts:
        raise DataError(f"{file} holds no row. Give a file with one labelled text a line.")
    if is_value:
        return Labelled(texts, _values(file, raw), ())
    known = tuple(names) if names is not None else _names_of(raw)
    places = {name: i for i, name in enumerate(known)}
    classes = np.zeros(len(raw), dtype=np.int64)
    for i, label in enumerate(raw):
        place = places.get(str(label))
        if place is None and isinstance(label, int) and 0 <= label < len(known):
            place = label
        if place is None:
            raise DataError(
                f"{file}, row {i + 1} has the label {label!r}; expected one of {', '.join(known)}, or its number from "
                f"0 to {len(known) - 1}. Mend the row, or name all classes in labels."
            )
        classes[i] = place
    return Labelled(texts, classes, known)


def _names_of(raw: Sequence[object]) -> tuple[str, ...]:
    """Return the classes of a file: numbers in their order, then names in theirs."""
    numbers = sorted({label for label in raw if isinstance(label, int)})
    return tuple(map(str, numbers)) + tuple(sorted({str(label) for label in raw if not isinstance(label, int)}))


def _values(file: Path, raw: Sequence[object]) -> np.ndarray:
    for i, label in enumerate(raw):
        if isinstance(label, bool) or not isinstance(label, (int, float)) or not np.isfinite(label):
            raise DataError(f"{file}, row {i + 1} has the label {label!r}; expected a finite number. Mend the row.")
    return np.array(raw, dtype=np.float32)


def need_token(encoder: TextEncoder, what: str, *spellings: str) -> int:
    """Return the id of a special token that a method cannot do without.

    Raises:
        ConfigError: The tokenizer has none.
    """
    found = encoder.find(*spellings)
    if found is None:
        raise ConfigError(
            f"The tokenizer has no {what} ({', '.join(spellings)}), which this method needs. Use the folder of a model "
            "that was made for it."
        )
    return found


def find_sentinels(encoder: TextEncoder) -> list[int]:
    """Return the ids of T5's sentinels, ``<extra_id_0>`` first.

    Raises:
        ConfigError: The tokenizer has none.
    """
    need_token(encoder, "sentinels", "<extra_id_0>")
    found: list[int] = []
    while (i := encoder.find(f"<extra_id_{len(found)}>")) is not None:
        found.append(i)
    return found
