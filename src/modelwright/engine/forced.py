"""Jump-forward decoding: what a form leaves no choice about is guessed and checked in one step.

The keys, quotes and brackets of a JSON Schema are known before the model says them. Where a request's grammar knows
the next bytes, their tokens are its draft, and the step checks them as it checks every draft
(`modelwright.engine.speculative`): each is drawn from the model's own logits under the grammar's mask, which allows one
spelling of forced bytes. So tokens and log-probabilities are those that come without this, in fewer steps. Where
nothing is forced, the engine's other proposer guesses, cut off where its guess leaves the form.

Source: Zheng et al. 2024, arXiv 2312.07104, section 4 (compressed finite state machines, there without a check).
"""

from typing import Any

from modelwright.engine.request import Request
from modelwright.engine.speculative import Lengths, Proposer

MAX_FORCED = 32  # tokens checked at once


class ForcedProposer:
    """Guesses what the request's grammar forces, and asks another proposer where it forces nothing.

    Where bans and biases of the request stand against what is forced, guessing rests for some steps after three drafts
    that failed, as it does for other proposers.
    """

    def __init__(self, other: Proposer | None = None):
        self.other = other
        self._lengths = Lengths(MAX_FORCED)
        self._open: set[int] = set()  # requests whose present draft is a forced one

    @property
    def wants_hidden(self) -> bool:
        """True when the other proposer looks at hidden states."""
        return bool(getattr(self.other, "wants_hidden", False))

    def see(self, request: Request, hidden: Any) -> None:
        """Show the other proposer the state that the request's last token was drawn from."""
        self.other.see(request, hidden)  # type: ignore[union-attr]

    def propose(self, request: Request, limit: int) -> list[int]:
        """Return at most ``limit`` tokens that must or may follow the request's last one."""
        grammar = request.grammar
        if grammar is not None:
            forced = grammar.forced()[:limit]
            # A draft of one token saves a step as well as a long one does.
            if forced and self._lengths.next_length(request.id):
                self._open.add(request.id)
                return forced[:MAX_FORCED]
        if self.other is None:
            return []
        draft = self.other.propose(request, limit)
        return draft if grammar is None else draft[: grammar.num_valid(draft)]

    def learn(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """Pass on how a draft fared."""
        if request.id in self._open:
            self._open.discard(request.id)
            self._lengths.learn(request.id, num_drafted, num_accepted)
        elif self.other is not None:
            self.other.learn(request, num_drafted, num_accepted)

    def forget(self, request: Request) -> None:
        """Drop what is kept for a request that has ended."""
        self._open.discard(request.id)
        self._lengths.forget(request.id)
        if self.other is not None:
            self.other.forget(request)
