"""Recipes of methods with a head of their own at toy size: encoders, encoder-decoders and forecasters.

The encoder is of the family of the recipe's base where that folder is there, else a BERT; examples are ragged random
tokens. In the place of packing, batches that are padded further than they need are compared with those that are not.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelwright.data.examples import (
    ExampleLoader,
    GroupBatch,
    PairBatch,
    SeriesBatch,
    TextBatch,
    length_mask,
    pad,
    random_of,
    shift_right,
)
from modelwright.data.masking import mask_tokens
from modelwright.data.pack import IGNORED
from modelwright.models.assemble import find_class
from modelwright.models.heads import SUFFIXES, Labels
from modelwright.models.sentence import SentenceEncoder
from modelwright.models.series import SeriesRegressor
from modelwright.models.t5 import T5, T5Config
from modelwright.models.weights import read_config
from modelwright.nn.init import init_weights
from modelwright.train.contrastive import Contrastive
from modelwright.train.heads import SequenceClassification, SeriesRegression, TextRegression
from modelwright.train.masked import MaskedLanguageModeling, Writing
from modelwright.train.objective import Objective
from modelwright.train.selfcheck import NUM_ROWS, ROW_LEN, VOCAB_SIZE, Subject, stir

FIRST_WORD = 5  # ids below are the padding and the marks of an encoder
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def task_subject(
    config: Any,
    make_model: Callable[[], nn.Module],
    make_objective: Callable[[], Objective],
    collate: Callable[..., Any],
) -> Subject:
    """Return the subject of a method whose batches are examples.

    Args:
        collate: From the numbers of examples, the epoch and how many positions of padding to add, to a batch.
    """

    def make_loader(micro_batch_size: int, extra: int) -> ExampleLoader:
        return ExampleLoader(NUM_ROWS, functools.partial(collate, extra=extra), micro_batch_size, seed=0)

    return Subject(make_model, make_objective, None, config.loop, [], make_loader=make_loader)


def masked_subject(config: Any) -> Subject:
    """Make a recipe of masked language modelling small."""
    texts, ordinary = _texts(NUM_ROWS), np.arange(FIRST_WORD, VOCAB_SIZE)

    def collate(numbers: Sequence[int], epoch: int, extra: int) -> TextBatch:
        words = [list(range(len(texts[i]))) for i in numbers]
        pairs = [
            mask_tokens(texts[i], w, 1, ordinary, config.masking, random_of(0, epoch, i))
            for i, w in zip(numbers, words, strict=True)
        ]
        labels = _wider(pad([pair[1] for pair in pairs], IGNORED), extra, IGNORED)
        return _text_batch([pair[0] for pair in pairs], labels, extra)

    return task_subject(config, lambda: _encoder(config.base, "masked_lm"), MaskedLanguageModeling, collate)


def classify_subject(config: Any) -> Subject:
    """Make a recipe of classes, or of one number a text, small."""
    texts, is_value = _texts(NUM_ROWS), config.kind == "values"
    num = 1 if is_value else len(config.labels or "abc")
    labels = torch.arange(NUM_ROWS)[:, None] / 4.0 if is_value else torch.arange(NUM_ROWS) % num

    def collate(numbers: Sequence[int], epoch: int, extra: int) -> TextBatch:
        return _text_batch([texts[i] for i in numbers], labels[list(numbers)], extra)

    def objective() -> Objective:
        return TextRegression() if is_value else SequenceClassification(smoothing=config.label_smoothing)

    return task_subject(config, lambda: _encoder(config.base, "sequence_classification", num), objective, collate)


def embed_subject(config: Any) -> Subject:
    """Make a recipe of sentence vectors small: groups of a text, its positive and a hard negative."""
    texts = _texts(3 * NUM_ROWS)

    def collate(numbers: Sequence[int], epoch: int, extra: int) -> GroupBatch:
        rows = [texts[3 * i + k] for i in numbers for k in range(3)]
        ids, mask = (_wider(t, extra, 0) for t in (pad(rows, 0), length_mask(rows)))
        return GroupBatch(ids.view(len(numbers), 3, -1), mask.view(len(numbers), 3, -1))

    sizes = tuple(size for size in (8, 16) if config.sizes)
    return task_subject(
        config,
        lambda: SentenceEncoder(_encoder(config.base, "encoder"), "mean", False),
        lambda: Contrastive(config.temperature, sizes, config.is_symmetric),
        collate,
    )


def write_subject(config: Any) -> Subject:
    """Make a recipe of an encoder-decoder small."""
    sources, targets = _texts(NUM_ROWS), _texts(NUM_ROWS, seed=1)
    shape = T5Config(VOCAB_SIZE, hidden_size=32, head_dim=8, intermediate_size=48, num_layers=2, num_heads=4)

    def collate(numbers: Sequence[int], epoch: int, extra: int) -> PairBatch:
        rows = [sources[i] for i in numbers]
        ids, mask = (_wider(t, extra, 0) for t in (pad(rows, 0), length_mask(rows)))
        labels = _wider(pad([targets[i] for i in numbers], IGNORED), extra, IGNORED)
        return PairBatch(ids, labels, mask, shift_right(labels, 0, 0, IGNORED))

    return task_subject(
        config, lambda: stir(init_weights(T5(shape), 0)), lambda: Writing(config.label_smoothing), collate
    )


def forecast_subject(config: Any) -> Subject:
    """Make a recipe of a series small; windows have one length, so nothing is padded."""
    values = torch.from_numpy(np.random.default_rng(0).normal(size=NUM_ROWS + config.model.window)).float()

    def collate(numbers: Sequence[int], epoch: int, extra: int) -> SeriesBatch:
        windows = torch.stack([values[i : i + config.model.window] for i in numbers])
        return SeriesBatch(windows, torch.stack([values[i + config.model.window] for i in numbers]))

    found = task_subject(
        config, lambda: stir(init_weights(SeriesRegressor(config.model), 0)), SeriesRegression, collate
    )
    return found


def _encoder(base: Path | None, task: str, num_labels: int = 0) -> nn.Module:
    """Return an encoder with a head, of the family of a folder where that is there."""
    values: dict[str, Any] = {"model_type": "bert", "architectures": ["BertModel"]}
    if base is not None and (base / "config.json").is_file():
        values = read_config(base)
    stem = (values.get("architectures") or ["BertModel"])[0]
    for suffix in sorted(filter(None, [*SUFFIXES.values(), "Model"]), key=len, reverse=True):
        stem = stem.removesuffix(suffix)
    values = {**values, **SMALL, "architectures": [stem + SUFFIXES[task]]}
    if num_labels:
        values |= Labels.numbered(num_labels).to_hf()
    kind = find_class(values)
    return stir(init_weights(kind(kind.config_class.from_hf(values)), 0))


def _texts(num: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(FIRST_WORD, VOCAB_SIZE, random.integers(6, ROW_LEN)).tolist() for _ in range(num)]


def _text_batch(rows: Sequence[Any], labels: Tensor, extra: int) -> TextBatch:
    ids, mask = (_wider(t, extra, 0) for t in (pad(rows, 0), length_mask(rows)))
    return TextBatch(ids, labels, mask)


def _wider(tensor: Tensor, extra: int, fill: int) -> Tensor:
    return nn.functional.pad(tensor, (0, extra), value=fill)
