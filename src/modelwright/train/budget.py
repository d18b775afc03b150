"""What a training run will cost before anything is spent: parameters, memory by part, FLOPs, time.

FLOPs follow Chowdhery et al. 2022 (PaLM, appendix B): 6 for each parameter of a matrix product and token, forward and
backward together, plus 12 L D T for attention; no discount for the causal half. Memory is found by doing a step
without numbers (`modelwright.train.footprint`); a compiled step takes less.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from modelwright.base.device import describe_machine, has_fast_bf16, measure_matmul_flops, pick_device
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.train.memory_plan import SPARE, Work, plan_memory

# Share of the machine's matrix rate that a training step reaches; measured 0.5 to 0.6 on two CPU cores
# (benchmarks/quickstart.py), so plans are a little pessimistic.
ASSUMED_MFU = 0.45


@dataclass(frozen=True)
class BatchAdvice:
    """How many rows a forward pass may have on this machine."""

    largest_micro_batch: int  # 0: not even one fits
    largest_recomputed: int  # with loop.recompute.name=layers
    recommended_recompute: str  # none, or layers where only that fits


@dataclass(frozen=True)
class PeakParts:
    """More parts of a run's memory."""

    logits_bytes: int
    shared_bytes: int  # gradients that come into being where activations were: counted, but not in the total
    framework_bytes: int  # interpreter and libraries
    allocator_bytes: int  # holes between blocks, and what was freed and not given back
    loading_bytes: int  # what making the model takes beyond a step
    checkpoint_bytes: int  # the copy that is written while training goes on


@dataclass(frozen=True)
class Plan:
    """Figures of one planned run; bytes, FLOPs and seconds."""

    parameters: int
    matmul_parameters: int  # those that take part in a matrix product for every token
    tokens_per_step: int
    num_steps: int
    total_tokens: int
    flops_per_token: float
    total_flops: float
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int  # at the peak of a step, with temporary tensors and copies in the compute type
    peak: PeakParts
    total_bytes: int  # of one process
    kv_cache_bytes_per_token: int  # when served in bf16
    machine_flops_per_second: float  # measured
    assumed_mfu_fraction: float
    estimated_seconds: float
    machine_memory_bytes: int
    fits: bool
    batch: BatchAdvice

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return asdict(self)


def count_parameters(config: LlamaConfig) -> tuple[int, int]:
    """Return (all parameters, those of matrix products); an embedding that is only looked up is not in the second."""
    with torch.device("meta"):
        model = Llama(config)
    total = sum(p.numel() for p in model.parameters())
    looked_up = 0 if config.tie_embeddings else model.embed.weight.numel()
    return total, total - looked_up


def flops_per_token(config: LlamaConfig, row_len: int) -> float:
    """Return the FLOPs of a training step, forward and backward, for each token of a row of ``row_len``."""
    assert config.head_dim is not None
    _, matmul = count_parameters(config)
    return 6 * matmul + 12 * config.num_layers * config.num_heads * config.head_dim * row_len


def kv_bytes_per_token(config: LlamaConfig, bytes_per_number: int = 2) -> int:
    """Return what one cached token costs in serving."""
    assert config.head_dim is not None and config.num_kv_heads is not None
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * bytes_per_number


