"""What a tokenizer is worth to a model: bits per byte after training on the same FLOPs.

One small decoder is trained for each tokenizer, all with the same body, context in tokens, and number of FLOPs: a
tokenizer that says more in a token reads more text for them, and one with more tokens pays for a larger output matrix.
At this size that matrix is most of a step, which is hard on large vocabularies; in a large model it is a few per cent.
Bits per byte are comparable between tokenizers, perplexity and loss are not.

Source: FLOPs as in `train.budget`; the comparison as in Ali et al. 2023, "Tokenizer Choice For LLM Training".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from modelwright.base.errors import ConfigError, DataError
from modelwright.data.load import RowLoader
from modelwright.data.pack import stream_rows
from modelwright.evaluate.perplexity import evaluate_text
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.train.budget import flops_per_token
from modelwright.train.loop import LoopConfig, train
from modelwright.train.objective import CausalLanguageModeling

MIN_STEPS = 20


@dataclass(frozen=True)
class ComputeConfig:
    """The decoder that is trained, and for how long."""

    flops: float = 1e12  # forward and backward, of one training; about half a minute on one core
    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 2
    max_seq_len: int = 128  # tokens of a row
    rows_per_step: int = 16

    def __post_init__(self) -> None:
        if not self.flops > 0:
            raise ConfigError(f"flops is {self.flops}; it must be above 0, such as 1e12.")


@dataclass(frozen=True)
class ComputeScore:
    """What one training gave."""

    bits_per_byte: Mapping[str, float]  # by the name of the held-out text
    num_steps: int
    num_tokens: int
    bytes_read: float  # tokens read, in bytes of text; above the text's size it was read more than once
    flops_per_token: float


def score_tokenizer(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    held_out: Mapping[str, Sequence[str]],
    config: ComputeConfig | None = None,
    seed: int = 0,
) -> ComputeScore:
    """Train a decoder under a tokenizer for the FLOPs of ``config``, and score the held-out texts.

    Raises:
        ConfigError: The FLOPs do not suffice for a few steps under this tokenizer.
        DataError: There is too little text.
    """
    config = config or ComputeConfig()
    shape = shape_of(tokenizer, config)
    per_token = flops_per_token(shape, config.max_seq_len)
    step_tokens = config.rows_per_step * config.max_seq_len
    num_steps = int(config.flops / (per_token * step_tokens))
    if num_steps < MIN_STEPS:
        raise ConfigError(
            f"flops is {config.flops:.2g}, which is {num_steps} steps under a vocabulary of {tokenizer.vocab_size:,}; "
            f"expected {MIN_STEPS} at least. Give {per_token * step_tokens * MIN_STEPS:.2g} or more."
        )
    model = train_decoder(tokenizer, texts, config, num_steps, seed)
    bits = {
        name: evaluate_text(model, tokenizer, some, max_seq_len=config.max_seq_len).bits_per_byte
        for name, some in held_out.items()
    }
    num_tokens = num_steps * step_tokens
    all_tokens = sum(map(len, tokenizer.encode_batch(texts, add_special_tokens=False)))
    all_bytes = sum(len(text.encode("utf-8")) for text in texts)
    return ComputeScore(bits, num_steps, num_tokens, num_tokens * all_bytes / all_tokens, per_token)


def shape_of(tokenizer: Tokenizer, config: ComputeConfig) -> LlamaConfig:
    """Return the decoder's config under a tokenizer."""
    return LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=-(-config.hidden_size * 8 // 3 // 32) * 32,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        max_seq_len=config.max_seq_len,
        tie_embeddings=True,
        eos_token_id=(tokenizer.eos_id,),
    )


def train_decoder(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    config: ComputeConfig,
    num_steps: int,
    seed: int = 0,
    model: Llama | None = None,
) -> Llama:
    """Train a decoder, a new one unless one is given, for a number of steps.

    Raises:
        DataError: There is too little text for one row.
    """
    if not any(texts):
        raise DataError("There is no text to train on; expected at least one non-empty text.")
    documents = [np.array(ids) for ids in tokenizer.encode_batch(texts, add_special_tokens=False)]
    loader = RowLoader(
        lambda epoch: stream_rows(documents, config.max_seq_len, tokenizer.eos_id, seed=seed * 100_003 + epoch),
        config.rows_per_step,
    )
    loop = LoopConfig(num_steps=num_steps, micro_batch_size=config.rows_per_step, compile=False, seed=seed)
    loop = replace(loop, schedule=replace(loop.schedule, warmup_steps=min(10, num_steps // 4)))
    found = model or init_weights(Llama(shape_of(tokenizer, config)), seed)
    train(found, CausalLanguageModeling(), loader, loop, name="train")
    return found.eval()  # type: ignore[return-value]
