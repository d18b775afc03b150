"""Fine-tuning in ten lines: a model in 4 bits, a low-rank adapter, packed conversations, a lean optimizer.

    model = FastModel.from_pretrained("runs/base", max_seq_len=1024, load_in_4bit=True)
    model = model.with_lora(r=16, target_modules=["q_proj", "v_proj"])
    Trainer(model, "alpaca.json", num_steps=60, template="alpaca").train()
    model.save_adapter("runs/adapter")

Weights stand in bfloat16 where the machine computes it, or in NF4; blocks are recomputed in the backward pass; moments
of 8 bits stand outside of the device. What is done is what `modelwright.train.finetune` does from a file.

Source: Hu et al. 2021, arXiv:2106.09685; Dettmers et al. 2023, arXiv:2305.14314 (QLoRA: NF4, paged moments). Not done
here: several GPUs, images.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelwright.base import config as settings_of
from modelwright.base.device import has_fast_bf16, pick_device
from modelwright.base.errors import ConfigError
from modelwright.base.progress import console
from modelwright.data.load import RowLoader, repeat_rows
from modelwright.data.pack import Rows
from modelwright.models.hub import fetch
from modelwright.models.scoring import context_len
from modelwright.models.weights import load_model, save_model
from modelwright.nn.adapters import AdapterMethod, has_adapters
from modelwright.nn.lora import LoraConfig
from modelwright.nn.nf4 import to_nf4
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.optim.schedule import ScheduleConfig
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.train.adapt import adapt, merge_dense, needs_dense, objective_for
from modelwright.train.adapter import load_adapter, save_adapter
from modelwright.train.chats import chat_examples, check_template, pack_chats, read_chats, with_template
from modelwright.train.loop import LoopConfig, Run, train
from modelwright.train.recompute import RecomputeConfig


class FastModel:
    """A model with its tokenizer, ready to be adapted. Made by `from_pretrained`."""

    def __init__(self, model: nn.Module, tokenizer: Any, max_seq_len: int, source: Path):
        self.model, self.tokenizer, self.max_seq_len, self.source = model, tokenizer, max_seq_len, source
        self._dense_dtype: torch.dtype | None = None  # of the weights in source that stand in 4 bits here

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        max_seq_len: int | None = None,
        load_in_4bit: bool = False,
        dtype: torch.dtype | None = None,
    ) -> "FastModel":
        """Load a model folder, or a model of the hub.

        Args:
            name: Folder or hub id.
            max_seq_len: Tokens a row; None: the context of the model, 2,048 at most.
            load_in_4bit: Put the linear layers into NF4 with double quantisation.
            dtype: Of the weights that stay dense; None: bfloat16 where it is fast, else float32.

        Raises:
            ConfigError: ``max_seq_len`` is longer than the model reads.
        """
        source = fetch(name)
        is_fast = has_fast_bf16(pick_device())
        dtype = dtype or (torch.bfloat16 if is_fast else torch.float32)
        model = load_model(source, dtype=dtype)
        longest = context_len(model)
        if max_seq_len is not None and not 2 <= max_seq_len <= longest:
            raise ConfigError(
                f"max_seq_len is {max_seq_len}; this model reads 2 to {longest} tokens. Use at most {longest}, or "
                "extend its context first."
            )
        if load_in_4bit:
            to_nf4(model)
        made = cls(model, load_tokenizer(source), max_seq_len or min(longest, 2048), source)
        made._dense_dtype = dtype if load_in_4bit else None
        return made

    def with_lora(
        self, r: int = 16, target_modules: Sequence[str] | None = None, lora_alpha: float = 16.0, **options: Any
    ) -> "FastModel":
        """Freeze the model and add a low-rank adapter.

        Args:
            r: Rank.
            target_modules: Names of layers, published (``q_proj``) or ours (``q``); None: all linear layers.
            lora_alpha: The change is scaled by ``lora_alpha / r``.
            options: The other fields of `LoraConfig`: dropout, use_rslora, use_dora, init, rate_ratio.

        Raises:
            ConfigError: A name that no layer has (the message has the nearest), or a rank that does not fit.
        """
        names = ("all-linear",) if target_modules is None else target_modules
        targets = (names,) if isinstance(names, str) else tuple(names)
        known = {field.name for field in dataclasses.fields(LoraConfig)} - {"targets", "rank", "alpha"}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ConfigError(f"with_lora knows no {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
        return self.with_adapter(LoraConfig(targets, r, lora_alpha, **options))

    def with_adapter(self, method: AdapterMethod) -> "FastModel":
        """Freeze the model and add the trained parts of any method of `modelwright.nn.ADAPTERS`.

        PiSSA and LoftQ over 4 bits begin from the dense weights: these are read again, and rounded beside the adapter.
        """
        if self._dense_dtype is not None and needs_dense(method) and not has_adapters(self.model):
            self.model = load_model(self.source, dtype=self._dense_dtype)
            adapt(self.model, method, load_in_4bit=True)
        else:
            adapt(self.model, method)
        return self

    def load_adapter(self, folder: str | Path) -> "FastModel":
        """Put a saved adapter beside the model."""
        load_adapter(self.model, folder)
        return self

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapter in PEFT's format."""
        save_adapter(self.model, folder, base_model=str(self.source))

    def save_merged(self, folder: str | Path) -> None:
        """Merge the adapter into dense weights and write a model folder with the tokenizer."""
        merge_dense(self.model)
        save_model(self.model, folder)
        self.tokenizer.save(Path(folder))


