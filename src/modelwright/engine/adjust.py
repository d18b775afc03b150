"""What a request asks of the logits before a token is drawn: bans, biases and penalties, one row at a time.

Order: logit bias, repetition penalty, frequency and presence penalties, then bans, which nothing can lift. The
repetition penalty looks at prompt and completion, the other two at the completion alone, as in vLLM.

Source: Keskar et al. 2019, "CTRL", section 4.1 (repetition); the OpenAI API's definition of frequency and presence
penalties.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from modelwright.base.types import SamplingParams


def adjust(
    logits: Tensor,
    params: SamplingParams,
    *,
    prompt_ids: Sequence[int] = (),
    output_ids: Sequence[int] = (),
    banned_ids: Sequence[int] = (),
    bad_words: Sequence[tuple[int, ...]] = (),
) -> Tensor:
    """Return the adjusted logits of one row; the given ones are left alone.

    Args:
        logits: (V,) float32.
        params: Bias and penalties.
        prompt_ids: The prompt.
        output_ids: The completion so far.
        banned_ids: Tokens that may not come now.
        bad_words: Token sequences that may not come; the last token of one is banned when the rest stands before it.
    """
    banned = [*banned_ids, *_ends_of_bad_words(bad_words, output_ids)]
    has_penalty = params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty
    if not (banned or has_penalty or params.logit_bias):
        return logits
    logits = logits.clone()
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt_ids, *output_ids}), device=logits.device)
        values = logits[seen]
        factor = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    if (params.frequency_penalty or params.presence_penalty) and output_ids:
        counts = Counter(output_ids)
        tokens = torch.tensor(list(counts), device=logits.device)
        amounts = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[tokens] -= params.frequency_penalty * amounts + params.presence_penalty
    if banned:
        logits[banned] = -math.inf
    return logits


def _ends_of_bad_words(bad_words: Sequence[tuple[int, ...]], output_ids: Sequence[int]) -> list[int]:
    """Return the tokens that would complete a bad word.

    >>> _ends_of_bad_words([(5,), (1, 2, 3), (9, 8)], [1, 2])
    [5, 3]
    """
    found = []
    for word in bad_words:
        start = word[:-1]
        if not start or tuple(output_ids[-len(start) :]) == start:
            found.append(word[-1])
    return found