def make_plan(work: Work, num_steps: int, *, model: LlamaConfig | None = None) -> Plan:
    """Measure this machine for a second, trace a step, and work out what the run will take.

    Args:
        work: What a step computes.
        num_steps: Updates.
        model: The shape of a decoder whose weights are all trained, for the formula; None: FLOPs are those of the
            traced matrix products.
    """
    loop = work.loop
    device = pick_device(loop.device)
    precision = loop.precision or ("bf16" if has_fast_bf16(device) else "fp32")
    rate = measure_matmul_flops(device, torch.float32 if precision == "fp32" else torch.bfloat16)
    memory = _memory_of(device)
    found = plan_memory(work, precision=precision, memory_bytes=memory)
    parts, facts = found.footprint, found.footprint.facts
    num_ranks = loop.parallel.inner * (loop.parallel.data or 1)
    tokens_per_step = loop.micro_batch_size * loop.grad_accum_steps * work.row_len
    total, matmul = (facts.parameters, facts.matmul_parameters) if model is None else count_parameters(model)
    per_token = num_ranks * facts.flops / tokens_per_step if model is None else flops_per_token(model, work.row_len)
    flops = per_token * tokens_per_step * num_steps
    on_machine = num_ranks if device.type == "cpu" else 1
    return Plan(
        parameters=total,
        matmul_parameters=matmul,
        tokens_per_step=tokens_per_step,
        num_steps=num_steps,
        total_tokens=tokens_per_step * num_steps,
        flops_per_token=per_token,
        total_flops=flops,
        weight_bytes=parts.weights,
        gradient_bytes=found.gradient_bytes,
        optimizer_bytes=parts.optimizer,
        activation_bytes=parts.activations + parts.batch,
        peak=PeakParts(
            parts.logits,
            found.gradient_bytes - parts.gradients,
            found.framework_bytes,
            parts.allocator,
            parts.loading,
            found.checkpoint_bytes,
        ),
        total_bytes=found.total,
        kv_cache_bytes_per_token=0 if model is None else kv_bytes_per_token(model),
        machine_flops_per_second=rate,
        assumed_mfu_fraction=ASSUMED_MFU,
        estimated_seconds=flops / (rate * ASSUMED_MFU * (1 if device.type == "cpu" else num_ranks)),
        machine_memory_bytes=memory,
        fits=found.total * on_machine < SPARE * memory,
        batch=BatchAdvice(found.largest_micro_batch, found.largest_micro_batch_recomputed, found.recommended_recompute),
    )


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return describe_machine().memory_bytes


# Shapes from small to large, as (hidden size, layers). Few wide layers and heads of 128 keep matrix products large,
# which is what a CPU needs (docs/log.md).
_LADDER = ((64, 2), (128, 2), (192, 3), (256, 4), (384, 6), (512, 8), (768, 12), (1024, 16), (1536, 24), (2048, 24))
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, arXiv:2203.15556
MIN_EPOCHS = 1.5  # a text this small is better read more than once by a model that is too large than once


def derive_shape(
    vocab_size: int, row_len: int, num_data_tokens: int, seconds: float, flops_per_second: float
) -> LlamaConfig:
    """Return the largest decoder of the ladder that the budget lets see enough text.

    Enough is 20 tokens a parameter (Chinchilla), or 1.5 passes over the data where that is less.

    Args:
        vocab_size: Of the tokenizer.
        row_len: Tokens a row, also the context of the model.
        num_data_tokens: Size of the training text.
        seconds: Budget for training alone.
        flops_per_second: Measured matrix rate of the machine.
    """
    budget = seconds * flops_per_second * ASSUMED_MFU
    best: LlamaConfig | None = None
    for hidden_size, num_layers in _LADDER:
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=_round_up(hidden_size * 8 / 3, 64),
            num_layers=num_layers,
            num_heads=max(1, hidden_size // 128),
            max_seq_len=row_len,
            tie_embeddings=True,
        )
        total, _ = count_parameters(config)
        wanted = min(TOKENS_PER_PARAMETER * total, MIN_EPOCHS * num_data_tokens)
        if best is None or flops_per_token(config, row_len) * wanted <= budget:
            best = config
    assert best is not None
    return best


def derive_batch_tokens(total_tokens: float) -> int:
    """Return the tokens of one update: a power of two that grows with the square root of the run.

    Anchored at 4,096 for a run of a million tokens (measured here); the exponent lies between the 0.38 of nanochat's
    fit and the 0.5 of McCandlish et al. 2018 (arXiv:1812.06162).
    """
    return 2 ** round(math.log2(min(max(4096 * math.sqrt(total_tokens / 1.2e6), 1024), 2**19)))


def _round_up(value: float, multiple: int) -> int:
    return int(-(-value // multiple) * multiple)
