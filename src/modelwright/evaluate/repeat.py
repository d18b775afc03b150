"""Ask a model to repeat single tokens: those that it cannot say again are glitch tokens by what it does.

Three prompts make repeating the likely way on: the token in a run of itself, quoted in examples of repeating, and asked
for in words. Each holds the token's id as it is, so that no text has to spell it. The probability that counts is the
highest of the three. A token below 1 % cannot be repeated. Ordinary tokens are asked as well: where the model repeats
those no better, it cannot copy at all, and nothing is told about any token.

Source: Land & Bartolo 2024, "Fishing for Magikarp: Automatically Detecting Under-trained Tokens", section 3.3 (prompts
for repetition, 1 % of probability, the best of several prompts); Rumbelow & Watkins 2023, "SolidGoldMagikarp" (asking
for repetition). Departure: their prompts are for chat models of billions of weights; a run of the token is what a small
one can follow. A tied matrix may copy a token that it never saw, by likeness to itself; such a token is not named.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from modelwright.base.errors import ConfigError
from modelwright.base.progress import track
from modelwright.models.scoring import context_len, token_log_probs
from modelwright.tokenizer.bpe import Tokenizer

MAX_PROBABILITY = 0.01  # of a token that cannot be repeated
MIN_COPIED = 0.1  # median probability of the ordinary tokens, below which the model cannot copy
NUM_CONTROLS = 100
_RUN = 8
_BATCH_TOKENS = 16_384
_EXAMPLES = (
    'Repeat: "river" "river"\nRepeat: "stone" "stone"\nRepeat: "garden" "garden"\nRepeat: "',
    '" "',
)
_REQUEST = ('Question: Please repeat the string "', '" back to me. Answer: "')


@dataclass(frozen=True)
class Repeats:
    """What a model says again.

    Attributes:
        ids: Tokens asked for.
        probabilities: Of each, under the prompt that suits it best.
        controls: Ordinary tokens asked for as well.
        copied: Median probability of the controls; below `MIN_COPIED` the model cannot copy.
        failed: Of `ids`, those that cannot be repeated, the least probable first; None: the model cannot copy.
    """

    ids: list[int]
    probabilities: list[float]
    controls: list[int]
    copied: float
    failed: list[int] | None


def check_repeats(
    model: nn.Module,
    tokenizer: Tokenizer,
    ids: Sequence[int] | None = None,
    *,
    controls: Sequence[int] | None = None,
    seed: int = 0,
) -> Repeats:
    """Ask a model to repeat tokens.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        ids: Tokens to ask for; None: all but special ones.
        controls: Ordinary tokens; None: a hundred of the rest, or of all when all are asked for.
        seed: Of their choice.

    Raises:
        ConfigError: An id is not in the vocabulary, or no token is left to compare with.
    """
    special = set(tokenizer.special_ids.values())
    known = [i for i in range(tokenizer.vocab_size) if i not in special and tokenizer.token_bytes(i)]
    wrong = next((i for i in ids or () if not 0 <= i < tokenizer.vocab_size), None)
    if wrong is not None:
        raise ConfigError(f"Token {wrong} is not in the vocabulary of {tokenizer.vocab_size}. Give ids below that.")
    asked = known if ids is None else list(ids)
    if controls is None:
        rest = sorted(set(known) - set(asked)) or known
        controls = random.Random(seed).sample(rest, min(NUM_CONTROLS, len(rest)))
    if not controls:
        raise ConfigError("There is no ordinary token to compare with. Name some with controls=.")
    found = dict(zip(asked, repeat_probabilities(model, tokenizer, asked), strict=True))
    missing = [i for i in controls if i not in found]
    beside = found | dict(zip(missing, repeat_probabilities(model, tokenizer, missing), strict=True))
    copied = float(torch.tensor([beside[i] for i in controls]).median())
    failed = sorted((i for i in asked if found[i] < MAX_PROBABILITY), key=lambda i: found[i])
    told = failed if copied >= MIN_COPIED else None
    return Repeats(asked, [found[i] for i in asked], list(controls), copied, told)


@torch.inference_mode()
def repeat_probabilities(model: nn.Module, tokenizer: Tokenizer, ids: Sequence[int]) -> list[float]:
    """Return the probability of each token where it is to be said again, under the prompt that suits it best."""
    if not ids:
        return []
    device, longest = next(model.parameters()).device, context_len(model)
    asked = torch.tensor(ids)
    best = torch.full((len(ids),), float("-inf"))
    prompts = [prompt for prompt in _prompts(tokenizer) if len(prompt) <= longest]
    if not prompts:
        raise ConfigError(f"The model reads {longest} tokens, and no prompt is that short. Give a model of {_RUN + 2}.")
    was_training = model.training
    model.eval()
    try:
        for prompt in track(prompts, "ask for tokens again"):
            is_asked = torch.tensor([place < 0 for place in prompt])
            frame = torch.tensor(prompt).clamp(min=0)
            for places in torch.arange(len(ids)).split(max(1, _BATCH_TOKENS // len(prompt))):
                rows = torch.where(is_asked, asked[places, None], frame)  # (B, T)
                last = token_log_probs(model, rows.to(device))[:, -1].float().cpu()
                best[places] = torch.maximum(best[places], last)
    finally:
        model.train(was_training)
    return [float(value) for value in best.exp()]


def _prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Return prompts with -1 where the token stands; each ends with the place where it should come again."""
    first = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    made = [[*first, *[-1] * _RUN]]
    for before, between in (_EXAMPLES, _REQUEST):
        made.append([*first, *encode(before), -1, *encode(between), -1])
    return made
