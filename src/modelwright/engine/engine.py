"""The engine: scheduler, paged cache, runner and sampler put together into one step.

`Engine` is plain and synchronous: add requests, call `step` until there is no work, read the pieces it returns. One
thread at a time may use it. `llm.LLM` drives it for offline use, `stream.AsyncEngine` for servers.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.errors import CheckpointError, ConfigError, RequestError
from modelwright.base.logs import get_logger
from modelwright.base.types import Delta, FinishReason, SamplingParams
from modelwright.engine.adapters import Adapters
from modelwright.engine.beam import check_beams
from modelwright.engine.forced import ForcedProposer
from modelwright.engine.grammar import FORMS, Grammar, GrammarCompiler
from modelwright.engine.kv_cache import BlockPool
from modelwright.engine.kv_store import KV_DTYPES
from modelwright.engine.pace import Pace
from modelwright.engine.prepare import BITS, DTYPES, KERNELS, Steps, load_whole, prepare_model
from modelwright.engine.proposers import make_proposer
from modelwright.engine.recurrent import is_recurrent, refuse_recurrent
from modelwright.engine.request import Piece, Request, make_request
from modelwright.engine.sampler import Draw, Drawn, one_thread, sample, top_logprobs
from modelwright.engine.scheduler import Chunk, Scheduler, next_rows
from modelwright.engine.sight import Picture, Sight, place_pictures
from modelwright.engine.sizes import num_cache_blocks
from modelwright.engine.speculative import Proposer, SpeculationConfig
from modelwright.engine.stop import Speech, stop_ids_of
from modelwright.engine.tensor_parallel import Ranks
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.tokenizer.stream import StreamDecoder

log = get_logger(__name__)


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is built."""

    dtype: str | None = None  # bfloat16, float16, float32; None: a folder in bfloat16 where it is fast, a module as is
    device: str | None = None  # None: CUDA where there is one
    block_size: int = 16  # positions in a block; a prefix is shared in whole blocks
    num_blocks: int | None = None  # None: from kv_cache_bytes
    kv_cache_bytes: int | None = None  # None: 256 MB, or less where the requests below cannot use it
    max_context: int | None = None  # tokens of prompt and completion together; None: what the model was made for
    max_running: int = 32  # requests computed in one step at most
    max_waiting: int = 1024  # more are turned away
    max_tokens_per_step: int = 512  # longer prompts are computed in chunks
    has_prefix_cache: bool = True
    speculation: SpeculationConfig | None = None  # None: one token a step and request
    quantize: str | None = None  # int8 or int4: round 16-bit weights while loading; None: as they are
    kv_dtype: str | None = None  # int8 or int4: round keys and values in the cache; None: as the weights are
    kernels: str | None = None  # native (compiled) or plain (PyTorch); None: native for low-bit Llamas where it can be
    adapter_bytes: int | None = None  # memory for LoRA adapters; None: 512 MB
    has_jump_forward: bool = True  # what a form forces is checked in one step; the same tokens in fewer steps
    tensor_parallel: int = 1  # processes that compute the model together; the sizes of the cache are those of each

    def __post_init__(self) -> None:
        for name in ("block_size", "max_running", "max_waiting", "max_tokens_per_step", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; known: {', '.join(DTYPES)}. Leave it out to decide for you.")
        for name, known in (("quantize", tuple(BITS)), ("kernels", KERNELS), ("kv_dtype", KV_DTYPES)):
            if getattr(self, name) not in (None, *known):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; known: {', '.join(known)}. Or leave it out.")
        if self.num_blocks is not None and self.kv_cache_bytes is not None:
            raise ConfigError("num_blocks and kv_cache_bytes are both given; they say the same thing. Leave one out.")
        if self.tensor_parallel > 1:
            self._check_cut()

    def _check_cut(self) -> None:
        """Refuse what several processes do not compute together."""
        layers = self.speculation is not None and self.speculation.method == "early_exit"
        for name, is_set, why in (
            ("quantize", self.quantize is not None, "low-bit weights are not cut"),
            ("kernels='native'", self.kernels == "native", "the compiled step is one process's"),
            ("speculation.method='early_exit'", layers, "the first layers are cut too"),
        ):
            if is_set:
                raise ConfigError(f"tensor_parallel is {self.tensor_parallel} and {name}: {why}. Leave one out.")


@dataclass(frozen=True)
class EngineStats:
    """What the engine is doing now and has done since its start."""

    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    cached_blocks: int  # held or free, findable by prefix
    num_steps: int
    num_finished: int
    prompt_tokens: int  # of finished requests, as the next two
    cached_tokens: int
    completion_tokens: int
    num_preemptions: int
    num_drafted: int = 0  # tokens guessed by speculation
    num_accepted: int = 0  # of these, the ones that were right


class Engine:
    """Serves requests in steps, each of which computes some tokens of many requests.

    Args:
        model: A folder, or a loaded causal model, which is put into eval mode and, if `config` names a dtype or
            device, moved there.
        tokenizer: None takes the folder's; with a module, None gives token ids only and no text.
        config: Sizes and limits.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
    ):
        self.config = config or EngineConfig()
        module, whole = prepare_model(model, self.config.dtype, self.config.device, self.config.quantize)
        num_ranks, why_not = self.config.tensor_parallel, None
        self._ranks: Ranks | None = None
        if num_ranks > 1:
            if whole is not None:
                raise ConfigError(f"tensor_parallel is {num_ranks} and the model sees; pictures go to one process.")
            self._ranks = Ranks(partial(load_whole, model, self.config.dtype), num_ranks)
            module, why_not = self._ranks.cut(module), f"tensor_parallel is {num_ranks}"
        folder = None if isinstance(model, nn.Module) else Path(model)
        if tokenizer is None and folder is not None:
            tokenizer = load_tokenizer(folder)
        self.sight = Sight(whole, folder, tokenizer) if whole is not None else None
        self.model, self.tokenizer = module, tokenizer
        has_states = is_recurrent(module.cache_layout())
        if has_states:
            why_not = f"a {type(module).__name__} has a recurrent state, and adapters are for attention models alone"
        self.adapters = Adapters(module, self.config.adapter_bytes, why_not)
        self.model_config: Any = module.config
        self.stop_ids = stop_ids_of(self.model_config, tokenizer)
        block_size = self.config.block_size
        num_blocks = num_cache_blocks(module, next(module.parameters()).dtype, self.config)
        self._steps = Steps(
            module,
            num_blocks=num_blocks,
            block_size=block_size,
            kernels=self.config.kernels,
            why_not=self._why_not_native(),
            kv_dtype=self.config.kv_dtype,
            ranks=self._ranks,
            max_rows=self.config.max_running,
        )
        speculation = self.config.speculation
        if has_states:
            refuse_recurrent(module, {"speculation": (speculation, "it cannot go back behind a wrong guess")})
        self.pool = BlockPool(num_blocks, block_size, self.config.has_prefix_cache and not has_states)
        proposer: Proposer | None = None
        if speculation is not None:
            proposer = make_proposer(speculation, module, tokenizer, block_size=block_size, num_blocks=num_blocks)
        self.grammars: GrammarCompiler | None = None
        if tokenizer is not None:
            self.grammars = GrammarCompiler(tokenizer, self.model_config.vocab_size, self.stop_ids)
            if self.config.has_jump_forward and not has_states:
                proposer = ForcedProposer(proposer)
        self.scheduler = self._make_scheduler(proposer)
        self.max_context = self._longest()
        self._speech: dict[int, Speech] = {}
        self._next_id = 0
        self._num_steps = self._num_finished = 0
        self._num_prompt = self._num_cached = self._num_completion = 0
        self._num_drafted = self._num_accepted = 0

    def _make_scheduler(self, proposer: Proposer | None) -> Scheduler:
        speculation = self.config.speculation
        return Scheduler(
            self.pool,
            max_running=self.config.max_running,
            # A forward pass refuses more tokens than the model's context, even when they are of many requests.
            max_tokens_per_step=min(self.config.max_tokens_per_step, self.model_config.max_seq_len),
            max_waiting=self.config.max_waiting,
            proposer=proposer,
            pace=Pace() if speculation is not None and speculation.is_timed else None,
        )

    def _longest(self) -> int:
        """Return how many tokens a request may have; say so where the cache is the limit."""
        wanted = min(self.config.max_context or self.model_config.max_seq_len, self.model_config.max_seq_len)
        if self.scheduler.max_context < wanted:
            log.warning(
                "the key-value cache holds %d tokens, fewer than the model's context of %d; requests are held to it",
                self.scheduler.max_context,
                self.model_config.max_seq_len,
            )
        return min(wanted, self.scheduler.max_context)

    def _why_not_native(self) -> str | None:
        """Return what the compiled step lacks that this engine needs, beside what its model says."""
        if self.config.speculation is not None and self.config.speculation.method == "medusa":
            return "speculation.method is 'medusa', whose heads read hidden states, which it does not tell"
        if self.sight is not None:
            return "the model sees, and pictures come as vectors, which it does not take"
        return None

    @property
    def runner(self) -> Any:
        """What computes the steps: a `Runner`, or a `NativeRunner`."""
        return self._steps.runner

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def close(self) -> None:
        """End the other processes of a model that is cut; nothing is computed after that. Idempotent."""
        if self._ranks is not None:
            self._ranks.close()

    def add(self, prompt_ids: Sequence[int], params: SamplingParams, tags: dict[str, str] | None = None) -> Request:
        """Queue one prompt.

        Args:
            prompt_ids: Token ids, special ones included.
            params: How the completion is drawn.
            tags: Requests share prefix blocks only with those of equal tags (tenant; ``adapter``: the name of one that
                `adapters` has loaded).

        Raises:
            RequestError: The prompt is empty, has an unknown id, or is longer than the context.
            CapacityError: Too many requests wait.
        """
        request = self.check(prompt_ids, params, tags)
        self.submit(request)
        return request

    def check(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        tags: dict[str, str] | None = None,
        pictures: Sequence[Picture] = (),
    ) -> Request:
        """Make a request without queueing it; raises as `add` does. Safe while another thread steps.

        Args:
            prompt_ids: Token ids, with as many image tokens for each picture as it has vectors.
            params: As of `add`.
            tags: As of `add`.
            pictures: What `sight` has seen, in the order of their places.
        """
        adapter, tags = self.adapters.resolve(tags)
        request = make_request(
            -1,
            prompt_ids,
            params,
            max_context=self.max_context,
            vocab_size=self.model_config.vocab_size,
            stop_ids=self.stop_ids,
            tags=tags,
        )
        request.adapter = adapter
        request.pictures = place_pictures(request.prompt_ids, pictures, self.sight)
        if pictures and params.beam_width is not None:
            raise RequestError(
                "beam_width is given and the prompt has pictures; beams are searched over text alone. Leave one out.",
                param="beam_width",
                code="unsupported_parameter",
            )
        if params.beam_width is not None:
            check_beams(params, self.model_config.vocab_size, len(request.stop_ids))
        request.bad_words = self._bad_words(params)
        request.grammar = self._grammar(params)
        return request

    def _grammar(self, params: SamplingParams) -> Grammar | None:
        if self.grammars is not None:
            return self.grammars.start(params)
        if any(getattr(params, form) is not None for form in FORMS):
            raise RequestError("A form was asked for, and this engine has no tokenizer. Pass one.", param="json_schema")
        return None

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Return the token sequences of the bad words, at the beginning of a text and after a space."""
        if not params.bad_words:
            return ()
        if self.tokenizer is None:
            raise RequestError("bad_words are texts, and this engine has no tokenizer. Pass one.", param="bad_words")
        encode = self.tokenizer.encode
        spellings = {tuple(encode(text, add_special_tokens=False)) for w in params.bad_words for text in (w, " " + w)}
        return tuple(sorted(spellings))

    def submit(self, request: Request) -> None:
        """Queue a request that `check` made and give it its number.

        Raises:
            CapacityError: Too many requests wait.
        """
        self.scheduler.add(request)
        if request.adapter is not None:
            request.adapter.num_running += 1
        request.id = self._next_id
        self._next_id += 1
        decoder = StreamDecoder(self.tokenizer) if self.tokenizer is not None else None
        self._speech[request.id] = Speech(decoder, request.params.stop)

    def abort(self, request: Request) -> None:
        """Drop a request, between steps; its blocks are free at once. Does nothing to a finished one."""
        if not request.is_finished:
            request.finish_reason = "abort"
            self._close(request)

    def abort_all(self) -> None:
        """Drop every request."""
        for request in list(self.scheduler.requests()):
            self.abort(request)

    def step(self) -> list[Piece]:
        """Compute one step and return what it added, in order of arrival; nothing if there is no work."""
        started = time.perf_counter()
        if not self.scheduler.is_under_way and self._steps.take_over():
            self.pool.forget_all()  # the two lay blocks out differently
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        logits = self.adapters.run(self.runner, chunks)  # (R, V)
        with one_thread():
            pieces = self._draw_all(chunks, logits)
        pace, has_drafts = self.scheduler.pace, any(chunk.draft for chunk in chunks)
        if pace is not None and all(chunk.num_tokens == 1 for chunk in chunks):
            pace.note(len(chunks), len(pieces), time.perf_counter() - started, has_drafts)
        elif pace is not None and has_drafts:
            pace.note_mixed(len(chunks))
        return pieces

    def _draw_all(self, chunks: Sequence[Chunk], logits: Tensor) -> list[Piece]:
        """Draw what the step's logits (R, V) allow, and end the step."""
        ready = [chunk for chunk in chunks if chunk.reaches_end]
        self._note_prompts(chunks, logits)
        first_rows = next_rows(chunks)
        self.scheduler.complete(chunks)
        self._num_steps += 1
        pieces: list[Piece] = []
        # Round by round: the first draw of every request, then the next one of those whose draft was right so far.
        turn = 0
        while ready:
            rows = [first_rows[chunk.request.id] + turn for chunk in ready]
            these = logits if rows == list(range(logits.shape[0])) else logits[rows]  # no copy when all of them draw
            drawn = sample(these, [self._draw(chunk.request) for chunk in ready])
            pieces += [self._extend(chunk.request, d) for chunk, d in zip(ready, drawn, strict=True)]
            self._show_hidden(ready, rows)
            ready = [c for c, d in zip(ready, drawn, strict=True) if self._agrees(c, turn, d.token)]
            turn += 1
        return pieces

    def _show_hidden(self, chunks: Sequence[Chunk], rows: Sequence[int]) -> None:
        """Give a proposer that wants them the states that the requests' last tokens were drawn from."""
        proposer: Any = self.scheduler.proposer
        if getattr(proposer, "wants_hidden", False):
            for chunk, row in zip(chunks, rows, strict=True):
                if not chunk.request.is_finished:
                    proposer.see(chunk.request, self.runner.hidden_rows[row])

    def _agrees(self, chunk: Chunk, turn: int, token: int) -> bool:
        """Note how a request's draft fares; True when the next row of its logits is valid and wanted."""
        request, draft = chunk.request, chunk.draft
        is_right = turn < len(draft) and draft[turn] == token
        if is_right:
            self._num_accepted += 1
            request.num_computed += 1  # the key and value of the guessed token are those of the drawn one
        goes_on = is_right and not request.is_finished
        if draft and not goes_on and self.scheduler.proposer is not None:
            self._num_drafted += len(draft)
            self.scheduler.proposer.learn(request, len(draft), turn + is_right)
        return goes_on

    def stats(self, num_incoming: int = 0) -> EngineStats:
        """Return the engine's counters; `num_incoming` more requests count as waiting."""
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting) + num_incoming,
            free_blocks=self.pool.num_free,
            total_blocks=self.pool.num_usable,
            cached_blocks=self.pool.num_cached,
            num_steps=self._num_steps,
            num_finished=self._num_finished,
            prompt_tokens=self._num_prompt,
            cached_tokens=self._num_cached,
            completion_tokens=self._num_completion,
            num_preemptions=self.scheduler.num_preemptions,
            num_drafted=self._num_drafted,
            num_accepted=self._num_accepted,
        )

    def _draw(self, request: Request) -> Draw:
        params = request.params
        return Draw(
            params,
            request.seed,
            request.num_tokens,
            banned_ids=tuple(request.stop_ids) if request.num_output < params.min_tokens else (),
            prompt_ids=request.prompt_ids,
            output_ids=request.output_ids,
            bad_words=request.bad_words,
            allowed=None if request.grammar is None else request.grammar.allowed(),
        )

    def _note_prompts(self, chunks: Sequence[Chunk], logits: Tensor) -> None:
        """Keep the log-probabilities of the prompt tokens that this step's rows foretell."""
        row = 0
        for chunk in chunks:
            request = chunk.request
            if chunk.needs_all_rows:
                targets = request.prompt_ids[chunk.start + 1 : chunk.end + 1]
                rows = torch.log_softmax(logits[row : row + len(targets)].float(), dim=-1)
                picked = (
                    rows.gather(1, torch.tensor(targets, device=rows.device)[:, None])[:, 0] if targets else rows[:0, 0]
                )
                del request.prompt_logprobs[chunk.start :]  # a preempted request computes its prompt again
                request.prompt_logprobs += picked.tolist()
                del request.prompt_top[chunk.start :]
                request.prompt_top += [top_logprobs(row, request.params.logprobs or 0) for row in rows]
            row += chunk.num_rows

    def _extend(self, request: Request, drawn: Drawn) -> Piece:
        """Append a drawn token, see whether it ends the completion, and return the piece to show."""
        token, logprob = drawn.token, drawn.logprob
        if not math.isfinite(logprob):
            request.error = CheckpointError(
                "The model's output is not a number; it should be finite. "
                "Its weights are damaged, or too large for their number format: try dtype float32."
            )
            self._close(request)
            return Piece(request.id, Delta(""), error=request.error)
        if request.grammar is not None and not request.grammar.accept(token):
            request.error = RequestError(
                f"No token is left that the form and the request's bans allow after {request.num_output} tokens. "
                "Drop bad_words or logit_bias, or loosen the form.",
                code="form_impossible",
            )
            self._close(request)
            return Piece(request.id, Delta(""), error=request.error)
        speech = self._speech[request.id]
        request.token_ids.append(token)
        request.logprobs.append(logprob)
        text = ""
        if token not in request.stop_ids:
            text = speech.push(token, can_stop=request.num_output > request.params.min_tokens)
        request.finish_reason = self._ending(request, token, speech)
        top = (drawn.top,) if request.params.logprobs is not None else ()
        is_first = request.params.prompt_logprobs and request.num_output == 1
        told = (None, *request.prompt_logprobs) if is_first else None
        told_top = ((), *request.prompt_top) if is_first else ()
        if request.finish_reason is None:
            return Piece(request.id, Delta(text, (token,)), (logprob,), top, told, told_top)
        if not speech.is_stopped:
            text += speech.finish()
        self._close(request)
        last = Delta(text, (token,), request.finish_reason, request.usage)
        return Piece(request.id, last, (logprob,), top, told, told_top)

    def _ending(self, request: Request, token: int, speech: Speech) -> FinishReason | None:
        is_whole = request.grammar is not None and request.grammar.is_complete
        if token in request.stop_ids or speech.is_stopped or is_whole:
            return "stop"
        return "length" if request.num_output >= request.max_tokens else None

    def _close(self, request: Request) -> None:
        self.scheduler.remove(request)
        self._speech.pop(request.id, None)
        if request.adapter is not None and request.id >= 0:
            request.adapter.num_running -= 1
        self._num_finished += 1
        self._num_prompt += len(request.prompt_ids)
        self._num_cached += request.num_cached
        self._num_completion += request.num_output
