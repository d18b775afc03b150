"""Train an encoder-decoder: to write a text for a text (summaries, translations), or to mend corrupted ones (T5, UL2).

Pairs are ``{"source", "target"}`` rows of ``train.jsonl`` and ``validation.jsonl``; ``prefix`` goes in front of each
source (T5 was taught "summarize: " and "translate English to German: "). With ``denoise`` the rows are documents with a
``text``, cut into stretches that are corrupted anew every epoch (`modelwright.data.denoise`).
Source: Raffel et al. 2019, arXiv:1910.10683; Tay et al. 2022, arXiv:2205.05131.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import read_jsonl
from modelwright.data.denoise import MIXTURES, denoise
from modelwright.data.encode import TextEncoder, find_sentinels, need_token
from modelwright.data.examples import ExampleLoader, PairBatch, length_mask, pad, random_of, shift_right
from modelwright.data.pack import IGNORED
from modelwright.models.t5 import T5
from modelwright.models.weights import load_model, save_model
from modelwright.train.loop import Hook, LoopConfig
from modelwright.train.masked import Writing
from modelwright.train.task_run import TaskParts, TaskResult, held_out_loss, run_parts, task_loop


@dataclass(frozen=True)
class WriteConfig:
    """A run from a T5 folder and pairs or documents to a T5 folder."""

    data: Path  # folder with train.jsonl and validation.jsonl
    base: Path  # folder of a T5
    out: Path  # model folder to make
    denoise: str | None = None  # span_corruption or ul2, of documents; None: rows are pairs
    prefix: str = ""  # in front of each source of a pair
    epochs: float | None = 3.0  # passes over the data; None: give loop.num_steps
    max_seq_len: int = 256  # tokens of a source, and of a document's stretch
    max_target_len: int = 128  # tokens of a target
    label_smoothing: float = 0.0
    loop: LoopConfig = field(default_factory=lambda: task_loop(1e-3))

    def __post_init__(self) -> None:
        if self.denoise is not None and (self.prefix or self.denoise not in MIXTURES):
            raise ConfigError(
                f"denoise is {self.denoise!r} and prefix {self.prefix!r}; known: {', '.join(MIXTURES)}, with no prefix."
            )


def run_write(config: WriteConfig, hooks: Sequence[Hook] = ()) -> TaskResult:
    """Train, score the held-out loss before and after, and save.

    Raises:
        ConfigError: The folder holds another kind of model, or its tokenizer lacks what the method needs.
        DataError: A row cannot be used.
    """
    return run_parts(config, prepare_write(config), hooks, name="write")


def prepare_write(config: WriteConfig, device: str | None = None) -> TaskParts:
    """Return model, objective, data and score; with the device "meta" the model has no numbers."""
    model: Any = load_model(config.base, dtype=torch.float32, device=device)
    if not isinstance(model, T5):
        raise ConfigError(f"{config.base} holds a {type(model).__name__}; expected an encoder-decoder such as T5.")
    encoder = TextEncoder(config.base, config.max_seq_len)
    make = _mended if config.denoise is not None else _paired
    loader_rows, held_out = (make(encoder, config, model, part) for part in ("train", "validation"))
    loader = ExampleLoader(loader_rows[0], loader_rows[1], config.loop.micro_batch_size, seed=config.loop.seed)
    scorer = held_out_loss(Writing(), *held_out, most=512)  # without smoothing
    return TaskParts(model, Writing(config.label_smoothing), loader, scorer, save_model)


def _paired(encoder: TextEncoder, config: WriteConfig, model: Any, part: str) -> tuple[int, Any]:
    file = config.data / f"{part}.jsonl"
    end_id, sources, targets = model.config.eos_token_id, [], []
    for number, row in enumerate(read_jsonl(file), start=1):
        if not isinstance(row.get("source"), str) or not isinstance(row.get("target"), str) or not row["target"]:
            raise DataError(f"{file}, row {number} has no source and target text; expected both. Mend or remove it.")
        sources.append(config.prefix + row["source"])
        targets.append(row["target"])
    if not sources:
        raise DataError(f"{file} holds no row. Give one pair a line.")
    plain = [encoder.backend.encode_batch(texts, add_special_tokens=False) for texts in (sources, targets)]
    read = [[*e.ids[: config.max_seq_len - 1], end_id] for e in plain[0]]
    written = [[*e.ids[: config.max_target_len - 1], end_id] for e in plain[1]]
    return len(read), lambda numbers, epoch: pair_batch(model, [(read[i], written[i]) for i in numbers])


def _mended(encoder: TextEncoder, config: WriteConfig, model: Any, part: str) -> tuple[int, Any]:
    sentinels, end_id = find_sentinels(encoder), model.config.eos_token_id
    denoisers = MIXTURES[config.denoise or ""]
    modes = {d.mode: [need_token(encoder, "token for a mode of UL2", d.mode)] for d in denoisers if d.mode is not None}
    texts = [row["text"] for row in read_jsonl(config.data / f"{part}.jsonl")]
    ids = [np.array(e.ids, dtype=np.int64) for e in encoder.backend.encode_batch(texts, add_special_tokens=False)]
    size = config.max_seq_len - 2
    stretches = [row[s : s + size] for row in ids for s in range(0, len(row), size) if len(row[s : s + size]) >= 8]
    if not stretches:
        raise DataError(f"{config.data} has no text of 8 tokens or more in {part}.jsonl. Give longer documents.")

    def collate(numbers: Sequence[int], epoch: int) -> PairBatch:
        pairs = []
        for i in numbers:
            random = random_of(config.loop.seed, epoch, i)
            chosen = denoisers[random.integers(len(denoisers))]
            prefix = modes[chosen.mode] if chosen.mode is not None else []
            pairs.append(denoise(stretches[i], chosen, sentinels, end_id, prefix, random))
        return pair_batch(model, pairs)

    return len(stretches), collate


def pair_batch(model: Any, pairs: Sequence[tuple[Any, Any]]) -> PairBatch:
    """Return what the encoder reads and the decoder writes as one batch for a T5."""
    seen = [pair[0] for pair in pairs]
    labels = pad([pair[1] for pair in pairs], IGNORED)
    c = model.config
    start = shift_right(labels, c.decoder_start_token_id, c.pad_token_id, IGNORED)
    return PairBatch(pad(seen, c.pad_token_id), labels, length_mask(seen), start)
