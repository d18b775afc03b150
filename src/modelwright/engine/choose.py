"""Several completions of one prompt, asked for at once from whoever completes: draws, the best of many, beams.

For callers that wait in an event loop; `modelwright.engine.llm` does the same step by step.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from modelwright.base.types import Completion, SamplingParams
from modelwright.engine.beam import BeamSearch, best_completions, search_completions, step_params
from modelwright.engine.engine import Engine

Complete = Callable[[Sequence[int], SamplingParams, dict[str, str] | None], Awaitable[Completion]]


async def complete_all(
    complete: Complete,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    engine: Engine,
    tags: dict[str, str] | None = None,
) -> list[Completion]:
    """Return the ``n`` completions of a prompt; when one fails or the task is cancelled, all end.

    Args:
        complete: Draws one completion.
        prompt_ids: Token ids.
        params: With `n`, `best_of` or `beam_width`.
        engine: Whose limits and stop tokens count.
        tags: Passed on.

    Raises:
        RequestError: The prompt or the settings are wrong.
    """
    if params.beam_width is None:
        return best_completions(await _together(complete, [(prompt_ids, one) for one in params.split()], tags), params)
    request = engine.check(prompt_ids, params, tags)
    search = BeamSearch(params, request.stop_ids, request.max_tokens)
    one_step = step_params(params, search.num_alternatives)
    cached: int | None = None
    while not search.is_done:
        asked = [((*request.prompt_ids, *beam.token_ids), one_step) for beam in search.open]
        done = await _together(complete, asked, tags)
        cached = done[0].usage.cached_tokens if cached is None else cached
        search.extend([completion.top_logprobs[0] for completion in done if completion.top_logprobs])
    decode = engine.tokenizer.decode if engine.tokenizer is not None else None
    return search_completions(search, len(request.prompt_ids), cached or 0, decode)


async def _together(
    complete: Complete, asked: Sequence[tuple[Sequence[int], SamplingParams]], tags: dict[str, str] | None
) -> list[Completion]:
    tasks = [asyncio.ensure_future(complete(ids, params, tags)) for ids, params in asked]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
