"""Go on pre-training an encoder on documents by hiding tokens: a domain's language before a task's labels.

Documents are cut into stretches of the row length, with the encoder's own first and last token; what is hidden is drawn
anew every epoch. Source: see `modelwright.data.masking`; Gururangan et al. 2020, arXiv:2004.10964 (domains).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelwright.base.errors import DataError
from modelwright.data.encode import TextEncoder, need_token
from modelwright.data.examples import ExampleLoader, TextBatch, length_mask, pad, random_of
from modelwright.data.masking import MaskingConfig, mask_tokens
from modelwright.data.pack import IGNORED
from modelwright.data.shards import read_texts
from modelwright.models.weights import load_model, save_model
from modelwright.train.classify import text_encoder
from modelwright.train.loop import Hook, LoopConfig
from modelwright.train.masked import MaskedLanguageModeling
from modelwright.train.task_run import TaskParts, TaskResult, held_out_loss, run_parts, task_loop


@dataclass(frozen=True)
class MaskedConfig:
    """A run from an encoder's folder and documents to a masked language model's folder."""

    data: Path  # data set folder that mw data made, with train.jsonl and validation.jsonl
    base: Path  # folder of an encoder, whatever its head
    out: Path  # model folder to make
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    epochs: float | None = 1.0  # passes over the data; None: give loop.num_steps
    max_seq_len: int | None = 128  # tokens a row; None: the encoder's context, 512 at most
    dropout: float = 0.1  # while training
    loop: LoopConfig = field(default_factory=task_loop)


def run_masked(config: MaskedConfig, hooks: Sequence[Hook] = ()) -> TaskResult:
    """Train, score the held-out loss before and after, and save.

    Raises:
        ConfigError: The tokenizer has no mask token.
        DataError: There is no text.
    """
    return run_parts(config, prepare_masked(config), hooks, name="mask", rate=config.dropout)


def prepare_masked(config: MaskedConfig, device: str | None = None) -> TaskParts:
    """Return model, objective, data and score; with the device "meta" the model has no numbers."""
    model: Any = load_model(config.base, dtype=torch.float32, device=device, task="masked_lm")
    encoder = text_encoder(config.base, model, config.max_seq_len)
    num, collate = _rows(encoder, config, "train")
    held_out = _rows(encoder, config, "validation")
    loader = ExampleLoader(num, collate, config.loop.micro_batch_size, seed=config.loop.seed)
    objective = MaskedLanguageModeling()
    scorer = held_out_loss(objective, *held_out, most=256)  # the same hidden tokens before and after
    return TaskParts(model, objective, loader, scorer, save_model)


def _rows(encoder: TextEncoder, config: MaskedConfig, part: str) -> tuple[int, Any]:
    mask_id = need_token(encoder, "mask token", "[MASK]", "<mask>")
    first = need_token(encoder, "first token", "[CLS]", "<s>")
    last = need_token(encoder, "last token", "[SEP]", "</s>")
    special = {i for i, token in encoder.backend.get_added_tokens_decoder().items() if token.special}
    special |= {mask_id, first, last, encoder.pad_id}
    ordinary = np.array([i for i in range(encoder.backend.get_vocab_size()) if i not in special], dtype=np.int64)
    size, rows = encoder.max_tokens - 2, []
    for encoding in encoder.backend.encode_batch(list(read_texts(config.data, part)), add_special_tokens=False):
        for start in range(0, len(encoding.ids), size):
            words = encoding.word_ids[start : start + size]
            rows.append(([first, *encoding.ids[start : start + size], last], [None, *words, None]))
    rows = [row for row in rows if len(row[0]) > 3]
    if not rows:
        raise DataError(f"{config.data} has no text in its part {part}. Give more documents.")

    def collate(numbers: Sequence[int], epoch: int) -> TextBatch:
        pairs = [
            mask_tokens(*rows[i], mask_id, ordinary, config.masking, random_of(config.loop.seed, epoch, i))
            for i in numbers
        ]
        seen = [pair[0] for pair in pairs]
        types = torch.zeros_like(pad(seen, 0)) if encoder.has_types else None
        return TextBatch(pad(seen, encoder.pad_id), pad([p[1] for p in pairs], IGNORED), length_mask(seen), types)

    return len(rows), collate
