"""Beam search: the likeliest whole completions, kept several at a time, and the best of several draws.

A step asks the engine for one token behind every open beam, with the likeliest alternatives, so beams are ordinary
requests: they share the prompt's blocks through the prefix cache, are preempted and aborted like any other, and run
beside other people's requests. `BeamSearch` itself holds no engine: it says which sequences to go on from and is told
what may follow.

The rules are those of transformers 5 (`_beam_search`): of the continuations, the best `width` that end are finished,
and the best `width` that do not go on; a score is the sum of log-probabilities over length ** `length_penalty`, end
token counted; the search ends when the best open beam, at its present length, is no better than the worst of `width`
finished ones, or with `early_stopping` as soon as there are `width` of them.
Source: Wu et al. 2016, arXiv 1609.08144, section 7 (length penalty, without its constant 5).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from modelwright.base.errors import RequestError
from modelwright.base.types import Completion, FinishReason, SamplingParams, TopLogprobs, Usage

Alternatives = TopLogprobs  # what may follow a beam: token ids and log-probabilities, likeliest first


@dataclass(frozen=True)
class Beam:
    """A completion under way, or finished."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    score: float = 0.0  # the sum of the log-probabilities; of a finished beam, after the length penalty
    finish_reason: FinishReason | None = None


class BeamSearch:
    """The bookkeeping of one search.

    Args:
        params: With `beam_width`, `length_penalty` and `early_stopping`.
        stop_ids: Tokens that end a beam.
        max_tokens: Of a completion; what the context leaves.

    >>> search = BeamSearch(SamplingParams(beam_width=2), stop_ids={0}, max_tokens=2)
    >>> search.extend([((5, -0.1), (6, -2.0), (7, -3.0), (8, -4.0))])
    >>> [beam.token_ids for beam in search.open]
    [(5,), (6,)]
    >>> search.extend([((0, -3.0), (1, -4.0), (2, -5.0), (3, -6.0)), ((0, -0.1), (1, -4.0), (2, -5.0), (3, -6.0))])
    >>> search.is_done, [(beam.token_ids, round(beam.score, 2)) for beam in search.best(2)]
    (True, [((6, 0), -1.05), ((5, 0), -1.55)])
    """

    def __init__(self, params: SamplingParams, stop_ids: Sequence[int] | set[int] | frozenset[int], max_tokens: int):
        assert params.beam_width is not None
        self.width, self.params = params.beam_width, params
        self.stop_ids = frozenset() if params.ignore_eos else frozenset(stop_ids)
        self.max_tokens = max_tokens
        self.open: list[Beam] = [Beam()]
        self.finished: list[Beam] = []
        self.is_done = False

    @property
    def num_alternatives(self) -> int:
        """How many alternatives each open beam has to tell: enough that `width` of them all do not end."""
        return max(2, 1 + len(self.stop_ids)) * self.width

    def extend(self, alternatives: Sequence[Alternatives]) -> None:
        """Go one token on.

        Args:
            alternatives: What may follow each open beam, in order.
        """
        length = len(self.open[0].token_ids) + 1
        grown = [
            Beam((*beam.token_ids, token), (*beam.logprobs, logprob), beam.score + logprob)
            for beam, each in zip(self.open, alternatives, strict=True)
            for token, logprob in each
        ]
        grown.sort(key=lambda beam: -beam.score)  # stable: earlier beams and likelier tokens first among equals
        grown = grown[: self.num_alternatives]
        is_last = length >= self.max_tokens
        going: list[Beam] = []
        ending: list[Beam] = []
        for rank, beam in enumerate(grown):
            is_stop = beam.token_ids[-1] in self.stop_ids
            if is_stop or is_last:
                if rank < self.width:
                    ending.append(replace(beam, finish_reason="stop" if is_stop else "length"))
            elif len(going) < self.width:
                going.append(beam)
        is_full = len(self.finished) == self.width and self.params.early_stopping
        if not is_full:
            scored = [replace(beam, score=self._score(beam.score, length)) for beam in ending]
            self.finished = sorted([*self.finished, *scored], key=lambda beam: -beam.score)[: self.width]
        self.open = going
        self.is_done = not going or self._is_settled(length)

    def _score(self, total: float, length: int) -> float:
        return float(total / length**self.params.length_penalty)

    def _is_settled(self, length: int) -> bool:
        if len(self.finished) < self.width:
            return False
        return self.params.early_stopping or self._score(self.open[0].score, length) <= self.finished[-1].score

    def best(self, count: int) -> list[Beam]:
        """Return the best finished beams, best first."""
        return self.finished[:count]


