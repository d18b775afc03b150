"""Corrupt a text for an encoder-decoder to mend: spans behind sentinels (T5), and UL2's mixture of denoisers.

A span of tokens is taken out of the text, and a sentinel token stands for it; the target is each sentinel with what it
stands for, and the end token. Lengths of spans and of the gaps between them are random partitions, so that the share of
corrupted tokens and the mean length of a span are exact for each text (rounded), as in the authors' code.

UL2 mixes three kinds, each told to the model by a token in front: R (short spans, T5's own), X (long spans or much
corruption) and S (the text is cut once, and its end is the target: a prefix language model).

Source: Raffel et al. 2019, arXiv:1910.10683, section 3.1.4 and 3.3.4; Tay et al. 2022, arXiv:2205.05131, table 1 and
section 3.1.2. Not done: packing several texts into one row of the encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelwright.base.errors import ConfigError, DataError

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Denoiser:
    """One kind of corruption."""

    fraction: float = 0.15  # of the tokens that are taken out
    mean_span: float | None = 3.0  # tokens a span; None: one span, the end of the text
    mode: str | None = None  # token put in front of the input; None: none

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ConfigError(f"The fraction of a denoiser is {self.fraction}; it must lie between 0 and 1.")
        if self.mean_span is not None and self.mean_span < 1:
            raise ConfigError(f"The mean_span of a denoiser is {self.mean_span}; it must be at least 1.")


SPAN_CORRUPTION = (Denoiser(),)
# Table 1 of UL2: two R, one S and four X, all equally often.
UL2 = (
    Denoiser(0.15, 3.0, "[NLU]"),
    Denoiser(0.15, 8.0, "[NLU]"),
    Denoiser(0.25, None, "[S2S]"),
    Denoiser(0.5, 3.0, "[NLG]"),
    Denoiser(0.5, 8.0, "[NLG]"),
    Denoiser(0.15, 64.0, "[NLG]"),
    Denoiser(0.5, 64.0, "[NLG]"),
)
MIXTURES = {"span_corruption": SPAN_CORRUPTION, "ul2": UL2}


def mark_spans(length: int, fraction: float, mean_span: float, random: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Return which of ``length`` tokens are taken out, (length,); the first token always stays.

    >>> marked = mark_spans(100, 0.15, 3.0, np.random.default_rng(0))
    >>> int(marked.sum()), int((np.diff(marked.astype(int)) == 1).sum())
    (15, 5)
    """
    if length < 2:
        raise DataError(f"A text of {length} tokens was to be corrupted; it needs at least 2. Leave such texts out.")
    num_out = min(max(round(length * fraction), 1), length - 1)
    num_spans = min(max(round(num_out / mean_span), 1), num_out, length - num_out)
    spans, gaps = (_partition(total, num_spans, random) for total in (num_out, length - num_out))
    marked = np.zeros(length, dtype=bool)
    at = 0
    for gap, span in zip(gaps, spans, strict=True):
        marked[at + gap : at + gap + span] = True
        at += gap + span
    return marked


def _partition(total: int, num_parts: int, random: np.random.Generator) -> list[int]:
    """Return ``num_parts`` whole numbers of at least 1 that add up to ``total``, every way equally likely."""
    cuts = np.sort(random.permutation(total - 1)[: num_parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(int).tolist()


def corrupt(
    ids: Ids, marked: npt.NDArray[np.bool_], sentinels: Sequence[int], end_id: int, prefix: Sequence[int] = ()
) -> tuple[Ids, Ids]:
    """Put a sentinel in the place of each marked span.

    Args:
        ids: One text, (length,).
        marked: Which tokens are taken out, (length,).
        sentinels: Ids of the sentinels, in the order in which they are used.
        end_id: Ends the input and the target.
        prefix: Ids in front of the input.

    Returns:
        What the encoder reads, and what the decoder must write.

    Raises:
        DataError: There are more spans than sentinels.

    >>> seen, target = corrupt(np.array([5, 6, 7, 8, 9]), np.array([0, 1, 1, 0, 1], bool), [99, 98], 1)
    >>> seen.tolist(), target.tolist()
    ([5, 99, 8, 98, 1], [99, 6, 7, 98, 9, 1])
    """
    starts = np.flatnonzero(marked & ~np.concatenate([[False], marked[:-1]]))
    if len(starts) > len(sentinels):
        raise DataError(
            f"A text has {len(starts)} corrupted spans, and the tokenizer {len(sentinels)} sentinels. Use shorter "
            "rows, longer spans, or a tokenizer with more sentinels."
        )
    seen: list[int] = list(prefix)
    target: list[int] = []
    number = -1
    for i, token in enumerate(ids.tolist()):
        if not marked[i]:
            seen.append(token)
            continue
        if i == 0 or not marked[i - 1]:
            number += 1
            seen.append(sentinels[number])
            target.append(sentinels[number])
        target.append(token)
    return np.array([*seen, end_id], dtype=np.int64), np.array([*target, end_id], dtype=np.int64)


def mend_text(seen: Sequence[int], target: Sequence[int], sentinels: Sequence[int], end_id: int) -> list[int]:
    """Return the text that a corrupted input and its target were made from: `corrupt` backwards."""
    known, spans, current = set(sentinels), dict[int, list[int]](), None
    for token in target:
        if token in known:
            current = spans.setdefault(token, [])
        elif token != end_id and current is not None:
            current.append(token)
    return [t for token in seen if token != end_id for t in (spans.get(token, []) if token in known else [token])]


def denoise(
    ids: Ids,
    denoiser: Denoiser,
    sentinels: Sequence[int],
    end_id: int,
    prefix: Sequence[int],
    random: np.random.Generator,
) -> tuple[Ids, Ids]:
    """Corrupt one text as a denoiser says; return what the encoder reads and what the decoder must write.

    Without a mean span the text is cut once: the end, a share drawn evenly from 0 to twice ``fraction``, is the target.
    """
    if denoiser.mean_span is not None:
        return corrupt(
            ids, mark_spans(len(ids), denoiser.fraction, denoiser.mean_span, random), sentinels, end_id, prefix
        )
    share = random.uniform(0.0, min(1.0, 2 * denoiser.fraction))
    marked = np.zeros(len(ids), dtype=bool)
    marked[len(ids) - min(max(1, round(len(ids) * share)), len(ids) - 1) :] = True
    return corrupt(ids, marked, sentinels, end_id, prefix)
