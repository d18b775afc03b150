"""Guesses by heads on the served model itself: each reads the last hidden state and says the token one further on.

The state is the one that the next token was drawn from, so guessing costs one small layer and one output matrix a
head, and no second model. The heads are those of `modelwright.models.multi_token`, trained beside or after the model.

Source: Cai et al. 2024, "Medusa", arXiv 2401.10774, section 2.1; of its trees of guesses one branch is taken here.
"""

import torch
from torch import Tensor

from modelwright.engine.request import Request
from modelwright.engine.sampler import Draw, sample
from modelwright.engine.speculative import Lengths, SpeculationConfig
from modelwright.models.multi_token import MultiTokenDecoder


class HeadsProposer:
    """Guesses as many tokens as there are heads."""

    wants_hidden = True

    def __init__(self, config: SpeculationConfig, model: MultiTokenDecoder):
        self.heads, self.lm_head = model.heads, model.decoder.lm_head
        self._hidden: dict[int, tuple[int, Tensor]] = {}  # request -> its length at the draw, the state drawn from
        self._lengths = Lengths(min(config.max_draft, len(self.heads)))

    def see(self, request: Request, hidden: Tensor) -> None:
        """Keep the state (D,) that the request's last token was drawn from."""
        self._hidden[request.id] = (request.num_tokens, hidden)

    @torch.inference_mode()
    def propose(self, request: Request, limit: int) -> list[int]:
        """Return the heads' tokens behind the last one, drawn with the noise of their positions."""
        count = min(limit, self._lengths.next_length(request.id))
        seen = self._hidden.get(request.id)
        if count < 1 or seen is None or seen[0] != request.num_tokens:
            return []
        states = torch.stack([head(seen[1]) for head in self.heads[:count]])  # (C, D)
        logits = self.lm_head(states[None])[0]  # (C, V)
        draft: list[int] = []
        for row in logits:
            draw = Draw(
                request.params,
                request.seed,
                request.num_tokens + len(draft),
                prompt_ids=request.prompt_ids,
                output_ids=(*request.output_ids, *draft),
                bad_words=request.bad_words,
            )
            draft.append(sample(row[None], [draw])[0].token)
            if draft[-1] in request.stop_ids:
                break
        return draft

    def learn(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """Make the next draft longer or shorter."""
        self._lengths.learn(request.id, num_drafted, num_accepted)

    def forget(self, request: Request) -> None:
        """Drop what is kept for a request that has ended."""
        self._lengths.forget(request.id)
        self._hidden.pop(request.id, None)
