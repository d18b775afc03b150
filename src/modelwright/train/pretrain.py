"""Pre-training: a decoder on the documents of a data set, from random weights or from those of another model.

Starting from another model's weights goes on training it, or up-trains one whose shape was changed (fewer key/value
heads, more layers, more tokens).

Shape, batch size and number of steps are derived from the time budget and the measured speed of this machine, unless
the recipe gives them. What was derived is written to ``plan.json`` before the first step, so that a killed run goes
on with the same figures.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from modelwright.base import distributed
from modelwright.base.artifact import new_artifact
from modelwright.base.config import build, to_dict
from modelwright.base.device import can_compile, has_fast_bf16, measure_matmul_flops, pick_device
from modelwright.base.errors import ConfigError
from modelwright.base.files import read_json, write_json
from modelwright.base.progress import Stopwatch, console, human_count
from modelwright.data.blend import BlendConfig, source_paths
from modelwright.models.llama import ARCHITECTURE_OF, Llama, LlamaConfig
from modelwright.models.weights import load_model, read_config, save_model
from modelwright.nn.init import init_weights
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.train.budget import count_parameters, derive_batch_tokens, derive_shape, flops_per_token
from modelwright.train.checkpoint import continue_plan
from modelwright.train.loop import Hook, LoopConfig, Run, measure_step_seconds, train
from modelwright.train.objective import CausalLanguageModeling
from modelwright.train.supply import BlendSupply, Supply, open_supply

# Rows a forward pass: enough to keep the cores busy, few enough that activations stay in a few hundred megabytes.
MICRO_BATCH_TOKENS = 4096
# Compilation takes 15 to 40 s on two cores and makes a step about twice as fast.
MIN_MINUTES_TO_COMPILE = 1.5


@dataclass(frozen=True)
class ShapeConfig:
    """Sizes of the decoder."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    num_kv_heads: int | None = None  # None: as many as num_heads
    tie_embeddings: bool = True


@dataclass(frozen=True)
class PretrainConfig:
    """A pre-training run from a data set to a model folder."""

    data: Path | BlendConfig  # data set of mw data or mw data run, token shards of mw shards, or a section of several
    tokenizer: Path  # tokenizer folder
    out: Path  # model folder to make
    minutes: float | None = None  # time budget from which shape and steps are derived; None: give shape and num_steps
    max_seq_len: int = 256  # tokens a row, and the context of the model
    shape: ShapeConfig | None = None  # None: that of base, or derived from the budget
    base: Path | None = None  # model folder of the Llama family to start from; None: random weights
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        if self.base is not None and self.shape is not None:
            raise ConfigError("Both base and shape are given, but base has its own shape. Leave one of them out.")
        has_shape = self.shape is not None or self.base is not None
        if self.minutes is None and (not has_shape or self.loop.num_steps is None):
            raise ConfigError(
                "The recipe gives no minutes, so it must give shape and loop.num_steps. Set minutes to derive them."
            )
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"minutes is {self.minutes}; it must be above 0.")


@dataclass(frozen=True)
class PretrainResult:
    """What a pre-training run made and how fast it was."""

    out: Path
    figures: dict[str, Any]
    losses: list[tuple[int, float]]


