"""Supervised fine-tuning on conversations: loss on the assistant's tokens only, all weights or a method of few.

Conversations are rendered with a chat template and packed whole into rows, with attention and positions kept inside
each conversation. The adapter is saved in PEFT's format; where it is a change of weights, it is merged into a model
folder of its own.

Source: Hu et al. 2021, arXiv:2106.09685 (LoRA); Dettmers et al. 2023, arXiv:2305.14314 (QLoRA). Not done here: training
on the user's turns, sampling while training.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelwright.base import distributed
from modelwright.base.artifact import MANIFEST, new_artifact
from modelwright.base.config import build, to_dict
from modelwright.base.device import has_fast_bf16, pick_device
from modelwright.base.errors import ConfigError
from modelwright.base.files import read_json, write_json
from modelwright.base.progress import Stopwatch, console
from modelwright.base.registry import lookup
from modelwright.data.curriculum import CurriculumConfig
from modelwright.data.load import RowLoader
from modelwright.data.pack import Rows
from modelwright.models.scoring import context_len
from modelwright.models.weights import load_model, save_model
from modelwright.nn import ADAPTERS
from modelwright.nn.adalora import AdaLoraConfig
from modelwright.nn.adapters import AdapterMethod, can_merge
from modelwright.nn.bottleneck import BottleneckConfig
from modelwright.nn.ia3 import IA3Config
from modelwright.nn.lora import LoraConfig
from modelwright.nn.virtual_tokens import PrefixConfig, PromptConfig
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.optim.schedule import ScheduleConfig
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.train.adapt import adapt, merge_dense, objective_for
from modelwright.train.adapter import save_adapter
from modelwright.train.chats import (
    ChatRows,
    PairConfig,
    chat_examples,
    check_template,
    pack_chats,
    read_parts,
    with_template,
)
from modelwright.train.checkpoint import continue_plan
from modelwright.train.loop import Hook, LoopConfig, Run, measure_step_seconds, train
from modelwright.train.objective import CausalLanguageModeling

# Beyond a few passes over the same pairs an adapter learns them by heart.
MAX_EPOCHS = 4
SEEDED_SHUFFLE = 7_919  # keeps the order of the pairs apart from other uses of the seed


def _default_loop() -> LoopConfig:
    optimizer = OptimizerConfig(name="adamw", adamw=AdamWConfig(learning_rate=2e-3, weight_decay=0.0))
    return LoopConfig(micro_batch_size=8, optimizer=optimizer, schedule=ScheduleConfig(name="cosine", warmup_steps=10))


def _default_lora() -> LoraConfig:
    return LoraConfig(rank=16, alpha=32.0)


@dataclass(frozen=True)
class FinetuneConfig:
    """A fine-tuning run from a model folder and conversations to an adapter and a merged model folder."""

    data: Path  # folder with train.jsonl and validation.jsonl, or one file (every twentieth example is held out)
    base: Path  # model folder to start from
    out: Path  # merged model folder to make
    adapter: Path | None = None  # adapter folder to make; None: the name of out with -adapter
    minutes: float | None = None  # time budget; None: give loop.num_steps
    max_seq_len: int | None = None  # tokens a row; None: the context of the model, 1,024 at most
    peft: str = "lora"  # lora, adalora, ia3, bottleneck, prefix or prompt: the method, set by the section of its name
    lora: LoraConfig | None = field(default_factory=_default_lora)  # None, with peft: lora: train all weights
    adalora: AdaLoraConfig | None = None  # None, here and below: the method's defaults when peft names it
    ia3: IA3Config | None = None
    bottleneck: BottleneckConfig | None = None
    prefix: PrefixConfig | None = None
    prompt: PromptConfig | None = None
    load_in_4bit: bool = False  # the frozen weights in NF4 (QLoRA); needs a method
    template: str = "chat"  # chat (the tokenizer's own) or alpaca
    pairs: PairConfig | None = None  # for rows of other fields; None: a chat format, told by its keys
    curriculum: CurriculumConfig | None = None  # by length in tokens; None: random order
    loop: LoopConfig = field(default_factory=_default_loop)

    def __post_init__(self) -> None:
        if self.minutes is None and self.loop.num_steps is None:
            raise ConfigError("The recipe gives neither minutes nor loop.num_steps; set one of them.")
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"minutes is {self.minutes}; it must be above 0.")
        lookup(ADAPTERS, self.peft, "peft")
        check_template(self.template)
        for name in ADAPTERS:
            default = _default_lora() if name == "lora" else None
            if name != self.peft and getattr(self, name) not in (default, None):
                raise ConfigError(
                    f"peft is {self.peft!r}, but the section {name} was set, which has no effect then. Remove that "
                    f"section or choose peft: {name}."
                )
        if self.method is None and self.load_in_4bit:
            raise ConfigError("load_in_4bit is true, but lora is none: weights of 4 bits cannot be trained. Set lora.")
        if self.method is None and self.adapter is not None:
            raise ConfigError("adapter is given, but lora is none: all weights are trained and no adapter is made.")

    @property
    def method(self) -> AdapterMethod | None:
        """What is attached to the frozen model; None: all weights are trained."""
        if self.peft == "lora":
            return self.lora
        chosen: AdapterMethod = getattr(self, self.peft) or lookup(ADAPTERS, self.peft, "peft")()
        return chosen

    @property
    def adapter_folder(self) -> Path:
        """Where the adapter goes."""
        return self.adapter or self.out.with_name(self.out.name + "-adapter")


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning run made."""

    out: Path  # the model; the adapter where it is no change of weights
    figures: dict[str, Any]
    losses: list[tuple[int, float]]


