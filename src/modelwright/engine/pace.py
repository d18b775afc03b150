"""Whether guessing pays: measured while serving, so that speculation is never much slower than none.

Steps that only decode are timed, those with drafts and those without, for about equal numbers of requests. Drafts go on
while they bring more tokens a second; where they do not, they rest for 128 such steps, then for twice as many after
each trial of `TRIAL` steps that fails. So a useless proposer costs `TRIAL` steps in 128, then in 256, 512 and so on.
A proposer that has paid is judged by its last forty steps or so, since a few unlucky ones tell little.
Which steps have drafts never changes a token, only when it comes.
"""

from dataclasses import dataclass

TRIAL = 4  # steps with drafts in a trial
NUM_PLAIN = 3  # steps without, before the first trial and again after every REFRESH
REFRESH = 256
FIRST_REST, LONGEST_REST = 128, 4096
MARGIN = 1.03  # drafts must bring so much more than none
MEMORY = 0.9  # of what a proposer brought until now, when the next `TRIAL` steps are judged
WEIGHT = 0.2  # of the newest step in the running means


@dataclass
class _Load:
    """What was measured with about so many requests."""

    num_plain: int = 0
    plain: float = 0.0  # tokens a second without drafts
    num_drafted: int = 0  # steps in the present trial, or since it went well
    tokens: float = 0.0
    seconds: float = 0.0
    num_resting: int = 0
    rest: int = FIRST_REST


class Pace:
    """Says whether the next step may have drafts."""

    def __init__(self) -> None:
        self._loads: dict[int, _Load] = {}

    def may_draft(self, num_requests: int) -> bool:
        """Tell whether a step of so many requests may guess."""
        load = self._load(num_requests)
        return load.num_plain >= NUM_PLAIN and load.num_resting == 0

    def note(self, num_requests: int, num_tokens: int, seconds: float, has_drafts: bool) -> None:
        """Take in a step that only decoded: the tokens it brought and how long it took, guessing included."""
        load, speed = self._load(num_requests), num_tokens / max(seconds, 1e-9)
        if not has_drafts:
            load.num_plain += 1
            # The first steps may still warm up: the best of them counts.
            load.plain = max(load.plain, speed) if load.num_plain <= NUM_PLAIN else _mean(load.plain, speed)
            load.num_resting = max(0, load.num_resting - 1)
            return
        load.num_drafted += 1
        load.tokens += num_tokens
        load.seconds += seconds
        if load.num_drafted % TRIAL:
            return
        if load.tokens / load.seconds < MARGIN * load.plain:
            load.num_resting, load.rest = load.rest, min(2 * load.rest, LONGEST_REST)
            load.num_drafted = 0
            load.tokens = load.seconds = 0.0
            return
        load.rest = max(FIRST_REST, load.rest // 2)
        load.tokens, load.seconds = MEMORY * load.tokens, MEMORY * load.seconds
        if load.num_drafted >= REFRESH:
            load.num_drafted = load.num_plain = 0

    def _load(self, num_requests: int) -> _Load:
        return self._loads.setdefault(num_requests.bit_length(), _Load())


def _mean(old: float, new: float) -> float:
    return (1 - WEIGHT) * old + WEIGHT * new
