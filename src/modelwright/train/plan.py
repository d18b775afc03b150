"""What a training recipe will cost, worked out from its settings without touching a weight.

Sizes that the run would derive are derived here the same way, from this machine's measured matrix rate; they are an
estimate, because the run itself also times its first steps.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from modelwright.base.config import to_dict
from modelwright.base.device import has_fast_bf16, measure_matmul_flops, pick_device
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import read_json
from modelwright.data.blend import source_paths
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.adapters import AdapterMethod
from modelwright.nn.lora import LoraConfig
from modelwright.tokenizer.formats import load_tokenizer
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
from modelwright.train.finetune import MAX_EPOCHS, FinetuneConfig, row_length
from modelwright.train.loop import LoopConfig
from modelwright.train.pretrain import MICRO_BATCH_TOKENS, PretrainConfig, base_config
from modelwright.train.supply import count_tokens


def plan_run(config: PretrainConfig | FinetuneConfig) -> Plan:
    """Return the plan of a pre-training or fine-tuning recipe.

    Raises:
        DataError: The tokenizer, data set or base model that sizes follow from is missing.
    """
    if isinstance(config, PretrainConfig):
        return plan_pretrain(config)
    if isinstance(config, FinetuneConfig):
        return plan_finetune(config)
    raise ConfigError(
        f"A recipe of {type(config).__name__} cannot be planned yet; pretrain and finetune can. Run it with few steps "
        "and look at the memory that its progress shows."
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
    return make_plan(model, loop, config.max_seq_len, loop.num_steps)


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
    plan = make_plan(model, loop, row_len, num_steps, make_model=_adapted(model, config.method), is_masked=True)
    return plan if config.method is None else _with_adapter(plan)


def _adapted(model: LlamaConfig, method: AdapterMethod | None) -> Callable[[], nn.Module]:
    if isinstance(method, LoraConfig):
        method = replace(method, init="kaiming")  # others look at the weights, and take as much

    def make() -> nn.Module:
        made = Llama(model)
        if method is not None:
            adapt(made, method)
        return made

    return make


def _with_adapter(plan: Plan) -> Plan:
    """Frozen matrices pass gradients on, but get none: 4 FLOPs a number and token instead of 6."""
    trained = plan.gradient_bytes // 4
    per_token = plan.flops_per_token - 2 * plan.matmul_parameters + 6 * trained
    scale = per_token / plan.flops_per_token
    return replace(
        plan,
        parameters=plan.parameters + trained,
        flops_per_token=per_token,
        total_flops=plan.total_flops * scale,
        estimated_seconds=plan.estimated_seconds * scale,
    )


def _matrix_rate(loop: LoopConfig) -> float:
    device = pick_device(loop.device)
    return measure_matmul_flops(device, torch.bfloat16 if has_fast_bf16(device) else torch.float32, 0.5)