def run_pretrain(config: PretrainConfig, hooks: Sequence[Hook] = ()) -> PretrainResult:
    """Train a decoder and write it as a model folder with its tokenizer.

    Raises:
        DataError: The data set or tokenizer is missing or too small.
    """
    watch = Stopwatch()
    tokenizer = load_tokenizer(config.tokenizer)
    work = config.out.with_name(config.out.name + ".run")
    supply = open_supply(config.data, tokenizer, config.max_seq_len, work)
    model_config, loop, rate = _resolve(config, tokenizer, supply, work, watch)
    model = _first_model(config, model_config, loop.seed)
    loader = supply.loader(loop)
    started, first = Stopwatch(), _FirstSteps()
    run = train(model, CausalLanguageModeling(), loader, loop, folder=work, hooks=[first, *hooks], name="pre-train")
    num_rows: int = getattr(loader, "batch_size", loop.micro_batch_size)  # fewer where the data has no more
    done = replace(loop, micro_batch_size=min(loop.micro_batch_size, num_rows))
    figures = _figures(model_config, done, config.max_seq_len, rate, first.seconds_per_step(run), started.seconds)
    parents = [path for path in source_paths(config.data) if (path / "manifest.json").is_file()] + [config.tokenizer]
    if config.base is not None and (config.base / "manifest.json").is_file():
        parents.append(config.base)
    with new_artifact(config.out, "model", settings=to_dict(config), parents=parents, seed=loop.seed) as (
        folder,
        measured,
    ):
        save_model(model, folder)
        tokenizer.save(folder)
        told = {"figures": figures, "losses": run.losses, "loop": to_dict(loop)}
        if isinstance(supply, BlendSupply):
            told["data"] = supply.blend.describe(figures["tokens"] // config.max_seq_len)
        write_json(folder / "training.json", told)
        measured.update(figures)
    shutil.rmtree(work, ignore_errors=True)
    return PretrainResult(config.out, figures, run.losses)


def _resolve(
    config: PretrainConfig, tokenizer: Tokenizer, supply: Supply, work: Path, watch: Stopwatch
) -> tuple[LlamaConfig, LoopConfig, float]:
    """Return the model, the loop with its number of steps, and the machine's matrix rate; derived ones are kept."""
    kept = work / "plan.json"
    if kept.is_file():
        values = read_json(kept)
        kept_loop = build(LoopConfig, continue_plan(values, to_dict(config), work))
        return LlamaConfig.from_hf(values["model"]), kept_loop, values["matmul_flops"]
    device = pick_device(config.loop.device)
    rate = distributed.share(
        measure_matmul_flops(device, torch.bfloat16 if has_fast_bf16(device) else torch.float32, 0.5)
    )
    model_config = _shape(config, tokenizer, supply.num_tokens, rate)
    loop = config.loop
    if loop.num_steps is None:
        loop = _fit_steps(config, model_config, supply, rate, watch)
    values = {
        "settings": to_dict(config),
        "model": model_config.to_hf(),
        "loop": to_dict(loop),
        "matmul_flops": rate,
    }
    write_json(kept, values)
    return model_config, loop, rate


def _shape(config: PretrainConfig, tokenizer: Tokenizer, num_tokens: int, rate: float) -> LlamaConfig:
    if config.base is not None:
        return base_config(config, tokenizer.vocab_size)
    if config.shape is None:
        assert config.minutes is not None
        found = derive_shape(tokenizer.vocab_size, config.max_seq_len, num_tokens, config.minutes * 60, rate)
    else:
        found = LlamaConfig(vocab_size=tokenizer.vocab_size, max_seq_len=config.max_seq_len, **to_dict(config.shape))
    return replace(
        found, eos_token_id=(tokenizer.eos_id,), pad_token_id=tokenizer.pad_id, bos_token_id=tokenizer.bos_id
    )


def base_config(config: PretrainConfig, vocab_size: int) -> LlamaConfig:
    """Return the config of the model that training starts from.

    Raises:
        ConfigError: It is of another family, or does not fit the tokenizer or the row length.
    """
    assert config.base is not None
    values = read_config(config.base)
    if values.get("model_type") not in ARCHITECTURE_OF:
        raise ConfigError(f"base is a {values.get('model_type')!r}; known: {', '.join(ARCHITECTURE_OF)}.")
    found = LlamaConfig.from_hf(values)
    if vocab_size > found.vocab_size or config.max_seq_len > found.max_seq_len:
        raise ConfigError(
            f"base has {found.vocab_size} rows and reads {found.max_seq_len} tokens; the tokenizer has {vocab_size}, "
            f"and max_seq_len is {config.max_seq_len}. Give the tokenizer that belongs to base, and shorter rows."
        )
    return found


def _first_model(config: PretrainConfig, model_config: LlamaConfig, seed: int) -> Llama:
    """Return the model that training starts from, in float32."""
    if config.base is None:
        return init_weights(Llama(model_config), seed)  # type: ignore[return-value]
    return load_model(config.base, dtype=torch.float32)  # type: ignore[return-value]


def _fit_steps(
    config: PretrainConfig,
    model_config: LlamaConfig,
    supply: Supply,
    rate: float,
    watch: Stopwatch,
) -> LoopConfig:
    """Time a few steps of the run to come, and return the loop with as many steps as the rest of the time holds."""
    assert config.minutes is not None
    row_len = config.max_seq_len
    expected = config.minutes * 60 * rate * 0.45 / flops_per_token(model_config, row_len)
    batch = derive_batch_tokens(expected)
    micro = max(1, min(batch, MICRO_BATCH_TOKENS) // row_len)
    accumulate = max(1, batch // (micro * row_len))
    is_compiled = config.loop.compile
    if is_compiled is None:
        is_compiled = can_compile() and config.minutes >= MIN_MINUTES_TO_COMPILE
    loop = replace(
        config.loop,
        compile=is_compiled,
        micro_batch_size=micro,
        grad_accum_steps=accumulate,
        num_steps=1_000_000,
    )
    model = _first_model(config, model_config, loop.seed)
    run = Run(model, CausalLanguageModeling(), supply.loader(loop), loop)
    seconds = measure_step_seconds(run)
    num_steps = distributed.share(max(10, int((config.minutes * 60 - watch.seconds) / seconds)))
    _announce(model_config, num_tokens=num_steps * batch, batch=batch, rate=rate)
    return replace(loop, num_steps=num_steps)


def _announce(config: LlamaConfig, num_tokens: int, batch: int, rate: float) -> None:
    total, _ = count_parameters(config)
    console.print(
        f"  derived: {human_count(total)} parameters ({config.num_layers} layers of {config.hidden_size}), "
        f"{human_count(num_tokens)} tokens in batches of {batch}, at a matrix rate of {rate / 1e9:.0f} GFLOP/s"
    )


class _FirstSteps:
    """A hook that remembers how long each step took, and leaves out the first two, which compile."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, run: Run, report: Any) -> None:
        self.seconds.append(report.seconds)

    def seconds_per_step(self, run: Run) -> float:
        """Return the mean over the steps of this process."""
        steady = self.seconds[2:] or self.seconds
        return sum(steady) / max(len(steady), 1)


def _figures(
    config: LlamaConfig, loop: LoopConfig, row_len: int, rate: float, step_seconds: float, seconds: float
) -> dict[str, Any]:
    assert loop.num_steps is not None
    batch = loop.micro_batch_size * loop.grad_accum_steps * row_len
    speed = batch / step_seconds if step_seconds else 0.0
    return {
        "parameters": count_parameters(config)[0],
        "num_steps": loop.num_steps,
        "tokens": loop.num_steps * batch,
        "tokens_per_step": batch,
        "tokens_per_second": speed,
        "flops_per_token": flops_per_token(config, row_len),
        "matmul_flops_per_second": rate,
        "mfu_fraction": speed * flops_per_token(config, row_len) / rate,
        "seconds": seconds,
    }
