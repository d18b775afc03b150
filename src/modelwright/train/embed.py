"""Fine-tune a sentence encoder: texts of one class come near each other, or pairs as they are given.

Data is a folder with ``train.jsonl`` and ``validation.jsonl``: rows ``{"text", "positive"}``, perhaps with
``"negatives"`` (a list, as long in every row), or labelled ``{"text", "label"}`` rows, of which each is paired with
another text of its class, drawn anew every epoch, and with one of another class as hard negative; the batch's other
texts of its class are no negatives. ``is_simcse`` pairs each text with itself. Source: see
`modelwright.train.contrastive`. The score is the share of held-out texts whose nearest training text has their class,
or whose positive is the nearest of all held-out ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import read_jsonl
from modelwright.data.encode import TextEncoder, read_labelled
from modelwright.data.examples import ExampleLoader, GroupBatch, length_mask, pad, random_of
from modelwright.models.sentence import load_sentence_encoder, save_sentence_encoder
from modelwright.train.classify import text_encoder
from modelwright.train.contrastive import Contrastive
from modelwright.train.loop import Hook, LoopConfig
from modelwright.train.task_run import TaskParts, TaskResult, run_parts, task_loop


@dataclass(frozen=True)
class EmbedConfig:
    """A run from a sentence encoder's folder and texts to a fine-tuned one."""

    data: Path  # folder with train.jsonl and validation.jsonl
    base: Path  # folder of a sentence encoder or a plain one
    out: Path  # model folder to make
    temperature: float = 0.05
    sizes: tuple[int, ...] = ()  # Matryoshka: first so many numbers that are trained too
    is_symmetric: bool = False
    is_simcse: bool = False  # pair each text with itself; needs dropout
    dropout: float = 0.1  # while training
    epochs: float | None = 1.0  # passes over the data; None: give loop.num_steps
    max_seq_len: int | None = 128  # tokens a text
    loop: LoopConfig = field(default_factory=lambda: task_loop(5e-5))

    def __post_init__(self) -> None:
        if self.is_simcse and not self.dropout:
            raise ConfigError(
                "is_simcse is set and dropout is 0: a text and itself would be the same. Set dropout: 0.1."
            )


def run_embed(config: EmbedConfig, hooks: Sequence[Hook] = ()) -> TaskResult:
    """Fine-tune, score before and after, and save.

    Raises:
        DataError: A row cannot be used.
    """
    return run_parts(config, prepare_embed(config), hooks, name="embed", rate=config.dropout)


def prepare_embed(config: EmbedConfig, device: str | None = None) -> TaskParts:
    """Return model, objective, data and score; with the device "meta" the model has no numbers."""
    model: Any = load_sentence_encoder(config.base, dtype=torch.float32, device=device)
    encoder = text_encoder(config.base, model.encoder, config.max_seq_len)
    first = next(iter(read_jsonl(config.data / "train.jsonl")), {})
    is_paired = "positive" in first
    seed = config.loop.seed
    if config.is_simcse or is_paired:
        groups = _read_groups(config.data / "train.jsonl", config.is_simcse)
        num = len(groups)
        collate = _fixed_groups(encoder, groups)
    else:
        rows = read_labelled(config.data / "train.jsonl")
        texts = [text for text in rows.texts if isinstance(text, str)]
        num, collate = len(texts), _class_groups(encoder, texts, rows.labels, seed)
    objective = Contrastive(config.temperature, config.sizes, config.is_symmetric)
    loader = ExampleLoader(num, collate, config.loop.micro_batch_size, seed=seed)
    score = _pair_score(encoder, config) if is_paired or config.is_simcse else _class_score(encoder, config)
    return TaskParts(model, objective, loader, score, save_sentence_encoder)


def _read_groups(file: Path, is_simcse: bool) -> list[list[str]]:
    groups: list[list[str]] = []
    for number, row in enumerate(read_jsonl(file), start=1):
        second = row.get("text") if is_simcse else row.get("positive")
        group = [row.get("text"), second, *([] if is_simcse else row.get("negatives") or [])]
        is_text = all(isinstance(text, str) for text in group)
        if not is_text or len(group) != len((groups or [group])[0]):
            raise DataError(
                f"{file}, row {number} has {len(group)} texts; expected a text, a positive and as many negatives as "
                "the first row. Mend or remove the row."
            )
        groups.append(group)
    return groups


def _fixed_groups(encoder: TextEncoder, groups: Sequence[Sequence[str]]) -> Any:
    encodings = encoder.encode([text for group in groups for text in group])
    size = len(groups[0]) if groups else 2
    ids = [e.ids for e in encodings]

    def collate(numbers: Sequence[int], epoch: int) -> GroupBatch:
        return _group_batch(encoder, [ids[i * size + k] for i in numbers for k in range(size)], size)

    return collate


def _class_groups(encoder: TextEncoder, texts: Sequence[str], labels: np.ndarray, seed: int) -> Any:
    ids = [e.ids for e in encoder.encode(texts)]
    places = [np.flatnonzero(labels == kind) for kind in range(int(labels.max()) + 1)]
    if min(map(len, places)) < 2 or len(places) < 2:
        raise DataError(
            f"The classes have {[len(p) for p in places]} texts; expected two classes of two texts or more."
        )

    def collate(numbers: Sequence[int], epoch: int) -> GroupBatch:
        rows, classes = [], []
        for i in numbers:
            random = random_of(seed, epoch, i)
            own = places[labels[i]]
            other = random.choice(np.delete(np.arange(len(places)), labels[i]))
            positive = own[(np.flatnonzero(own == i)[0] + 1 + random.integers(len(own) - 1)) % len(own)]
            rows += [ids[i], ids[positive], ids[random.choice(places[other])]]
            classes.append([int(labels[i]), int(labels[i]), int(other)])
        return replace(_group_batch(encoder, rows, 3), classes=torch.tensor(classes))

    return collate


def _group_batch(encoder: TextEncoder, rows: Sequence[Sequence[int]], size: int) -> GroupBatch:
    ids, mask = pad(rows, encoder.pad_id), length_mask(rows)
    return GroupBatch(ids.view(-1, size, ids.shape[1]), mask.view(-1, size, ids.shape[1]))


@torch.inference_mode()
def embed_texts(model: nn.Module, encoder: TextEncoder, texts: Sequence[str]) -> torch.Tensor:
    """Return the vectors of texts at length 1, (N, D)."""
    parts = []
    for start in range(0, len(texts), 64):
        ids = [e.ids for e in encoder.encode(texts[start : start + 64])]
        parts.append(model(pad(ids, encoder.pad_id), attention_mask=length_mask(ids)).embeddings.float())
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


def _class_score(encoder: TextEncoder, config: EmbedConfig) -> Any:
    known, held_out = (read_labelled(config.data / f"{part}.jsonl") for part in ("train", "validation"))

    def score(model: nn.Module) -> dict[str, float]:
        first, second = (embed_texts(model, encoder, [str(t) for t in rows.texts]) for rows in (known, held_out))
        nearest = (second @ first.T).argmax(-1).numpy()
        return {"nearest_has_class": float((known.labels[nearest] == held_out.labels).mean())}

    return score


def _pair_score(encoder: TextEncoder, config: EmbedConfig) -> Any:
    groups = _read_groups(config.data / "validation.jsonl", config.is_simcse)

    def score(model: nn.Module) -> dict[str, float]:
        first, second = (embed_texts(model, encoder, [group[k] for group in groups]) for k in (0, 1))
        hits = (first @ second.T).argmax(-1) == torch.arange(len(groups))
        return {"positive_is_nearest": float(hits.float().mean())}

    return score
