"""Supervised fine-tuning on conversations: loss on the assistant's tokens only, whole weights or low-rank adapters.

Conversations are rendered with the tokenizer's chat template and packed whole into rows, with attention and positions
kept inside each conversation. The adapter is saved in PEFT's format, and merged into a model folder of its own.

Source: Hu et al. 2021, arXiv:2106.09685 (LoRA). Not done here: training on the user's turns, sampling while training.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelwright.base import distributed
from modelwright.base.artifact import new_artifact
from modelwright.base.config import build, to_dict
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import read_json, write_json
from modelwright.base.progress import Stopwatch, console
from modelwright.base.types import Message
from modelwright.data.chat import read_conversations
from modelwright.data.load import RowLoader, repeat_rows
from modelwright.data.pack import Rows, pack_rows
from modelwright.models.scoring import context_len
from modelwright.models.weights import load_model, save_model
from modelwright.nn.adapters import attach_adapter
from modelwright.nn.lora import LoraConfig, merge_lora
from modelwright.nn.nf4 import to_nf4
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.optim.schedule import ScheduleConfig
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.train.adapter import save_adapter
from modelwright.train.checkpoint import continue_plan
from modelwright.train.loop import Hook, LoopConfig, Run, measure_step_seconds, train
from modelwright.train.objective import CausalLanguageModeling

# Beyond a few passes over the same pairs an adapter learns them by heart.
MAX_EPOCHS = 4
SEEDED_SHUFFLE = 7_919  # keeps the order of the pairs apart from other uses of the seed


def _default_loop() -> LoopConfig:
    optimizer = OptimizerConfig(name="adamw", adamw=AdamWConfig(learning_rate=2e-3, weight_decay=0.0))
    return LoopConfig(micro_batch_size=8, optimizer=optimizer, schedule=ScheduleConfig(name="cosine", warmup_steps=10))


@dataclass(frozen=True)
class FinetuneConfig:
    """A fine-tuning run from a model folder and conversations to an adapter and a merged model folder."""

    data: Path  # data set folder with train.jsonl and validation.jsonl of {"messages": [...]} lines
    base: Path  # model folder to start from
    out: Path  # merged model folder to make
    adapter: Path | None = None  # adapter folder to make; None: the name of out with -adapter
    minutes: float | None = None  # time budget; None: give loop.num_steps
    max_seq_len: int | None = None  # tokens a row; None: the context of the model, 1,024 at most
    lora: LoraConfig | None = field(default_factory=lambda: LoraConfig(rank=16, alpha=32.0))  # None: train all weights
    load_in_4bit: bool = False  # the frozen weights in NF4 (QLoRA); needs lora
    loop: LoopConfig = field(default_factory=_default_loop)

    def __post_init__(self) -> None:
        if self.minutes is None and self.loop.num_steps is None:
            raise ConfigError("The recipe gives neither minutes nor loop.num_steps; set one of them.")
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"minutes is {self.minutes}; it must be above 0.")
        if self.lora is None and self.load_in_4bit:
            raise ConfigError("load_in_4bit is true, but lora is none: weights of 4 bits cannot be trained. Set lora.")
        if self.lora is None and self.adapter is not None:
            raise ConfigError("adapter is given, but lora is none: all weights are trained and no adapter is made.")

    @property
    def adapter_folder(self) -> Path:
        """Where the adapter goes."""
        return self.adapter or self.out.with_name(self.out.name + "-adapter")


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning run made."""

    out: Path
    figures: dict[str, Any]
    losses: list[tuple[int, float]]


def run_finetune(config: FinetuneConfig, hooks: Sequence[Hook] = ()) -> FinetuneResult:
    """Fine-tune, save the adapter, merge it and save the model.

    Raises:
        DataError: There is no conversation that can be trained on.
    """
    watch = Stopwatch()
    tokenizer = load_tokenizer(config.base)
    model = load_model(config.base, dtype=torch.float32)
    row_len = config.max_seq_len or min(context_len(model), 1024)
    train_rows = conversation_rows(config.data / "train.jsonl", tokenizer, row_len)
    held_out = conversation_rows(config.data / "validation.jsonl", tokenizer, row_len)
    work = config.out.with_name(config.out.name + ".run")
    loop = _resolve(config, train_rows, work, watch)
    if config.lora is not None:
        _add_adapter(model, config, loop.seed)
    before = mean_loss(model, held_out)
    run = train(
        model, CausalLanguageModeling(), _loader(train_rows, loop), loop, folder=work, hooks=hooks, name="fine-tune"
    )
    after = mean_loss(model, held_out)
    figures = {
        "num_steps": run.step,
        "num_conversations": int(train_rows.num_examples),
        "num_dropped": train_rows.num_dropped,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "validation_loss_before": before,
        "validation_loss": after,
        "seconds": watch.seconds,
    }
    _save(model, tokenizer, config, figures, run)
    shutil.rmtree(work, ignore_errors=True)
    return FinetuneResult(config.out, figures, run.losses)


