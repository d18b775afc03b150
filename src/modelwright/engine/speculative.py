"""Guessing the next tokens and having the model check several of them in one step.

A proposer writes a draft behind a request's last token. The step computes the draft's positions along with that token,
and the sampler draws at each of them as if nothing had been guessed: as long as the drawn token is the guessed one, the
next position is valid too. Because a draw depends on its own request, seed and position alone, the tokens are those
that would have come without speculation, at any temperature, and not only their distribution; where attention is
bitwise independent of the batch (`modelwright.engine.runner`), the log-probabilities are too.

Here: n-gram lookup, which guesses that what followed the last few tokens before will follow again. Quotes from the
prompt, code and lists are where that is right.

Source: Leviathan et al. 2023, arXiv 2211.17192 (drafts checked in one step); Saxena 2023, "Prompt lookup decoding".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from modelwright.base.errors import ConfigError
from modelwright.engine.request import Request


@dataclass(frozen=True)
class SpeculationConfig:
    """How drafts are made."""

    method: str = "ngram"  # ngram: look the last tokens up in the request's own text
    max_draft: int = 8  # tokens guessed at once at most
    max_ngram: int = 4  # of the last tokens, so many are looked up at first
    min_ngram: int = 2  # and so many at last

    def __post_init__(self) -> None:
        if self.method not in PROPOSERS:
            raise ConfigError(f"speculation.method is {self.method!r}; known: {', '.join(PROPOSERS)}.")
        if not (1 <= self.min_ngram <= self.max_ngram and 1 <= self.max_draft <= 64):
            raise ConfigError(
                f"speculation looks up {self.min_ngram} to {self.max_ngram} tokens and drafts {self.max_draft}; "
                "the first may not exceed the second, and a draft has 1 to 64 tokens."
            )


class Proposer(Protocol):
    """Anything that guesses."""

    def propose(self, request: Request, limit: int) -> list[int]:
        """Return at most ``limit`` tokens that may follow the request's last one; none is a good answer too."""
        ...

    def learn(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """Hear how a draft fared."""
        ...

    def forget(self, request: Request) -> None:
        """Drop what is kept for a request that has ended."""
        ...


@dataclass
class _Lookup:
    """The n-grams of one request: where each was seen last, before its present end."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram -> index of the token after it
    num_indexed: int = 0  # tokens whose n-grams are in `ends`
    length: int = 4  # of the next draft
    num_idle: int = 0  # steps to sit out after drafts that failed
    num_failed: int = 0  # drafts in a row of which nothing was right


class NgramProposer:
    """Looks the last tokens up in the prompt and the completion so far, the longest n-gram first.

    A draft that is right in full doubles the next one's length, one that is wrong halves it; drafts that fail one after
    the other are given up for 1, 2, 4 ... steps, so that text without repetitions costs next to nothing.
    """

    def __init__(self, config: SpeculationConfig):
        self.config = config
        self._lookups: dict[int, _Lookup] = {}

    def propose(self, request: Request, limit: int) -> list[int]:
        """Return the tokens that followed the last ones before."""
        lookup = self._lookups.setdefault(request.id, _Lookup(length=min(4, self.config.max_draft)))
        tokens = request.token_ids
        self._index(lookup, tokens)
        if lookup.num_idle > 0:
            lookup.num_idle -= 1
            return []
        for size in range(self.config.max_ngram, self.config.min_ngram - 1, -1):
            if len(tokens) <= size:
                continue
            start = lookup.ends.get(tuple(tokens[-size:]))
            if start is not None:
                return tokens[start : start + min(lookup.length, limit)]
        return []

    def learn(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """Make the next draft longer or shorter, or pause."""
        lookup = self._lookups.get(request.id)
        if lookup is None:
            return
        if num_accepted == num_drafted:
            lookup.length = min(2 * lookup.length, self.config.max_draft)
        else:
            lookup.length = max(1, num_accepted, lookup.length // 2)
        lookup.num_failed = 0 if num_accepted else lookup.num_failed + 1
        if lookup.num_failed > 1:
            lookup.num_idle = min(2 ** (lookup.num_failed - 2), 16)

    def forget(self, request: Request) -> None:
        """Drop the n-grams of a request that has ended."""
        self._lookups.pop(request.id, None)

    def _index(self, lookup: _Lookup, tokens: Sequence[int]) -> None:
        """Note every n-gram that has a token after it."""
        for end in range(max(lookup.num_indexed, self.config.min_ngram), len(tokens)):
            for size in range(self.config.min_ngram, min(self.config.max_ngram, end) + 1):
                lookup.ends[tuple(tokens[end - size : end])] = end
        lookup.num_indexed = len(tokens)


PROPOSERS = {"ngram": NgramProposer}
