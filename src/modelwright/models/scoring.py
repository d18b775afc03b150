"""How probable a model finds given tokens: natural logarithms in float32, whatever the dtype of the weights.

The logits of all positions at once would need B * T * V float32 numbers (a gigabyte for 8 x 1,024 tokens and 32,000
words), so they are made for a piece of the positions at a time and thrown away.
"""

import torch
from torch import Tensor, nn

MAX_CHUNK_BYTES = 128 << 20  # of float32 logits at once; the softmax needs about as much again


def token_log_probs(
    model: nn.Module,
    input_ids: Tensor,
    *,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
) -> Tensor:
    """Return log p(token t + 1 | tokens 0 .. t) for every t: (B, T - 1), natural logarithms, float32.

    Gradients flow; wrap the call in ``torch.inference_mode()`` where they are not wanted.

    Args:
        model: A language model with ``hidden`` and ``lm_head``.
        input_ids: (B, T).
        positions: As for ``model.hidden``.
        mask: As for ``model.hidden``.
        max_chunk_bytes: Upper bound on the float32 logits that exist at one time.
    """
    hidden = model.hidden(input_ids, positions, mask)[:, :-1]  # type: ignore[operator]  # (B, T-1, D)
    return log_probs_of(model.lm_head, hidden, input_ids[:, 1:], max_chunk_bytes)  # type: ignore[arg-type]


def log_probs_of(lm_head: nn.Module, hidden: Tensor, targets: Tensor, max_chunk_bytes: int = MAX_CHUNK_BYTES) -> Tensor:
    """Return log p(target) under ``lm_head(hidden)``: (B, T, D) and (B, T) give (B, T), float32."""
    rows, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)  # (B*T, D), (B*T,)
    vocab_size = int(lm_head.out_features)  # type: ignore[arg-type]
    chunk = max(1, max_chunk_bytes // (4 * vocab_size))
    parts = []
    for piece, ids in zip(rows.split(chunk), wanted.split(chunk), strict=True):
        # By row, as the engine does: logsumexp of a long row may be split between threads, which changes its bits.
        log_probs = torch.log_softmax(lm_head(piece).float(), dim=-1)  # (chunk, V)
        parts.append(log_probs.gather(1, ids[:, None]).squeeze(1))
    return torch.cat(parts).view(targets.shape)


def context_len(model: nn.Module) -> int:
    """Return the longest row that a language model reads, in tokens."""
    return int(model.config.max_seq_len)  # type: ignore[union-attr, arg-type]
