"""`LLM`: a model folder as an object that answers, without a server.

Every call may be given one prompt or many; many are computed together. Calls from several threads take turns step by
step, so streams that are open at the same time share the batch.
"""

import asyncio
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import nn

from modelwright.base.errors import ModelwrightError, RequestError
from modelwright.base.types import Completion, Delta, Message, SamplingParams
from modelwright.engine.beam import (
    BeamSearch,
    best_completions,
    join_completions,
    refuse_whole,
    search_completions,
    step_params,
)
from modelwright.engine.engine import Engine, EngineConfig, EngineStats
from modelwright.engine.request import Answer, Piece, Request
from modelwright.engine.sight import read_chat
from modelwright.tokenizer.bpe import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Score:
    """How likely a continuation is."""

    token_log_probs: tuple[float, ...]  # natural, of each of its tokens behind all before

    @property
    def log_prob(self) -> float:
        """The log-probability of the whole continuation."""
        return sum(self.token_log_probs)


class Stream:
    """Pieces of an answer as they come, for ``for`` and, computed in a thread, for ``async for``."""

    def __init__(self, deltas: Generator[Delta, None, None]):
        self._deltas = deltas

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        return next(self._deltas)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        delta = await asyncio.to_thread(next, self._deltas, None)
        if delta is None:
            raise StopAsyncIteration
        return delta

    def close(self) -> None:
        """End the request and free its blocks."""
        self._deltas.close()


