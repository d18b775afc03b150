"""The model that answers from the documents: search and quoting in threads, pieces out, citations at the end.

The question is the last message of the user; earlier turns and a system message do not change the answer, and the
answer names the question that it is for. Quotes are not sampled, so in the extractive mode any temperature gives the
same answer, and settings that would cut a quote short are refused.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import Any

from modelwright.base.errors import RequestError
from modelwright.base.types import SamplingParams, Usage
from modelwright.rag.answer import Answer, stream_answer
from modelwright.rag.index import MAX_QUERY_CHARS
from modelwright.serve import fields
from modelwright.serve.served import Piece, Served

CUTTING = ("max_tokens", "max_completion_tokens", "stop", "ignore_eos")
GENERATED_TOKENS = 512  # an answer's length when the request does not say


async def answer_pieces(served: Served, body: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
    """Check a chat request to the documents and return the pieces of its answer."""
    question = _question(body)
    params = fields.sampling(body, fields.max_tokens(body) or GENERATED_TOKENS)
    if served.config.answer_mode == "extractive":
        for name in CUTTING:
            if body.get(name):
                message = f"{name} does not apply to exact quotes, which are whole or not given. Leave it out."
                raise RequestError(message, param=name, code="unsupported_parameter")
    return _pieces(served, question, params)


def _question(body: Mapping[str, Any]) -> str:
    turns = fields.messages(body)
    question = next((turn.content.strip() for turn in reversed(turns) if turn.role == "user"), "")
    if not question:
        raise RequestError("There is no question: no message of the user has text.", param="messages", code="empty")
    if len(question) > MAX_QUERY_CHARS:
        raise RequestError(
            f"The question has {len(question)} characters; the documents take at most {MAX_QUERY_CHARS}. Shorten it.",
            param="messages",
            code="context_length_exceeded",
        )
    return question


async def _pieces(served: Served, question: str, params: SamplingParams) -> AsyncGenerator[Piece, None]:
    texts = []
    async with contextlib.aclosing(in_thread(served, lambda: _answer(served, question, params))) as items:
        async for item in items:
            if isinstance(item, str):
                texts.append(item)
                yield Piece(item)
            else:
                usage = await asyncio.to_thread(_usage, served, question, "".join(texts))
                yield Piece("", "stop", usage, _extension(item, question))


def _answer(served: Served, question: str, params: SamplingParams) -> Iterator[str | Answer]:
    assert served.index is not None
    model = served.engine if served.config.answer_mode == "generated" else None
    return stream_answer(served.index, question, model=model, k=served.config.num_passages)


def _extension(answer: Answer, question: str) -> dict[str, Any]:
    return {
        "citations": [
            {"number": c.number, "doc": c.doc, "start": c.start, "end": c.end, "quote": c.quote}
            for c in answer.citations
        ],
        "mode": answer.mode,
        "is_supported": answer.is_supported,
        "question": question,
    }


def _usage(served: Served, question: str, text: str) -> Usage:
    if served.tokenizer is None:
        return Usage(0, 0)
    return Usage(len(served.tokenizer.encode(question)), len(served.tokenizer.encode(text)))


async def in_thread(served: Served, make: Callable[[], Iterator[Any]]) -> AsyncGenerator[Any, None]:
    """Yield the items of an iterator that is made and run in one of the server's threads.

    Closing this generator tells the thread to stop after its current item and to close the iterator; it does not wait
    for that. When all threads are taken, the iterator starts later.
    """
    loop = asyncio.get_running_loop()
    mail: asyncio.Queue[tuple[Any, BaseException | None, bool]] = asyncio.Queue()
    is_unwanted = threading.Event()

    def post(item: Any, error: BaseException | None = None, is_last: bool = False) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits
            loop.call_soon_threadsafe(mail.put_nowait, (item, error, is_last))

    def run() -> None:
        try:
            if not is_unwanted.is_set():
                with contextlib.closing(make()) as items:  # type: ignore[type-var]
                    for item in items:
                        if is_unwanted.is_set():
                            return
                        post(item)
            post(None, is_last=True)
        except BaseException as error:
            post(None, error)

    job = served.pool.submit(run)
    try:
        while True:
            item, error, is_last = await mail.get()
            if error is not None:
                raise error
            if is_last:
                return
            yield item
    finally:
        is_unwanted.set()
        job.cancel()
