"""What a compressed model lost: perplexity, KL divergence and agreement on the same held-out rows, and its size.

Perplexity can stay while the predictions move, where gains on some tokens hide losses on others; the KL divergence
of the compressed model from the original, token by token, cannot.
Source: Dutta et al. 2024, "Accuracy is not all you need", section 3 (KL divergence and flips beside accuracy).
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, DataError

MAX_CHUNK_BYTES = 64 << 20  # of float32 logits of one model at once
MAX_BATCH_TOKENS = 4096  # tokens that go through the layers together


def tensor_bytes(model: nn.Module) -> int:
    """Return the bytes of the model's tensors as they are saved, a shared one counted once."""
    seen: dict[tuple[int, int], int] = {}
    for tensor in model.state_dict().values():
        seen[tensor.data_ptr(), tensor.nbytes] = tensor.nbytes
    return sum(seen.values())


@torch.no_grad()
def compare(
    original: nn.Module, compressed: nn.Module, rows: Tensor | Sequence[Sequence[int]]
) -> dict[str, float | int]:
    """Compare two language models over one vocabulary on rows of tokens, each row read from its own start.

    Args:
        original: The model before; both models are scored in the dtype of their own weights.
        rows: (B, T) token ids, or sequences of any lengths.

    Returns:
        ``size_bytes``, ``original_size_bytes`` (of the tensors), ``perplexity``, ``original_perplexity``,
        ``perplexity_ratio``, ``kl_divergence`` (mean of KL(original || compressed) a token, nats), ``top1_agreement``
        (fraction of tokens with the same likeliest token), ``num_tokens``.

    Raises:
        ConfigError: The vocabularies differ in size.
        DataError: No row has two tokens.
    """
    sizes = [int(model.lm_head.out_features) for model in (original, compressed)]  # type: ignore[union-attr, arg-type]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"The vocabularies have {sizes[0]} and {sizes[1]} tokens; only models over one compare.")
    was_training = original.training, compressed.training
    original.eval(), compressed.eval()
    totals = torch.zeros(4, dtype=torch.float64)
    num_tokens = 0
    for batch in _batches(rows):
        batch = batch.to(next(original.parameters()).device)
        totals += _compare_batch(original, compressed, batch, sizes[0])
        num_tokens += batch.shape[0] * (batch.shape[1] - 1)
    original.train(was_training[0]), compressed.train(was_training[1])
    if not num_tokens:
        raise DataError("No row holds two tokens; a comparison needs a token to predict from the one before it.")
    before, after, divergence, agreement = (totals / num_tokens).tolist()
    return {
        "size_bytes": tensor_bytes(compressed),
        "original_size_bytes": tensor_bytes(original),
        "perplexity": math.exp(after),
        "original_perplexity": math.exp(before),
        "perplexity_ratio": math.exp(after - before),
        "kl_divergence": divergence,
        "top1_agreement": agreement,
        "num_tokens": num_tokens,
    }


def _batches(rows: Tensor | Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Yield (B, T) pieces of rows of equal length, so that nothing is padded."""
    if isinstance(rows, Tensor):
        groups = [rows] if rows.shape[1] > 1 else []
    else:
        by_length: dict[int, list[Sequence[int]]] = {}
        for row in rows:
            by_length.setdefault(len(row), []).append(row)
        groups = [torch.tensor(some) for length, some in sorted(by_length.items()) if length > 1]
    for group in groups:
        yield from group.long().split(max(1, MAX_BATCH_TOKENS // group.shape[1]))


def _compare_batch(original: nn.Module, compressed: nn.Module, batch: Tensor, vocab_size: int) -> Tensor:
    """Sum over a batch: nats before, nats after, KL divergence, agreements."""
    models = (original, compressed)
    hidden = [model.hidden(batch)[:, :-1].flatten(0, 1) for model in models]  # type: ignore[operator]  # (B*(T-1), D)
    targets = batch[:, 1:].flatten()
    size = max(1, MAX_CHUNK_BYTES // (4 * vocab_size))
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(targets), size):
        piece = slice(start, start + size)
        p, q = (_log_softmax(m, h[piece]) for m, h in zip(models, hidden, strict=True))  # (chunk, V)
        wanted = targets[piece, None]
        sums[0] -= p.gather(1, wanted).double().sum().cpu()
        sums[1] -= q.gather(1, wanted).double().sum().cpu()
        sums[2] += (p.exp() * (p - q)).sum(-1).double().sum().cpu()
        sums[3] += (p.argmax(-1) == q.argmax(-1)).sum().cpu()
    return sums


def _log_softmax(model: nn.Module, hidden: Tensor) -> Tensor:
    return model.lm_head(hidden).float().log_softmax(-1)  # type: ignore[operator]
