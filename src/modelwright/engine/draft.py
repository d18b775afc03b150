"""Guesses by a model: a smaller one beside the served one, or the served one's own first layers.

The drafting model keeps keys and values of its own, in a small paged pool. It draws with the noise of the request's
own seed and position, so that at any temperature it picks the token that the served model picks wherever the two
distributions agree. What it guesses is checked as every draft is (`modelwright.engine.speculative`).

Source: Leviathan et al. 2023, arXiv 2211.17192 (a smaller model drafts); Zhang et al. 2023, arXiv 2309.08168
("Draft & Verify": the model itself with layers left out). Their rejection sampling is replaced by equal noise.
"""

import copy
from pathlib import Path
from typing import Any

from torch import nn

from modelwright.base.errors import ConfigError
from modelwright.engine.gpu import make_runner
from modelwright.engine.kv_cache import BlockPool
from modelwright.engine.request import Request
from modelwright.engine.sampler import Draw, sample
from modelwright.engine.scheduler import Chunk
from modelwright.engine.speculative import Lengths, SpeculationConfig
from modelwright.models.weights import load_model
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.formats import load_tokenizer


class DraftProposer:
    """Has a model continue the request's text.

    Args:
        config: How long drafts may be.
        model: A causal model with the served one's vocabulary.
        block_size: Positions in a block of its cache.
        num_blocks: Blocks of its cache.
    """

    def __init__(self, config: SpeculationConfig, model: Any, *, block_size: int, num_blocks: int):
        self.config = config
        self.runner = make_runner(model, num_blocks=num_blocks, block_size=block_size, max_rows=1)
        self.pool = BlockPool(num_blocks, block_size, has_prefix_cache=False)
        self.max_seq_len: int = model.config.max_seq_len
        self._shadows: dict[int, Request] = {}
        self._lengths = Lengths(config.max_draft)

    def propose(self, request: Request, limit: int) -> list[int]:
        """Return at most ``limit`` tokens that the drafting model would go on with; none where it has no room."""
        count = min(limit, self._lengths.next_length(request.id))
        end = request.num_tokens + count
        if count < 1 or end > self.max_seq_len:
            return []
        shadow = self._shadows.get(request.id)
        if shadow is None:
            shadow = Request(request.id, request.prompt_ids, request.params, request.max_tokens)
            self._shadows[request.id] = shadow
        missing = -(-end // self.pool.block_size) - len(shadow.block_table)
        if missing > 0:
            if not self.pool.can_take(missing):
                return []
            shadow.block_table += self.pool.take(missing)
        _agree(shadow, request)
        draft: list[int] = []
        while len(draft) < count:
            token = self._next(shadow, request)
            draft.append(token)
            shadow.token_ids.append(token)
            if token in request.stop_ids:
                break
        return draft

    def _next(self, shadow: Request, request: Request) -> int:
        while True:
            num_tokens = min(shadow.num_tokens - shadow.num_computed, self.max_seq_len)
            chunk = Chunk(shadow, shadow.num_computed, num_tokens)
            logits = self.runner.run([chunk])
            shadow.num_computed = chunk.end
            if chunk.reaches_end:
                break
        draw = Draw(
            request.params,
            request.seed,
            shadow.num_tokens,
            prompt_ids=request.prompt_ids,
            output_ids=shadow.token_ids[len(request.prompt_ids) :],
            bad_words=request.bad_words,
        )
        return sample(logits[-1:], [draw])[0].token

    def learn(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """Make the next draft longer or shorter."""
        self._lengths.learn(request.id, num_drafted, num_accepted)

    def forget(self, request: Request) -> None:
        """Free the blocks of a request that has ended."""
        self._lengths.forget(request.id)
        shadow = self._shadows.pop(request.id, None)
        if shadow is not None:
            self.pool.release(shadow.block_table)


def _agree(shadow: Request, request: Request) -> None:
    """Give the shadow the request's tokens, and forget what was computed of wrong guesses."""
    # Only the tail can differ: what was confirmed stays.
    at = min(shadow.num_computed, request.num_tokens - 1)
    known, tokens = shadow.token_ids, request.token_ids
    first = len(request.prompt_ids)
    same = next((i for i in range(min(first, at), at) if known[i] != tokens[i]), at)
    shadow.num_computed = same
    shadow.token_ids = list(tokens)


def first_layers(model: Any, num_layers: int | None) -> Any:
    """Return the model cut off after its first layers, with its own norm and output matrix; the weights are shared.

    Raises:
        ConfigError: It has no more layers than that.
    """
    total = len(model.layers)
    num_layers = num_layers or max(1, total // 3)
    if not 1 <= num_layers < total:
        raise ConfigError(
            f"speculation.num_layers is {num_layers} and the model has {total} layers; drafts need 1 to {total - 1}."
        )
    view = copy.copy(model)
    view._modules = dict(model._modules)
    view.layers = nn.ModuleList(list(model.layers[:num_layers]))
    layout = model.cache_layout()[:num_layers]
    view.cache_layout = lambda: layout
    return view


def open_draft(config: SpeculationConfig, served: Any, tokenizer: Tokenizer | None) -> Any:
    """Load the drafting model of a folder, or take the one given, and check that it speaks the same tokens.

    Raises:
        ConfigError: There is none, or its tokens are others.
    """
    if config.draft is None:
        raise ConfigError("speculation.method is 'draft' and no model drafts. Give speculation.draft, a folder.")
    model = config.draft
    if not isinstance(model, nn.Module):
        folder = Path(model)
        weight = next(p for p in served.parameters() if p.is_floating_point())
        model = load_model(folder, dtype=weight.dtype, device=weight.device).eval()
        if tokenizer is not None:
            _check_tokens(tokenizer, load_tokenizer(folder), folder)
    if model.config.vocab_size != served.config.vocab_size:  # type: ignore[union-attr]
        raise ConfigError(
            f"The drafting model has {model.config.vocab_size} tokens and the served one "  # type: ignore[union-attr]
            f"{served.config.vocab_size}; they must be the same tokens. Draft with a model of the same tokenizer."
        )
    return model


def _check_tokens(tokenizer: Tokenizer, other: Tokenizer, folder: Path) -> None:
    is_same = (tokenizer.vocab_size, tokenizer.special_ids) == (other.vocab_size, other.special_ids)
    if not is_same or any(tokenizer.token_bytes(i) != other.token_bytes(i) for i in range(tokenizer.vocab_size)):
        raise ConfigError(
            f"The tokenizer of the drafting model in {folder} has {other.vocab_size} tokens, not those of the served "
            f"one, which has {tokenizer.vocab_size}. Draft with a model of the same tokenizer."
        )
