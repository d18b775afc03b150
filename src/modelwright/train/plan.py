"""What a training recipe will cost, worked out from its settings without touching a weight.

Sizes that the run would derive are derived here the same way, from this machine's measured matrix rate; they are an
estimate, because the run itself also times its first steps.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base import distributed
from modelwright.base.config import to_dict
from modelwright.base.device import has_fast_bf16, measure_matmul_flops, pick_device
from modelwright.base.errors import ConfigError, DataError, ModelwrightError
from modelwright.base.files import read_json
from modelwright.base.progress import human_bytes
from modelwright.base.registry import lookup
from modelwright.data.blend import source_paths
from modelwright.data.load import Batch
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.adapters import AdapterMethod
from modelwright.nn.lora import LoraConfig
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.train import METHOD_CONFIGS, PREPARED
from modelwright.train.adapt import adapt
from modelwright.train.budget import (
    ASSUMED_MFU,
    Plan,
    derive_batch_tokens,
    derive_shape,
    flops_per_token,
    make_plan,
)
from modelwright.train.chats import read_parts
from modelwright.train.dropout import dropout
from modelwright.train.finetune import MAX_EPOCHS, FinetuneConfig, row_length
from modelwright.train.loop import LoopConfig
from modelwright.train.memory_plan import Work
from modelwright.train.objective import CausalLanguageModeling
from modelwright.train.pretrain import MICRO_BATCH_TOKENS, PretrainConfig, base_config
from modelwright.train.supply import count_tokens
from modelwright.train.task_run import TaskParts, with_steps

MAX_LOOKED_AT = 200  # batches of a task's data in which the longest is looked for


def plan_run(config: Any) -> Plan:
    """Return the plan of a training recipe.

    Raises:
        ConfigError: The method cannot be planned, or the layout does not suit the model.
        DataError: The tokenizer, data set or base model that sizes follow from is missing.
    """
    if isinstance(config, PretrainConfig):
        return plan_pretrain(config)
    if isinstance(config, FinetuneConfig):
        return plan_finetune(config)
    for name in PREPARED:
        if lookup(METHOD_CONFIGS, name, "method") is type(config):
            return plan_task(name, config)
    known = ", ".join(("pretrain", "finetune", *PREPARED))
    raise ConfigError(
        f"A recipe of {type(config).__name__} cannot be planned; {known} can. Run it with few steps and look at the "
        "memory that its progress shows."
    )


def plan_pretrain(config: PretrainConfig) -> Plan:
    """Return the plan of a pre-training run."""
    tokenizer = load_tokenizer(config.tokenizer)
    rate = _matrix_rate(config.loop) if config.minutes is not None else 0.0
    if config.base is not None:
        model = base_config(config, tokenizer.vocab_size)
    elif config.shape is not None:
        model = LlamaConfig(vocab_size=tokenizer.vocab_size, max_seq_len=config.max_seq_len, **to_dict(config.shape))
    else:
        assert config.minutes is not None
        num_tokens = sum(count_tokens(path, tokenizer) for path in source_paths(config.data))
        model = derive_shape(tokenizer.vocab_size, config.max_seq_len, num_tokens, config.minutes * 60, rate)
    loop = config.loop
    if loop.num_steps is None:
        assert config.minutes is not None
        affordable = config.minutes * 60 * rate * ASSUMED_MFU / flops_per_token(model, config.max_seq_len)
        batch = derive_batch_tokens(affordable)
        micro = max(1, min(batch, MICRO_BATCH_TOKENS) // config.max_seq_len)
        accumulate = max(1, batch // (micro * config.max_seq_len))
        loop = replace(loop, micro_batch_size=micro, grad_accum_steps=accumulate)
        loop = replace(loop, num_steps=max(10, int(affordable / batch)))
    assert loop.num_steps is not None
    work = language_work(lambda: Llama(model), loop, config.max_seq_len, model.vocab_size)
    return make_plan(work, loop.num_steps, model=model)


def plan_finetune(config: FinetuneConfig) -> Plan:
    """Return the plan of a fine-tuning run; an adapter needs gradients and optimizer state for itself alone."""
    file = Path(config.base) / "config.json"
    if not file.is_file():
        raise DataError(f"{config.base} is not a model folder: it has no config.json. Give the base model's folder.")
    model = LlamaConfig.from_hf(read_json(file))
    row_len = row_length(config, model.max_seq_len)
    loop = config.loop
    row_tokens = loop.micro_batch_size * loop.grad_accum_steps * row_len
    num_steps = loop.num_steps
    if num_steps is None:
        assert config.minutes is not None
        chats = read_parts(config.data, config.pairs)[0]
        num_bytes = sum(len(m.content.encode()) for chat in chats for m in chat.messages)
        an_epoch = math.ceil(num_bytes / 3 / row_tokens)  # about three bytes a token, template included
        seconds = flops_per_token(model, row_len) * row_tokens / (_matrix_rate(loop) * ASSUMED_MFU)
        num_steps = max(10, min(int(config.minutes * 60 / seconds), MAX_EPOCHS * an_epoch))
    make_model = partial(_adapted, model, config.method, is_4bit=config.load_in_4bit)
    work = language_work(make_model, loop, row_len, model.vocab_size, is_masked=True)
    return make_plan(work, num_steps, model=model if config.method is None else None)


def _adapted(model: LlamaConfig, method: AdapterMethod | None, *, is_4bit: bool) -> nn.Module:
    if isinstance(method, LoraConfig) and method.init != "kaiming":
        method = replace(method, init="kaiming")  # others look at the weights, and take as much
    is_short = is_4bit and has_fast_bf16(pick_device(None))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if is_short else before)
    try:
        made: nn.Module = Llama(model)
    finally:
        torch.set_default_dtype(before)
    if method is not None:
        adapt(made, method, load_in_4bit=is_4bit)
    return made


def language_work(
    make_model: Callable[[], nn.Module], loop: LoopConfig, row_len: int, vocab_size: int, *, is_masked: bool = False
) -> Work:
    """Return what a run that predicts the next token computes; masked rows hold several documents."""

    def batch(rows: int) -> Batch:
        ids = torch.zeros(rows, row_len, dtype=torch.int64)
        if not is_masked:
            return Batch(ids, ids.clone())
        mask = torch.ones(rows, 1, row_len, row_len, dtype=torch.bool)
        return Batch(ids, ids.clone(), ids.clone(), mask)

    return Work(make_model, batch, CausalLanguageModeling(), loop, row_len, vocab_size)


def plan_task(method: str, config: Any) -> Plan:
    """Return the plan of a method with a head of its own; rows are as long as the longest batch of its data."""
    parts: TaskParts = lookup(PREPARED, method, "method")(config, device="meta")
    loop = with_steps(config.loop, config.epochs, parts.loader.num_examples)
    num = min(MAX_LOOKED_AT, -(-parts.loader.num_examples // loop.micro_batch_size))
    batches = [parts.loader.next_batch() for _ in range(num)]
    longest = max(batches, key=parts.objective.count_processed)
    rows = len(next(value for value in vars(longest).values() if isinstance(value, Tensor)))
    rate, entered = getattr(config, "dropout", 0.0), []  # a context that is forgotten takes its hooks away

    def make_model() -> nn.Module:
        memo: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad) for p in parts.model.parameters()
        }
        memo |= {id(b): torch.empty(b.shape, dtype=b.dtype) for b in parts.model.buffers()}
        made = copy.deepcopy(parts.model, memo)
        entered.append(dropout(made, rate))
        entered[-1].__enter__()
        return made

    def batch(num_rows: int) -> Any:
        tensors = {n: v for n, v in vars(longest).items() if isinstance(v, Tensor)}
        made = {n: torch.zeros((num_rows, *v.shape[1:]), dtype=v.dtype) for n, v in tensors.items()}
        return replace(longest, **made)

    shape = getattr(getattr(parts.model, "encoder", parts.model), "config", None)
    work = Work(
        make_model,
        batch,
        parts.objective,
        loop,
        parts.objective.count_processed(longest) // rows,
        getattr(shape, "vocab_size", -1),
        config.masking.fraction if method == "masked" else 1.0,
    )
    assert loop.num_steps is not None
    return make_plan(work, loop.num_steps)


def what_fits(config: Any) -> str:
    """Say what the plan of a run knows of its memory; nothing where it cannot be planned, or not any more."""
    if distributed.is_distributed():
        return ""
    try:
        planned = plan_run(config)
    except (ModelwrightError, RuntimeError, MemoryError):
        return ""
    found, peak = planned.batch, planned.peak
    return (
        f"The plan of this run is {human_bytes(planned.total_bytes)} of {human_bytes(planned.machine_memory_bytes)}: "
        f"weights {human_bytes(planned.weight_bytes)}, gradients {human_bytes(planned.gradient_bytes)}, optimizer "
        f"{human_bytes(planned.optimizer_bytes)}, activations {human_bytes(planned.activation_bytes)}, logits "
        f"{human_bytes(peak.logits_bytes)}. With this machine to itself {found.largest_micro_batch} rows at a time "
        f"fit, {found.largest_recomputed} with loop.recompute.name=layers."
    )


def _matrix_rate(loop: LoopConfig) -> float:
    device = pick_device(loop.device)
    return measure_matmul_flops(device, torch.bfloat16 if has_fast_bf16(device) else torch.float32, 0.5)
