"""Find glitch tokens: pieces of the vocabulary that the model has hardly ever seen, and answers strangely.

A token that never comes up in training is only ever pushed away from: the softmax lowers it everywhere alike, so the
output rows of all such tokens end up pointing one way. Some tokens are unused for certain (bytes that no UTF-8 has,
rows behind the tokenizer's last, tokens that no text gives); their mean, after the mean of all rows is taken away,
shows the direction, and how far another row points there is its score. The line is drawn by the certain ones
themselves: each is scored against the others, and a token must reach what nine tenths of them reach. Where the certain
ones do not agree among each other the model has no such direction (it is untrained, or these tokens were trained), and
nothing is told.

Source: Land & Bartolo 2024, "Fishing for Magikarp: Automatically Detecting Under-trained Tokens", section 3.2 (cosine
to the mean of unused rows).
Their last step, asking the model to repeat each candidate, is `modelwright.evaluate.repeat`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.compare import Audit, audit

MIN_AGREEMENT = 0.5  # cosine of a certain token with the mean of the others, the median of them
MIN_CERTAIN = 4
_REACHED = 0.1  # share of the certain tokens that may lie below the line
_NO_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))


@dataclass(frozen=True)
class Glitches:
    """What was found; ``found`` holds no token that was certain from the start.

    Attributes:
        certain: Tokens and free rows taken as unused.
        agreement: Median cosine of a certain one with the mean of the others; below `MIN_AGREEMENT` nothing is told.
        line: The score from which a token counts as under-trained; None: nothing is told.
        found: Ids by score, the strangest first.
        scores: Their scores.
    """

    certain: list[int]
    agreement: float
    line: float | None
    found: list[int]
    scores: list[float]


def find_glitches(
    model: nn.Module, tokenizer: Tokenizer, *, known: Audit | None = None, unused: Sequence[int] = ()
) -> Glitches:
    """Return the tokens whose output rows look as those of tokens that are never used.

    Args:
        model: A language model with ``lm_head`` or tied to its ``embed``.
        tokenizer: Its tokenizer.
        known: An audit of the tokenizer that was made already.
        unused: Further ids that are unused for certain.

    Raises:
        ConfigError: The model has no output matrix, or fewer than four tokens are unused for certain.
    """
    head = getattr(model, "lm_head", None) or getattr(model, "embed", None)
    rows = getattr(head, "weight", None)
    if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point():
        raise ConfigError(f"A {type(model).__name__} has no dense output matrix to look at. Give a language model.")
    certain = _certain(tokenizer, len(rows), known or audit(tokenizer), unused)
    if len(certain) < MIN_CERTAIN:
        raise ConfigError(
            f"Only {len(certain)} tokens are unused for certain, and {MIN_CERTAIN} are needed to know what unused rows "
            "look like. Name some with unused=."
        )
    centred = rows.detach().float()
    centred = nn.functional.normalize(centred - centred.mean(0), dim=1)  # (V, D)
    own = centred[certain]
    others = nn.functional.normalize(own.sum(0) - own, dim=1)
    agreed = (own * others).sum(1)
    agreement = float(agreed.median())
    if agreement < MIN_AGREEMENT:
        return Glitches(certain, agreement, None, [], [])
    line = float(agreed.quantile(_REACHED))
    scores = centred @ nn.functional.normalize(own.mean(0), dim=0)
    aside = {*certain, *tokenizer.special_ids.values()}
    ids = [i for i in torch.nonzero(scores[: tokenizer.vocab_size] >= line)[:, 0].tolist() if i not in aside]
    ids.sort(key=lambda index: -float(scores[index]))
    return Glitches(certain, agreement, line, ids, [float(scores[index]) for index in ids])


def _certain(tokenizer: Tokenizer, num_rows: int, known: Audit, unused: Sequence[int]) -> list[int]:
    spelled = {bytes([byte]) for byte in _NO_UTF8}
    special = set(tokenizer.special_ids.values())
    no_text = (i for i in range(tokenizer.vocab_size) if i not in special and tokenizer.token_bytes(i) in spelled)
    free = range(tokenizer.vocab_size, num_rows)
    return sorted({*no_text, *free, *known.unreachable, *unused})