def run_finetune(config: FinetuneConfig, hooks: Sequence[Hook] = ()) -> FinetuneResult:
    """Fine-tune, save the adapter, merge it where that can be done and save the model.

    Raises:
        DataError: There is no conversation that can be trained on.
        ConfigError: The settings do not fit the model.
    """
    watch = Stopwatch()
    tokenizer = with_template(load_tokenizer(config.base), config.template)
    model = _load(config)
    row_len = row_length(config, context_len(model))
    parts = [chat_examples(part, tokenizer) for part in read_parts(config.data, config.pairs)]
    train_rows = pack_chats(parts[0], row_len, tokenizer.pad_id, config.curriculum)
    held_out = pack_chats(parts[1], row_len, tokenizer.pad_id).rows
    work = config.out.with_name(config.out.name + ".run")
    loop = _resolve(config, train_rows, work, watch)
    _attach(model, config, loop.seed)
    before = mean_loss(model, held_out)
    loader = _loader(train_rows, config, loop)
    run = train(model, objective_for(model), loader, loop, folder=work, hooks=hooks, name="fine-tune")
    after = mean_loss(model, held_out)
    figures = {
        "num_steps": run.step,
        "num_conversations": int(train_rows.rows.num_examples),
        "num_dropped": train_rows.rows.num_dropped,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "validation_loss_before": before,
        "validation_loss": after,
        "seconds": watch.seconds,
    }
    out = _save(model, tokenizer, config, figures, run)
    shutil.rmtree(work, ignore_errors=True)
    return FinetuneResult(out, figures, run.losses)


def row_length(config: FinetuneConfig, context: int) -> int:
    """Return the tokens of a row; virtual tokens take their share of the context.

    Raises:
        ConfigError: The recipe asks for more than the model reads.
    """
    num_virtual = getattr(config.method, "num_tokens", 0)
    room = context - num_virtual
    if config.max_seq_len is not None and not 2 <= config.max_seq_len <= room:
        beside = f" beside {num_virtual} virtual ones" if num_virtual else ""
        raise ConfigError(
            f"max_seq_len is {config.max_seq_len}; this model reads 2 to {room} tokens{beside}. Use at most {room}, or "
            "extend its context first."
        )
    return config.max_seq_len or min(room, 1024)


def _load(config: FinetuneConfig) -> nn.Module:
    """Return the base model; weights that will stand in 4 bits never stand there in 32."""
    is_short = config.load_in_4bit and has_fast_bf16(pick_device(config.loop.device))
    return load_model(config.base, dtype=torch.bfloat16 if is_short else torch.float32)


def _attach(model: nn.Module, config: FinetuneConfig, seed: int) -> None:
    if config.method is not None:
        torch.manual_seed(seed)
        adapt(model, config.method, load_in_4bit=config.load_in_4bit)


def _loader(rows: ChatRows, config: FinetuneConfig, loop: LoopConfig) -> RowLoader:
    return rows.loader(loop.micro_batch_size, loop.seed + SEEDED_SHUFFLE, config.curriculum)


def _resolve(config: FinetuneConfig, rows: ChatRows, work: Path, watch: Stopwatch) -> LoopConfig:
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
        model = _load(config)
        _attach(model, config, loop.seed)
        seconds = measure_step_seconds(Run(model, objective_for(model), _loader(rows, config, loop), trial), 3)
        num_affordable = int((config.minutes * 60 - watch.seconds) / seconds)
        per_epoch = max(1, len(rows.rows) // (loop.micro_batch_size * loop.grad_accum_steps))
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


def _save(model: nn.Module, tokenizer: Tokenizer, config: FinetuneConfig, figures: dict[str, Any], run: Run) -> Path:
    settings = to_dict(config)
    parents = _known(config.base, config.data)
    record = {"figures": figures, "losses": run.losses}
    if config.method is not None:
        is_all = not can_merge(model)
        with new_artifact(config.adapter_folder, "adapter", settings=settings, parents=parents) as (folder, measured):
            save_adapter(model, folder, base_model=str(config.base))
            if is_all:
                tokenizer.save(folder)
                write_json(folder / "training.json", record)
            measured.update(figures)
        if is_all:
            console.print(f"  {config.peft} is no change of weights: {config.adapter_folder} is all that is made")
            return config.adapter_folder
        merge_dense(model)
        parents = _known(config.base, config.adapter_folder)
    with new_artifact(config.out, "model", settings=settings, parents=parents, seed=config.loop.seed) as (
        folder,
        measured,
    ):
        save_model(model, folder)
        tokenizer.save(folder)
        write_json(folder / "training.json", record)
        measured.update(figures)
    return config.out


def _known(*paths: Path) -> list[Path]:
    """Return those that are artifacts; folders and files of others have no manifest, and stand in the settings."""
    return [path for path in paths if (path / MANIFEST).is_file()]
