"""Hide tokens for a masked language model: single tokens or whole words, drawn anew for every epoch.

Of a text, 15 % of the tokens that are no special ones are to be predicted. Of these 80 % become the mask token, 10 % a
random token and 10 % stay as they are, so that a model cannot trust what it sees. With whole words, a word is hidden in
all its pieces or not at all; the number of tokens stays the same. The numbers are exact for each text (rounded to whole
tokens), not an average over texts.

Source: Devlin et al. 2019, arXiv:1810.04805, section 3.1 and appendix A.1 (whole words: the authors' repository, 2019);
Liu et al. 2019, arXiv:1907.11692, section 4.1 (drawn anew each time). Wettig et al. 2023, arXiv:2202.08005: more than
15 % can be better. Not done: spans (SpanBERT), n-grams.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelwright.base.errors import ConfigError
from modelwright.data.pack import IGNORED

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MaskingConfig:
    """How tokens are hidden."""

    fraction: float = 0.15  # of the ordinary tokens of a text that are predicted
    mask_fraction: float = 0.8  # of these that become the mask token
    random_fraction: float = 0.1  # of these that become a random token; the rest stays
    whole_words: bool = False  # hide all pieces of a word or none

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ConfigError(f"masking.fraction is {self.fraction}; it must lie between 0 and 1.")
        parts = (self.mask_fraction, self.random_fraction)
        if min(parts) < 0 or sum(parts) > 1:
            raise ConfigError(
                f"masking.mask_fraction is {parts[0]} and random_fraction {parts[1]}; expected parts of at most 1."
            )


def mask_tokens(
    ids: Sequence[int],
    words: Sequence[int | None],
    mask_id: int,
    ordinary: Ids,
    config: MaskingConfig,
    random: np.random.Generator,
) -> tuple[Ids, Ids]:
    """Return what the model sees and what it must predict, `IGNORED` where nothing is hidden.

    Args:
        ids: Token ids of one text.
        words: The number of the word that each token is a piece of; None: a special token, never hidden.
        mask_id: The mask token.
        ordinary: Ids that a random token is drawn from.
        config: How much of what.
        random: Where the draws come from; the same state gives the same result.

    >>> random = np.random.default_rng(0)
    >>> seen, labels = mask_tokens([5, 6, 7, 8], [0, 0, 1, 2], 1, np.array([9]), MaskingConfig(0.5), random)
    >>> int((labels >= 0).sum())
    2
    """
    seen = np.array(ids, dtype=np.int64)
    labels = np.full(len(seen), IGNORED, dtype=np.int64)
    places = np.array([i for i, word in enumerate(words) if word is not None], dtype=np.int64)
    if not len(places):
        return seen, labels
    count = max(1, round(len(places) * config.fraction))
    if config.whole_words:
        hidden = _whole_words(places, words, count, random)
    else:
        hidden = random.permutation(places)[:count]
    labels[hidden] = seen[hidden]
    hidden = random.permutation(hidden)
    # A rounded count for each fate; what is left over of a short text goes by chance, so that no fate never happens.
    edges = np.cumsum([config.mask_fraction, config.random_fraction]) * len(hidden) + random.random()
    first, second = (min(len(hidden), int(edge)) for edge in edges)
    seen[hidden[:first]] = mask_id
    seen[hidden[first:second]] = random.choice(ordinary, second - first)
    return seen, labels


def _whole_words(places: Ids, words: Sequence[int | None], count: int, random: np.random.Generator) -> Ids:
    """Take words in random order while their pieces fit into ``count``; the first always fits."""
    pieces: dict[int, list[int]] = {}
    for place in places:
        word = words[place]
        assert word is not None
        pieces.setdefault(word, []).append(int(place))
    taken: list[int] = []
    for number in random.permutation(len(pieces)):
        word_places = list(pieces.values())[number]
        if not taken or len(taken) + len(word_places) <= count:
            taken += word_places
        if len(taken) >= count:
            break
    return np.array(taken, dtype=np.int64)
