"""How many blocks the key-value cache has: what was asked for, or what the memory holds and the requests can use."""

from typing import TYPE_CHECKING, Any

import torch

from modelwright.base.errors import ConfigError
from modelwright.engine.runner import Runner

if TYPE_CHECKING:
    from modelwright.engine.engine import EngineConfig

DEFAULT_KV_CACHE_BYTES = 256 * 2**20


def num_cache_blocks(model: Any, dtype: torch.dtype, config: "EngineConfig") -> int:
    """Return the blocks of the pool, the null block included.

    Raises:
        ConfigError: There is no room for two.
    """
    if config.num_blocks is not None:
        if config.num_blocks < 2:
            raise ConfigError(f"num_blocks is {config.num_blocks}; one is reserved, so it must be at least 2.")
        return config.num_blocks
    block_bytes = Runner.block_bytes(model, dtype, config.block_size, config.kv_dtype)
    budget = config.kv_cache_bytes or DEFAULT_KV_CACHE_BYTES
    if budget < 2 * block_bytes:
        raise ConfigError(
            f"kv_cache_bytes is {budget}; one block of this model takes {block_bytes} and two are needed at least. "
            "Give the cache more memory."
        )
    context = min(config.max_context or model.config.max_seq_len, model.config.max_seq_len)
    useful = config.max_running * -(-context // config.block_size) + 1
    if config.has_prefix_cache:
        useful *= 2  # room for prefixes that nobody holds
    return min(budget // block_bytes, useful) if block_bytes else useful
