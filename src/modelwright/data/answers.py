"""Extractive answers: long contexts cut into stretches that overlap, and the best spans put together again.

A question and a context become as many stretches as the context needs, each with the whole question in front and
``stride`` tokens shared with its neighbour, so that an answer at a cut is whole in one of them. In a stretch without
the answer both labels point at the first token. Decoding takes the ``num_best`` starts and ends of every stretch, keeps
the pairs that lie in the context, in order and not too long, and sorts them by the sum of both scores.

Source: Devlin et al. 2019, arXiv:1810.04805, section 4.2 and 4.3 (no answer: the score of the first token).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tokenizers

from modelwright.base.errors import ConfigError, DataError

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Stretch:
    """One part of a context with its question."""

    question: int  # number of the question
    ids: list[int]
    type_ids: list[int]
    offsets: list[tuple[int, int] | None]  # characters of the context that a token stands for; None: not of the context
    labels: tuple[int, int]  # first and last token of the answer; (0, 0): it is not in this stretch


@dataclass(frozen=True)
class Answer:
    """A span of the context."""

    text: str
    start: int  # its first character
    score: float  # sum of both logits; for ranking alone


def cut_context(
    backend: tokenizers.Tokenizer,
    question: str,
    context: str,
    answer: tuple[int, str] | None,
    *,
    number: int = 0,
    max_tokens: int = 384,
    stride: int = 128,
) -> list[Stretch]:
    """Return the stretches of one question, at least one.

    Args:
        backend: The encoder's tokenizer.
        question: It stands first in every stretch.
        context: Where the answer is looked for.
        answer: Its first character and its text; None: the context has none, or it is not known.
        number: Of the question.
        max_tokens: Of a stretch, question and special tokens included.
        stride: Tokens that two neighbours share.

    Raises:
        DataError: The answer does not stand where it is said to.
        ConfigError: The question and the stride leave no room.
    """
    if answer is not None and context[answer[0] : answer[0] + len(answer[1])] != answer[1]:
        seen = context[answer[0] : answer[0] + len(answer[1])]
        raise DataError(
            f"Question {number} has the answer {answer[1]!r} at character {answer[0]}, where the context has {seen!r}. "
            "Mend the place, or leave the question out."
        )
    room = max_tokens - len(backend.encode(question, "").ids)
    if room <= stride or stride < 0:
        raise ConfigError(
            f"max_tokens is {max_tokens}: question {number} leaves {room} tokens of context, and the stride is "
            f"{stride}. Raise max_tokens or lower the stride."
        )
    backend.enable_truncation(max_tokens, stride=stride, strategy="only_second")
    first = backend.encode(question, context)
    backend.no_truncation()
    found = []
    for part in [first, *first.overflowing]:
        offsets = [o if s == 1 else None for o, s in zip(part.offsets, part.sequence_ids, strict=True)]
        found.append(Stretch(number, part.ids, part.type_ids, offsets, _label(offsets, answer)))
    return found


def _label(offsets: Sequence[tuple[int, int] | None], answer: tuple[int, str] | None) -> tuple[int, int]:
    if answer is None:
        return 0, 0
    start, end = answer[0], answer[0] + len(answer[1])
    inside = [i for i, o in enumerate(offsets) if o is not None and o[0] < end and o[1] > start]
    if not inside:
        return 0, 0
    first, last = offsets[inside[0]], offsets[inside[-1]]
    assert first is not None and last is not None
    return (inside[0], inside[-1]) if first[0] <= start and last[1] >= end else (0, 0)


def best_answers(
    stretches: Sequence[Stretch],
    starts: Sequence[Floats],
    ends: Sequence[Floats],
    context: str,
    *,
    num_best: int = 20,
    max_answer_tokens: int = 30,
) -> list[Answer]:
    """Return the best spans of one question over all its stretches, best first; a span counts once.

    ``starts`` and ``ends`` are the logits of each stretch, (tokens,).
    """
    found: dict[tuple[int, int], float] = {}
    for stretch, first, last in zip(stretches, starts, ends, strict=True):
        places = np.array([i for i, o in enumerate(stretch.offsets) if o is not None], dtype=np.int64)
        for i in places[np.argsort(-first[places], kind="stable")[:num_best]]:
            for j in places[np.argsort(-last[places], kind="stable")[:num_best]]:
                if not i <= j < i + max_answer_tokens:
                    continue
                head, tail = stretch.offsets[i], stretch.offsets[j]
                assert head is not None and tail is not None
                score = float(first[i] + last[j])
                span = (head[0], tail[1])
                found[span] = max(score, found.get(span, -np.inf))
    best = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:num_best]
    return [Answer(context[start:end], start, score) for (start, end), score in best]


def no_answer_score(starts: Sequence[Floats], ends: Sequence[Floats]) -> float:
    """Return the score of there being no answer: the least of the stretches' first tokens."""
    return min(float(first[0] + last[0]) for first, last in zip(starts, ends, strict=True))