def step_params(params: SamplingParams, num_alternatives: int) -> SamplingParams:
    """Return the settings of one step behind one beam: a token, greedily, and what else might follow."""
    return SamplingParams(
        temperature=0, max_tokens=1, ignore_eos=True, logprobs=num_alternatives, priority=params.priority
    )


def check_beams(params: SamplingParams, vocab_size: int, num_stop_ids: int) -> None:
    """Refuse settings that a beam search of this model cannot keep.

    Raises:
        RequestError: More alternatives are needed than there are tokens, or than the engine tells.
    """
    needed = max(2, 1 + num_stop_ids) * (params.beam_width or 1)
    if needed > min(vocab_size, 100):
        raise RequestError(
            f"beam_width is {params.beam_width}, which needs {needed} alternatives a beam; this model has {vocab_size} "
            f"tokens, {num_stop_ids} of which end a text, and at most 100 alternatives are told. Take fewer beams.",
            param="beam_width",
            code="invalid_value",
        )


def best_completions(completions: Sequence[Completion], params: SamplingParams) -> list[Completion]:
    """Return the ``n`` likeliest of ``best_of`` completions by mean log-probability; of equals the earlier draw.

    The tokens of those that are not shown were computed too, so they are in the usage of the first.
    """
    if params.best_of is None:
        return list(completions)
    ranked = sorted(completions, key=lambda c: -mean_logprob(c.logprobs or ()))[: params.n]
    spent = sum(c.usage.completion_tokens for c in completions)
    shown = sum(c.usage.completion_tokens for c in ranked[1:])
    return [replace(ranked[0], usage=replace(ranked[0].usage, completion_tokens=spent - shown)), *ranked[1:]]


def mean_logprob(logprobs: Sequence[float]) -> float:
    """Return the mean; of nothing, that of a sure thing."""
    return sum(logprobs) / len(logprobs) if logprobs else 0.0


def search_completions(
    search: BeamSearch, prompt_tokens: int, cached_tokens: int, decode: Callable[[list[int]], str] | None
) -> list[Completion]:
    """Return the ``n`` best beams as completions; a stop token has no text."""
    made = []
    for beam in search.best(search.params.n):
        spoken = [token for token in beam.token_ids if token not in search.stop_ids]
        usage = Usage(prompt_tokens, len(beam.token_ids), cached_tokens)
        text = decode(spoken) if decode is not None else ""
        made.append(Completion(text, beam.token_ids, beam.finish_reason or "length", usage, beam.logprobs))
    return made


def refuse_whole(params: SamplingParams) -> None:
    """Refuse to stream what is chosen among whole completions.

    Raises:
        RequestError: Always, for a beam search or `best_of`.
    """
    name = "beam_width" if params.beam_width is not None else "best_of"
    if getattr(params, name) is not None:
        raise RequestError(
            f"{name} is {getattr(params, name)} and the answer is asked for piece by piece; which one is best is known "
            "at the end. Ask for the whole answer, or leave it out.",
            param=name,
        )


def join_completions(completions: Sequence[Completion]) -> Completion:
    """Return the first with the others behind it."""
    return completions[0] if len(completions) == 1 else replace(completions[0], others=tuple(completions[1:]))
