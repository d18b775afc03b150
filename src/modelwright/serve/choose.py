"""The best of many draws and the beams of a search, as streams of pieces like any other answer.

Which completions are the best is known when all are whole, so each choice comes in one piece.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

from modelwright.base.types import Completion
from modelwright.serve.served import Piece, Token
from modelwright.tokenizer.bpe import Tokenizer


class Chosen:
    """Completions that are computed together when the first of them is asked for."""

    def __init__(self, compute: Callable[[], Awaitable[list[Completion]]]):
        self._compute = compute
        self._task: asyncio.Future[list[Completion]] | None = None

    async def pieces(
        self, index: int, tokenizer: Tokenizer, shown: Mapping[int, str] | None, has_tokens: bool
    ) -> AsyncGenerator[Piece, None]:
        """Yield one completion, best first by ``index``; closing any of them ends the work for all."""
        if self._task is None:
            self._task = asyncio.ensure_future(self._compute())
        try:
            done = await asyncio.shield(self._task)
        except BaseException:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._task
            raise
        found = done[index]
        tokens: tuple[Token, ...] = ()
        if has_tokens:
            top = found.top_logprobs or ((),) * len(found.token_ids)
            told = zip(found.token_ids, found.logprobs or (), top, strict=True)
            tokens = tuple(Token(i, p, t) for i, p, t in told)
        text = spoken(tokenizer, found, shown)
        yield Piece(text, found.finish_reason, found.usage, tokens=tokens, token_ids=found.token_ids)


def spoken(tokenizer: Tokenizer, completion: Completion, shown: Mapping[int, str] | None) -> str:
    """Return the text of a completion with the special tokens that are to be seen."""
    if not shown or not any(token in shown for token in completion.token_ids):
        return completion.text
    parts: list[str] = []
    plain: list[int] = []
    for token in (*completion.token_ids, None):
        if token is None or token in shown:
            parts += [tokenizer.decode(plain), shown.get(token, "") if token is not None else ""]
            plain = []
        else:
            plain.append(token)
    return "".join(parts)
