"""The model that answers from the documents: search and quoting in threads, pieces out, citations at the end.

The question is the last message of the user; earlier turns and a system message do not change the answer, and the
answer names the question that it is for. Quotes are not sampled, so in the extractive mode any temperature gives the
same answer, and settings that would cut a quote short are refused.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from typing import Any

from modelwright.base.errors import RequestError
from modelwright.base.types import ChatModel, Completion, Delta, Message, SamplingParams, Usage
from modelwright.rag.answer import Answer, stream_answer
from modelwright.rag.index import MAX_QUERY_CHARS
from modelwright.serve import conversation, fields
from modelwright.serve.served import Piece, Served

CUTTING = ("max_tokens", "max_completion_tokens", "stop", "ignore_eos")
GENERATED_TOKENS = 512  # an answer's length when the request does not say


async def answer_pieces(served: Served, body: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
    """Check a chat request to the documents and return the pieces of its answer."""
    question = _question(body)
    params = fields.sampling(body, fields.max_tokens(body) or GENERATED_TOKENS, temperature=0.0)
    if served.config.answer_mode == "extractive":
        for name in CUTTING:
            if body.get(name):
                message = f"{name} does not apply to exact quotes, which are whole or not given. Leave it out."
                raise RequestError(message, param=name, code="unsupported_parameter")
    return _pieces(served, question, params)


def _question(body: Mapping[str, Any]) -> str:
    turns = conversation.messages(body)
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


class Recorder:
    """A `ChatModel` that passes everything on and remembers how the answer ended and what it cost."""

    def __init__(self, model: ChatModel):
        self.model = model
        self.last = Delta("")

    def chat(self, messages: Sequence[Message], params: SamplingParams) -> Completion:
        """Answer as a whole."""
        completion = self.model.chat(messages, params)
        self.last = Delta("", (), completion.finish_reason, completion.usage)
        return completion

    def stream(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[Delta]:
        """Answer piece by piece."""
        for delta in self.model.stream(messages, params):
            self.last = delta
            yield delta


async def _pieces(served: Served, question: str, params: SamplingParams) -> AsyncGenerator[Piece, None]:
    model = None
    if served.config.answer_mode == "generated":
        assert served.engine is not None
        model = Recorder(served.engine)
    index, k = served.index, served.config.num_passages
    assert index is not None
    texts = []
    run = in_thread(served, lambda: stream_answer(index, question, model=model, k=k, params=params))
    async with contextlib.aclosing(run) as items:
        async for item in items:
            if isinstance(item, str):
                texts.append(item)
                yield Piece(item)
                continue
            usage = model.last.usage if model is not None else None
            if usage is None:  # quoted, or not in the documents: no model was run
                usage = await asyncio.to_thread(_usage, served, question, "".join(texts))
            reason = (model.last.finish_reason if model is not None else None) or "stop"
            yield Piece("", reason, usage, _extension(item, question))


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