def conversation_rows(file: Path, tokenizer: Tokenizer, row_len: int) -> Rows:
    """Render and pack the conversations of a JSON lines file.

    Raises:
        DataError: The file holds none, or none fits.
    """
    conversations: list[Sequence[Message]] = list(read_conversations(file))
    if not conversations:
        raise DataError(f"{file} holds no conversation. Make the data set from more documents.")
    examples = []
    for messages in conversations:
        tokens = tokenizer.chat_tokens(messages)
        examples.append((tokens.ids, tokens.assistant_mask))
    return pack_rows(examples, row_len, tokenizer.pad_id)


def _add_adapter(model: nn.Module, config: FinetuneConfig, seed: int) -> None:
    assert config.lora is not None
    torch.manual_seed(seed)
    if config.load_in_4bit:
        to_nf4(model)
    attach_adapter(model, config.lora)


def _loader(rows: Rows, loop: LoopConfig) -> RowLoader:
    return RowLoader(repeat_rows(rows, loop.seed + SEEDED_SHUFFLE), loop.micro_batch_size)


def _resolve(config: FinetuneConfig, rows: Rows, work: Path, watch: Stopwatch) -> LoopConfig:
    """Return the loop with its number of steps; a derived number is kept for a run that is taken up again."""
    kept = work / "plan.json"
    if kept.is_file():
        values = read_json(kept)
        kept_loop = build(LoopConfig, continue_plan(values, to_dict(config), work))
        return kept_loop
    loop = config.loop
    if loop.num_steps is None:
        assert config.minutes is not None
        trial = replace(loop, num_steps=1_000_000, compile=False)
        model = load_model(config.base, dtype=torch.float32)
        if config.lora is not None:
            _add_adapter(model, config, loop.seed)
        seconds = measure_step_seconds(Run(model, CausalLanguageModeling(), _loader(rows, loop), trial), 3)
        num_affordable = int((config.minutes * 60 - watch.seconds) / seconds)
        per_epoch = max(1, len(rows) // (loop.micro_batch_size * loop.grad_accum_steps))
        # Compilation was not timed and would not be earned back in the minute or so that fine-tuning gets.
        num_steps = distributed.share(max(10, min(num_affordable, MAX_EPOCHS * per_epoch)))
        loop = replace(loop, num_steps=num_steps, compile=False)
        console.print(f"  derived: {num_steps} steps, {num_steps / per_epoch:.1f} passes over the pairs")
    write_json(kept, {"settings": to_dict(config), "loop": to_dict(loop)})
    return loop


@torch.inference_mode()
def mean_loss(model: nn.Module, rows: Rows, max_rows: int = 64) -> float:
    """Return the mean loss over the trained tokens of the first ``max_rows`` rows, in nats."""
    was_training = model.training
    model.eval()
    loader = RowLoader(lambda _: rows, 8)
    objective, total, count = CausalLanguageModeling(), 0.0, 0
    for _ in range(max(1, min(len(rows), max_rows) // 8)):
        batch = loader.next_batch()
        total += float(objective.loss(model, batch))
        count += int((batch.labels >= 0).sum())
    model.train(was_training)
    return total / max(count, 1)


def _save(model: nn.Module, tokenizer: Tokenizer, config: FinetuneConfig, figures: dict[str, Any], run: Run) -> None:
    settings = to_dict(config)
    parents = [config.base, config.data]
    if config.lora is not None:
        with new_artifact(config.adapter_folder, "adapter", settings=settings, parents=parents) as (folder, measured):
            save_adapter(model, folder, base_model=str(config.base))
            measured.update(figures)
        merge_lora(model)
        parents = [config.base, config.adapter_folder]
    with new_artifact(config.out, "model", settings=settings, parents=parents, seed=config.loop.seed) as (
        folder,
        measured,
    ):
        save_model(model, folder)
        tokenizer.save(folder)
        write_json(folder / "training.json", {"figures": figures, "losses": run.losses})
        measured.update(figures)
