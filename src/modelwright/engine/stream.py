"""`AsyncEngine`: the engine behind a server, one thread that steps and any number of callers that wait.

Callers hand over requests and aborts through a mailbox; the engine's thread reads it between steps, so that no block
is freed while a step writes it. Pieces travel back to each caller's own queue: an asyncio one, or a plain one for
callers in threads. Closing a stream aborts its request. If a step raises, every open request fails with the reason,
the engine is marked unhealthy and takes no more: it is never silently half alive.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from modelwright.base.errors import CapacityError, ModelwrightError, RequestError
from modelwright.base.logs import get_logger
from modelwright.base.types import Completion, Delta, Message, SamplingParams
from modelwright.engine.beam import join_completions, refuse_whole
from modelwright.engine.choose import complete_all
from modelwright.engine.engine import Engine, EngineConfig, EngineStats
from modelwright.engine.request import Answer, Piece, Request
from modelwright.engine.sight import Picture, read_chat
from modelwright.tokenizer.bpe import Tokenizer

Sink = Callable[[Piece], None]  # called from the engine's thread
log = get_logger(__name__)


class AsyncEngine:
    """Serves many callers at once; also a `ChatModel` for callers in threads.

    The thread starts with the first request, or with `start`. End it with `stop`, or use the engine as a context.

    Args:
        model: A folder, a loaded model, or an `Engine` that nobody else drives.
        tokenizer: None takes the folder's.
        config: Sizes and limits of the engine.
    """

    def __init__(
        self,
        model: str | Path | nn.Module | Engine,
        *,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
    ):
        self.engine = model if isinstance(model, Engine) else Engine(model, tokenizer=tokenizer, config=config)
        self.error: ModelwrightError | None = None  # why the engine is unhealthy
        self._wake = threading.Condition()  # guards the three below
        self._to_submit: list[tuple[Request, Sink]] = []
        self._to_abort: list[Request] = []
        self._is_stopping = False
        self._thread: threading.Thread | None = None
        self._sinks: dict[int, tuple[Request, Sink]] = {}  # the engine thread's own

    def __enter__(self) -> "AsyncEngine":
        self.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            RequestError: There is none.
        """
        if self.engine.tokenizer is None:
            raise RequestError("A conversation was given, and this engine has no tokenizer. Use token ids.")
        return self.engine.tokenizer

    @property
    def is_healthy(self) -> bool:
        """False once a step has failed or the engine was stopped."""
        return self.error is None and not self._is_stopping

    def start(self) -> None:
        """Start the engine's thread if it does not run yet."""
        with self._wake:
            if self._thread is None and not self._is_stopping:
                self._thread = threading.Thread(target=self._run, name="modelwright-engine", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step; open requests fail. Idempotent."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def stats(self) -> EngineStats:
        """Return the engine's counters; requests in the mailbox count as waiting."""
        return self.engine.stats(num_incoming=len(self._to_submit))

    def stream_tokens(
        self, prompt_ids: Sequence[int], params: SamplingParams, tags: dict[str, str] | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Complete a prompt piece by piece; closing the generator frees the request's blocks.

        The prompt is checked at once, before the first piece is asked for.

        Raises:
            RequestError: The prompt is empty, has an unknown id, or is longer than the context.
            CapacityError: Too many requests wait, or the engine has stopped.
        """
        return self._stream_async(self._check(prompt_ids, params, tags))

    def stream_pieces(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        tags: dict[str, str] | None = None,
        pictures: Sequence[Picture] = (),
        max_waiting: int | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """Complete a prompt piece by piece, each with its log-probabilities; otherwise as `stream_tokens`.

        Args:
            prompt_ids: As of `stream_tokens`, like the next two.
            params: How the completion is drawn.
            tags: What separates its prefix blocks from those of others.
            pictures: Of the prompt, in the order of their places.
            max_waiting: A limit of the caller's own, lower than the engine's; None: the engine's.
        """
        return self._pieces_async(self._check(prompt_ids, params, tags, pictures), max_waiting)

    async def complete_tokens(
        self, prompt_ids: Sequence[int], params: SamplingParams, tags: dict[str, str] | None = None
    ) -> Completion:
        """Complete a prompt as a whole; cancelling the task frees the request's blocks. Raises as `stream_tokens`.

        Of ``n`` > 1, `best_of` and a beam search the other completions stand in ``others``, best first.
        """
        return join_completions(await complete_all(self._complete_one, prompt_ids, params, self.engine, tags))

    async def choose(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        draw: Callable[[Sequence[int], SamplingParams], AsyncGenerator[Piece, None]],
    ) -> list[Completion]:
        """Return the ``n`` best completions of a prompt (`best_of`, `beam_width`), each drawn by the caller's means."""

        async def complete(ids: Sequence[int], one: SamplingParams, tags: dict[str, str] | None) -> Completion:
            answer = Answer()
            async with contextlib.aclosing(draw(ids, one)) as pieces:
                async for piece in pieces:
                    answer.add(piece)
            return answer.completion()

        return await complete_all(complete, prompt_ids, params, self.engine)

    async def _complete_one(
        self, prompt_ids: Sequence[int], params: SamplingParams, tags: dict[str, str] | None = None
    ) -> Completion:
        answer = Answer()
        async for piece in self._pieces_async(self._check(prompt_ids, params, tags)):
            answer.add(piece)
        return answer.completion()

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """Answer a conversation, from a thread other than the event loop's."""
        refuse_whole(params or SamplingParams())
        answer = Answer()
        for piece in self._pieces(self._check_chat(messages, params)):
            answer.add(piece)
        return answer.completion()

    def stream(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[Delta]:
        """Answer a conversation piece by piece, in a thread; closing the iterator frees the request's blocks."""
        request = self._check_chat(messages, params)
        return (piece.delta for piece in self._pieces(request))

    def _check(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        tags: dict[str, str] | None = None,
        pictures: Sequence[Picture] = (),
    ) -> Request:
        if not self.is_healthy:
            raise CapacityError(f"The engine takes no requests: {self.error or 'it was stopped'} Start it again.")
        refuse_whole(params)
        request = self.engine.check(prompt_ids, params, tags, pictures)
        self._check_room(self.engine.config.max_waiting)
        return request

    def _check_room(self, most: int) -> None:
        waiting = self.stats().waiting
        if waiting >= most:
            raise CapacityError(f"{waiting} requests are waiting, which is the limit. Try again later.")

    def read_chat(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), tokenizer: Tokenizer | None = None
    ) -> tuple[list[int], tuple[Picture, ...]]:
        """Return the token ids of a conversation that waits for its answer, and its pictures; raises as `read_chat`.

        Args:
            messages: The turns.
            tools: What the assistant may call.
            tokenizer: Whose chat template is used; None: the engine's.
        """
        return read_chat(tokenizer or self.tokenizer, self.engine.sight, messages, tools)

    def _check_chat(self, messages: Sequence[Message], params: SamplingParams | None) -> Request:
        ids, pictures = self.read_chat(messages)
        return self._check(ids, params or SamplingParams(), pictures=pictures)

    async def _stream_async(self, request: Request) -> AsyncGenerator[Delta, None]:
        pieces = self._pieces_async(request)
        try:
            async for piece in pieces:
                yield piece.delta
        finally:
            await pieces.aclose()

    async def _pieces_async(self, request: Request, max_waiting: int | None = None) -> AsyncGenerator[Piece, None]:
        loop = asyncio.get_running_loop()
        mail: asyncio.Queue[Piece] = asyncio.Queue()
        self._submit(request, lambda piece: _post(loop, mail, piece), max_waiting)
        try:
            while True:
                piece = await mail.get()
                if piece.error is not None:
                    raise piece.error
                yield piece
                if piece.is_last:
                    return
        finally:
            self._abort(request)

    def _pieces(self, request: Request) -> Iterator[Piece]:
        mail: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._submit(request, mail.put)
        try:
            while True:
                piece = mail.get()
                if piece.error is not None:
                    raise piece.error
                yield piece
                if piece.is_last:
                    return
        finally:
            self._abort(request)

    def _submit(self, request: Request, sink: Sink, max_waiting: int | None = None) -> None:
        self.start()
        with self._wake:  # of many that were checked in the same moment, each is counted before the next one comes
            if not self.is_healthy:
                raise CapacityError(f"The engine takes no requests: {self.error or 'it was stopped'} Start it again.")
            most = self.engine.config.max_waiting
            self._check_room(most if max_waiting is None else min(most, max_waiting))
            self._to_submit.append((request, sink))
            self._wake.notify()

    def _abort(self, request: Request) -> None:
        if request.is_finished:
            return
        with self._wake:
            self._to_abort.append(request)
            self._wake.notify()

    def _run(self) -> None:
        reason: ModelwrightError = CapacityError("The engine was stopped before the request was finished.")
        try:
            while self._read_mail():
                for piece in self.engine.step():
                    _, sink = self._sinks.pop(piece.request_id) if piece.is_last else self._sinks[piece.request_id]
                    sink(piece)
        except Exception as error:
            log.exception("the engine's step failed")
            reason = self.error = ModelwrightError(
                f"The engine failed in the middle of a step ({type(error).__name__}: {error}); every open request "
                "ended with it. The log has the details."
            )
        finally:
            self._fail_all(reason)
            self.engine.close()

    def _read_mail(self) -> bool:
        """Take in requests and aborts, waiting for some if there is nothing to do; False when it is time to end."""
        with self._wake:
            while not (self._to_submit or self._to_abort or self._is_stopping or self.engine.has_work):
                self._wake.wait()
            incoming, self._to_submit = self._to_submit, []
            aborted, self._to_abort = self._to_abort, []
            is_stopping = self._is_stopping
            for request, sink in incoming:  # still under the lock: who counts the waiting must see each of them once
                try:
                    self.engine.submit(request)
                except CapacityError as error:  # preempted ones have come to wait since it was let in
                    request.error = error
                    sink(Piece(request.id, Delta(""), error=error))
                else:
                    self._sinks[request.id] = (request, sink)
        for request in aborted:
            self.engine.abort(request)
            self._sinks.pop(request.id, None)
        return not is_stopping

    def _fail_all(self, reason: ModelwrightError) -> None:
        with self._wake:
            self._is_stopping = True
            never_started, self._to_submit = self._to_submit, []
        self.engine.abort_all()
        for request, sink in [*self._sinks.values(), *never_started]:
            request.error = reason
            sink(Piece(request.id, Delta(""), error=reason))
        self._sinks.clear()


def _post(loop: asyncio.AbstractEventLoop, mail: "asyncio.Queue[Piece]", piece: Piece) -> None:
    """Put a piece into a queue of an event loop from another thread."""
    try:
        loop.call_soon_threadsafe(mail.put_nowait, piece)
    except RuntimeError:
        log.debug("the event loop of request %d has closed", piece.request_id)
