"""From a `SpeculationConfig` to the proposer that guesses for an engine."""

from typing import Any

from modelwright.base.errors import ConfigError
from modelwright.engine.draft import DraftProposer, first_layers, open_draft
from modelwright.engine.medusa import HeadsProposer
from modelwright.engine.recurrent import is_recurrent
from modelwright.engine.speculative import NgramProposer, Proposer, SpeculationConfig
from modelwright.models.multi_token import load_heads
from modelwright.tokenizer.bpe import Tokenizer


def make_proposer(
    config: SpeculationConfig, model: Any, tokenizer: Tokenizer | None, *, block_size: int, num_blocks: int
) -> Proposer:
    """Return the proposer of an engine.

    Args:
        config: Which, and how long its drafts are.
        model: The served model.
        tokenizer: The served model's.
        block_size: Positions in a block of the engine's cache; a drafting model's cache has the same blocks.
        num_blocks: Blocks of the engine's cache.

    Raises:
        ConfigError: What guesses does not go with the model, or keeps a recurrent state.
        CheckpointError: There are no heads in the folder.
    """
    if config.method == "ngram":
        return NgramProposer(config)
    if config.method == "medusa":
        if config.draft is None:
            raise ConfigError("speculation.method is 'medusa' and no heads are named. Give speculation.draft.")
        return HeadsProposer(config, load_heads(model, config.draft))
    if config.method == "early_exit":
        drafting = first_layers(model, config.num_layers)
    else:
        drafting = open_draft(config, model, tokenizer)
        if is_recurrent(drafting.cache_layout()):
            raise ConfigError(
                f"The drafting model is a {type(drafting).__name__}, whose recurrent state cannot go back behind a "
                "wrong guess. Draft with an attention model."
            )
    return DraftProposer(config, drafting, block_size=block_size, num_blocks=num_blocks)