@dataclass(frozen=True)
class TrainerConfig:
    """What `Trainer` can be told; the defaults are those of the well-known 4-bit programs."""

    num_steps: int = 60
    micro_batch_size: int = 2
    grad_accum_steps: int = 4
    learning_rate: float = 2e-4
    warmup_steps: int = 5
    weight_decay: float = 0.01
    optimizer: str = "paged_adamw8bit"
    schedule: str = "linear"
    recompute: bool = True  # gradient checkpointing
    template: str = "chat"  # chat (the tokenizer's own) or alpaca
    precision: str | None = None
    seed: int = 3407

    def __post_init__(self) -> None:
        check_template(self.template)

    def loop(self) -> LoopConfig:
        """Return the settings of the loop."""
        adamw = AdamWConfig(learning_rate=self.learning_rate, betas=(0.9, 0.999), weight_decay=self.weight_decay)
        return LoopConfig(
            num_steps=self.num_steps,
            micro_batch_size=self.micro_batch_size,
            grad_accum_steps=self.grad_accum_steps,
            precision=self.precision,
            compile=False,
            seed=self.seed,
            optimizer=OptimizerConfig(name=self.optimizer, adamw=adamw),
            schedule=ScheduleConfig(name=self.schedule, warmup_steps=min(self.warmup_steps, self.num_steps // 2)),
            recompute=RecomputeConfig("layers" if self.recompute else "none"),
        )


class Trainer:
    """Supervised fine-tuning of a `FastModel` on conversations, packed, with the loss on the answers alone.

    Args:
        model: Usually with an adapter; without one, all its weights are trained.
        dataset: A file (JSON or JSON lines), or rows: messages, Alpaca, ShareGPT, whatever `modelwright.data` reads.
        settings: Fields of `TrainerConfig`.

    Raises:
        ConfigError: A setting that does not exist, or has the wrong type.
        DataError: A row of no known format, or no example that fits the rows.
    """

    def __init__(self, model: FastModel, dataset: str | Path | Sequence[Mapping[str, Any]], **settings: Any):
        self.model = model
        self.config: TrainerConfig = settings_of.build(TrainerConfig, settings)
        self.tokenizer = with_template(model.tokenizer, self.config.template)
        self.rows = self._pack(dataset)
        model.tokenizer = self.tokenizer  # what is saved must prompt as it was trained

    def _pack(self, dataset: str | Path | Sequence[Mapping[str, Any]]) -> Rows:
        chats = read_chats(Path(dataset) if isinstance(dataset, str) else dataset)
        longest = self.model.max_seq_len
        rows = pack_chats(chat_examples(chats, self.tokenizer), longest, self.tokenizer.pad_id).rows
        if rows.num_dropped:
            console.print(
                f"  {rows.num_dropped} of {len(chats)} examples are longer than {longest} tokens or have nothing to "
                "learn, and are left out"
            )
        return rows

    def train(self) -> Run:
        """Train, and return the run: its losses are ``run.losses``."""
        loop = self.config.loop()
        loader = RowLoader(repeat_rows(self.rows, loop.seed), loop.micro_batch_size)
        return train(self.model.model, objective_for(self.model.model), loader, loop, name="fine-tune")
