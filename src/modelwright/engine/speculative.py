"""Guessing the next tokens and having the model check several of them in one step.

A proposer writes a draft behind a request's last token. The step computes the draft's positions along with that token,
and the sampler draws at each of them as if nothing had been guessed: as long as the drawn token is the guessed one, the
next position is valid too. Because a draw depends on its own request, seed and position alone, the tokens are those
that would have come without speculation, at any temperature, and not only their distribution; where attention is
bitwise independent of the batch (`modelwright.engine.runner`), the log-probabilities are too.

Other guessers: `modelwright.engine.draft` (a model, or the served one's first layers), `modelwright.engine.medusa`.
Here: n-gram lookup, which guesses that what followed the last few tokens before will follow again. Quotes from the
prompt, code and lists are where that is right.

Source: Leviathan et al. 2023, arXiv 2211.17192 (drafts checked in one step); Saxena 2023, "Prompt lookup decoding".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from modelwright.base.errors import ConfigError
from modelwright.engine.request import Request

METHODS = ("ngram", "draft", "early_exit", "medusa")


@dataclass(frozen=True)
class SpeculationConfig:
    """How drafts are made."""

    method: str = "ngram"  # ngram (the request's own text), draft (a model), early_exit (first layers), medusa (heads)
    draft: Any = None  # draft: a folder or a model of the same tokens; medusa: the folder of the heads
    num_layers: int | None = None  # early_exit: layers that guess; None: a third of them
    is_timed: bool = True  # guessing rests where it is measured not to pay
    max_draft: int = 8  # tokens guessed at once at most
    max_ngram: int = 4  # of the last tokens, so many are looked up at first
    min_ngram: int = 2  # and so many at last

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"speculation.method is {self.method!r}; known: {', '.join(METHODS)}.")
        if self.draft is not None and self.method not in ("draft", "medusa"):
            raise ConfigError(f"speculation.draft is given, and {self.method!r} drafts by itself. Leave it out.")
        if self.num_layers is not None and self.method != "early_exit":
            raise ConfigError(f"speculation.num_layers is given, and the method is {self.method!r}. Leave it out.")
        if not (1 <= self.min_ngram <= self.max_ngram and 1 <= self.max_draft <= 64):
            raise ConfigError(
                f"speculation looks up {self.min_ngram} to {self.max_ngram} tokens and drafts {self.max_draft}; "
                "the first may not exceed the second, and a draft has 1 to 64 tokens."
            )


class Proposer(Protocol):
    """Anything that guesses; one with `wants_hidden` is also shown (`see`) the states that tokens are drawn from."""

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


class Lengths:
    """How many tokens the next draft of each request has, for proposers that can always guess.

    A draft that is right in full makes the next one two longer, one that is wrong as long as what was right of it and
    one more; drafts of which nothing is right, three in a row, are given up for 2, 4, 8 ... steps.
    """

    def __init__(self, longest: int):
        self.longest = longest
        self._kept: dict[int, _Lookup] = {}

    def next_length(self, id: int) -> int:
        """Return the length of a request's next draft; 0 while it rests."""
        kept = self._kept.setdefault(id, _Lookup(length=min(4, self.longest)))
        if kept.num_idle > 0:
            kept.num_idle -= 1
            return 0
        return kept.length

    def learn(self, id: int, num_drafted: int, num_accepted: int) -> None:
        """Take in how a draft fared."""
        kept = self._kept.get(id)
        if kept is None:
            return
        is_right = num_accepted == num_drafted
        kept.length = min(self.longest, kept.length + 2 if is_right else num_accepted + 1)
        kept.num_failed = 0 if num_accepted else kept.num_failed + 1
        if kept.num_failed > 2:
            kept.num_idle = min(2 ** (kept.num_failed - 2), 16)

    def forget(self, id: int) -> None:
        """Drop a request that has ended."""
        self._kept.pop(id, None)


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