class LLM:
    """A language model ready to answer; a `ChatModel`.

    Args:
        model: A folder with `config.json`, `model.safetensors` (plain or quantized) and `tokenizer.json`, or a
            loaded model.
        tokenizer: None takes the folder's.
        config: Sizes and limits of the engine.
        adapters: LoRA adapters in PEFT's format, name: folder; a call takes one by ``adapter=``.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        adapters: Mapping[str, str | Path] | None = None,
    ):
        self.engine = Engine(model, tokenizer=tokenizer, config=config)
        for name, folder in (adapters or {}).items():
            self.load_adapter(name, folder)
        self._lock = threading.Lock()
        self._pieces: dict[int, list[Piece]] = {}  # of requests whose caller has not fetched them yet

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            RequestError: There is none.
        """
        if self.engine.tokenizer is None:
            raise RequestError(
                "Text was given or asked for, and this LLM has no tokenizer. Pass one, or use token ids.",
                param="tokenizer",
            )
        return self.engine.tokenizer

    def close(self) -> None:
        """End the other processes of a model that is cut (`EngineConfig.tensor_parallel`)."""
        self.engine.close()

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Read a LoRA adapter in PEFT's format; calls may name it from now on. Raises as `Adapters.load`."""
        self.engine.adapters.load(name, folder)

    def unload_adapter(self, name: str) -> None:
        """Take an adapter's name away; what runs with it ends with it.

        Raises:
            RequestError: There is no such adapter.
        """
        self.engine.adapters.unload(name)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[Completion]:
        """Complete one prompt or many, together.

        Args:
            prompts: A text, a list of token ids, or a list of either.
            params: For all prompts, or one for each.
            adapter: The name of a loaded adapter, for all prompts, or one for each; None: the model itself.

        Returns:
            One completion a prompt, in order; a single prompt gives a list of one. With ``n`` > 1 the further
            completions of a prompt stand in ``others``; those of ``best_of`` and of a beam search, best first.

        Raises:
            RequestError: A prompt is empty or too long, or the counts differ; nothing has been computed then.
        """
        listed = [prompts] if _is_prompt(prompts) else list(prompts)  # type: ignore[arg-type]
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(listed)
        if len(each) != len(listed):
            raise RequestError(
                f"There are {len(listed)} prompts and {len(each)} sampling params. Give one for all, or one for each.",
                param="params",
            )
        names = [adapter] * len(listed) if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(names) != len(listed):
            raise RequestError(
                f"There are {len(listed)} prompts and {len(names)} adapters. Give one for all, or one for each.",
                param="adapter",
            )
        checked: list[Request] = []
        searches: list[tuple[Request, SamplingParams, dict[str, str] | None]] = []
        for prompt, one, name in zip(listed, each, names, strict=True):
            ids = self._encode(prompt)  # type: ignore[arg-type]
            if one.beam_width is not None:
                searches.append((self.engine.check(ids, one, _tags(name)), one, _tags(name)))
            else:
                checked += [self.engine.check(ids, p, _tags(name)) for p in one.split()]
        done = iter(self._finish(checked))
        found = iter([self._search(*search) for search in searches])
        return [next(found) if one.beam_width is not None else _best(done, one) for one in each]

    def _search(self, request: Request, params: SamplingParams, tags: dict[str, str] | None) -> Completion:
        """Search the best completions of a checked prompt by beams, all open ones in each step."""
        search = BeamSearch(params, request.stop_ids, request.max_tokens)
        one_step = step_params(params, search.num_alternatives)
        cached: int | None = None
        while not search.is_done:
            texts = [(*request.prompt_ids, *beam.token_ids) for beam in search.open]
            done = self._finish([self.engine.check(ids, one_step, tags) for ids in texts])
            cached = done[0].usage.cached_tokens if cached is None else cached
            search.extend([completion.top_logprobs[0] for completion in done if completion.top_logprobs])
        decode = self.engine.tokenizer.decode if self.engine.tokenizer is not None else None
        return join_completions(search_completions(search, len(request.prompt_ids), cached or 0, decode))

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Completion:
        """Answer a conversation, which may have pictures where the model sees, with one whole completion."""
        ids, pictures = read_chat(self.tokenizer, self.engine.sight, messages)
        params = params or SamplingParams()
        if not pictures:
            return self.generate(ids, params, adapter=adapter)[0]
        checked = [self.engine.check(ids, one, _tags(adapter), pictures) for one in params.split()]
        return _best(iter(self._finish(checked)), params)

    def stream(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> "Stream":
        """Answer a conversation piece by piece, for ``for`` and for ``async for``; closing it frees its blocks."""
        ids, pictures = read_chat(self.tokenizer, self.engine.sight, messages)
        return Stream(self._stream(self.engine.check(ids, params or SamplingParams(), _tags(adapter), pictures)))

    def stream_prompt(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> "Stream":
        """Complete one prompt piece by piece."""
        request = self.engine.check(self._encode(prompt), params or SamplingParams(), _tags(adapter))
        return Stream(self._stream(request))

    def score(self, prompts: Prompt | Sequence[Prompt], continuations: Prompt | Sequence[Prompt]) -> list[Score]:
        """Return how likely each continuation is behind its prompt.

        Args:
            prompts: One prompt for all continuations, or one for each.
            continuations: A text goes on right where the prompt ends: a space between them belongs to it. Texts are
                cut into tokens together, and the prompt's share is what the prompt alone has.

        Raises:
            RequestError: A continuation adds no token, or the counts differ.
        """
        after = [continuations] if _is_prompt(continuations) else list(continuations)  # type: ignore[arg-type]
        before = [prompts] * len(after) if _is_prompt(prompts) else list(prompts)  # type: ignore[arg-type]
        if len(before) != len(after):
            raise RequestError(
                f"There are {len(before)} prompts and {len(after)} continuations. Give one prompt, or one for each.",
                param="prompts",
            )
        pairs = [self._join_pair(b, a) for b, a in zip(before, after, strict=True)]  # type: ignore[arg-type]
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=True)
        done = self.generate([ids for ids, _ in pairs], params)
        return [
            Score(tuple(float(p or 0.0) for p in (completion.prompt_logprobs or ())[start:]))
            for (_, start), completion in zip(pairs, done, strict=True)
        ]

    def _join_pair(self, prompt: Prompt, continuation: Prompt) -> tuple[list[int], int]:
        """Return the ids of both and where the continuation's begin."""
        first = self._encode(prompt)
        if isinstance(prompt, str) and isinstance(continuation, str):
            ids = self.tokenizer.encode(prompt + continuation)
        else:
            ids = [*first, *self._encode(continuation)]
        start = max(1, len(first))  # nothing is said of a first token
        if len(ids) <= start:
            raise RequestError(
                f"The continuation {continuation!r:.80} adds no token to its prompt. Give more text.",
                param="continuations",
            )
        return ids, start

    def embed(self, prompts: Prompt | Sequence[Prompt]) -> np.ndarray:
        """Return one unit vector a prompt, shape (prompts, D), float32: the mean of the last layer's states.

        A model that was trained to write gives rough vectors; for search take a sentence encoder.
        """
        listed = [prompts] if _is_prompt(prompts) else list(prompts)  # type: ignore[arg-type]
        model, rows = self.engine.model, []
        place = next(model.parameters()).device
        with torch.inference_mode():
            for prompt in listed:
                ids = self._encode(prompt)  # type: ignore[arg-type]
                self.engine.check(ids, SamplingParams(max_tokens=1))
                with self._lock:
                    states = model.hidden(torch.tensor([ids], device=place))[0]  # (T, D)
                rows.append(torch.nn.functional.normalize(states.float().mean(0), dim=0))
        return torch.stack(rows).cpu().numpy() if rows else np.zeros((0, model.config.hidden_size), np.float32)

    def stats(self) -> EngineStats:
        """Return the engine's counters."""
        return self.engine.stats()

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _submit(self, request: Request) -> None:
        with self._lock:
            self.engine.submit(request)
            self._pieces[request.id] = []

    def _finish(self, checked: list[Request]) -> list[Completion]:
        """Compute requests to their end; more of them than may wait at once are fed in as places come free."""
        answers = [Answer() for _ in checked]
        open_requests: dict[int, Answer] = {}
        submitted: list[Request] = []
        try:
            while open_requests or len(submitted) < len(checked):
                while len(submitted) < len(checked) and self._has_room():
                    request = checked[len(submitted)]
                    self._submit(request)
                    open_requests[request.id] = answers[len(submitted)]
                    submitted.append(request)
                self._step()
                for id in list(open_requests):
                    for piece in self._fetch(id):
                        open_requests[id].add(piece)
                        if piece.is_last:
                            del open_requests[id]
        finally:
            self._drop(submitted)
        return [answer.completion() for answer in answers]

    def _stream(self, request: Request) -> Generator[Delta, None, None]:
        refuse_whole(request.params)
        self._submit(request)
        try:
            while True:
                for piece in self._fetch(request.id):
                    yield piece.delta
                    if piece.is_last:
                        return
                self._step()
        finally:
            self._drop([request])

    def _has_room(self) -> bool:
        return len(self.engine.scheduler.waiting) < self.engine.config.max_waiting

    def _step(self) -> None:
        with self._lock:
            for piece in self.engine.step():
                self._pieces[piece.request_id].append(piece)

    def _fetch(self, id: int) -> list[Piece]:
        """Take the pieces that have come for a request since the last time.

        Raises:
            ModelwrightError: The request failed.
        """
        with self._lock:
            pieces, self._pieces[id] = self._pieces[id], []
        error: ModelwrightError | None = next((p.error for p in pieces if p.error is not None), None)
        if error is not None:
            raise error
        return pieces

    def _drop(self, requests: Sequence[Request]) -> None:
        with self._lock:
            for request in requests:
                self.engine.abort(request)
                self._pieces.pop(request.id, None)


def _best(done: Iterator[Completion], params: SamplingParams) -> Completion:
    """Take the draws of one prompt and keep the ones asked for."""
    return join_completions(best_completions([next(done) for _ in range(params.best_of or params.n)], params))


def _tags(adapter: str | None) -> dict[str, str] | None:
    return None if adapter is None else {"adapter": adapter}


def _is_prompt(prompts: object) -> bool:
    if isinstance(prompts, str):
        return True
    return isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], int)
