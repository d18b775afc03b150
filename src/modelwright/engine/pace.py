"""Whether guessing pays: an account of what it has cost, so that speculation is never much slower than none.

Steps that only decode are timed, those with drafts and those without, for about equal numbers of requests. The account
is in seconds: every such step earns `BUDGET` of its time, or less, the more drafted steps have lost since one paid. A
step with drafts pays what it took beyond the time that its tokens take without, or is paid what it saved. It may have
drafts while the account holds what such a step loses of which no guess is right. So, whatever is guessed and however
often it is right, at every moment

    seconds <= (the seconds of the same tokens without drafts) / (1 - BUDGET) + one step's surprise,

where the surprise is what a single drafted step took beyond the foreseen. What was saved is kept up to `RESERVE` such
losses: so many unlucky steps do not stop a proposer that pays on the whole, and no more are lost when it ceases to.
Which steps have drafts never changes a token, only when it comes.
"""

from dataclasses import dataclass

BUDGET = 0.025  # of the time of steps may be lost by guessing
PATIENCE = 8  # after so many drafted steps that lost, half of it, and so on
RESERVE = 12  # drafted steps of which nothing is right, paid from what was saved
NUM_PLAIN = 3  # steps without drafts before the first, and again after every REFRESH with
REFRESH = 256
FIRST_RISK = 0.5  # what a drafted step is thought to lose before one was seen, in steps without drafts
LEAST_RISK = 0.05
WEIGHT = 0.1  # of the newest step in the running means
LONGEST = 2.0  # a step without drafts that took so many times the mean was disturbed, and counts as this


@dataclass
class _Load:
    """What was measured with about so many requests."""

    num_plain: int = 0
    plain: float = 0.0  # seconds a token without drafts
    risk: float = 0.0  # tokens' worth of time that a drafted step loses, of each request, if nothing is right
    num_drafted: int = 0  # steps, since the last ones without drafts were timed
    num_lost: int = 0  # drafted steps that did not pay; those that do halve it


class Pace:
    """Says whether the next step may have drafts."""

    def __init__(self) -> None:
        self.account = 0.0  # seconds
        self._loads: dict[int, _Load] = {}

    def may_draft(self, num_requests: int) -> bool:
        """Tell whether a step of so many requests may guess."""
        load = self._load(num_requests)
        return load.num_plain >= NUM_PLAIN and self.account >= self._loss(load, num_requests)

    def note(self, num_requests: int, num_tokens: int, seconds: float, has_drafts: bool) -> None:
        """Take in a step that only decoded: the tokens it brought and how long it took, guessing included."""
        load = self._load(num_requests)
        if not has_drafts and load.num_plain >= NUM_PLAIN:
            seconds = min(seconds, LONGEST * load.plain * num_tokens)
        self.account += BUDGET * seconds / (1 + load.num_lost / PATIENCE)
        if has_drafts:
            self._note_drafted(load, num_requests, num_tokens, seconds)
        else:
            self._note_plain(load, seconds / max(1, num_tokens))
        self.account = min(self.account, RESERVE * self._loss(load, num_requests))

    def note_mixed(self, num_requests: int) -> None:
        """Take in a step with drafts that read prompts too, so that its time says nothing: as if none was right."""
        self.account -= self._loss(self._load(num_requests), num_requests)

    def _note_plain(self, load: _Load, each: float) -> None:
        load.num_plain += 1
        if load.num_plain == 1 and load.plain == 0.0:
            load.plain = each
        elif load.num_plain <= NUM_PLAIN:  # the first steps may still warm up: the best of them counts
            load.plain = min(load.plain, each)
        else:
            load.plain += WEIGHT * (each - load.plain)

    def _note_drafted(self, load: _Load, num_requests: int, num_tokens: int, seconds: float) -> None:
        saved = num_tokens * load.plain - seconds
        self.account += saved
        load.num_lost = load.num_lost // 2 if saved > 0 else load.num_lost + 1
        found = max(LEAST_RISK, seconds / (num_requests * load.plain) - 1) if load.plain else FIRST_RISK
        load.risk = found if load.risk == 0.0 else load.risk + WEIGHT * (found - load.risk)
        load.num_drafted += 1
        if load.num_drafted >= REFRESH:
            load.num_drafted = load.num_plain = 0

    def _loss(self, load: _Load, num_requests: int) -> float:
        """Return the seconds that a drafted step is thought to lose if nothing is right."""
        return (load.risk or FIRST_RISK) * load.plain * num_requests

    def _load(self, num_requests: int) -> _Load:
        return self._loads.setdefault(num_requests.bit_length(), _Load())
