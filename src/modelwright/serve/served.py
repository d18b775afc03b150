"""What one server serves, and how it is set up: the engine, the tokenizer, the documents, and their names.

Two models may stand behind one address. ``NAME`` is the language model; ``NAME-documents`` answers from the
indexed documents and cites them. Both produce a stream of `Piece`, so one code path answers for both.
"""

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelwright.base.errors import CapacityError, ConfigError, RequestError
from modelwright.base.types import FinishReason, TopLogprobs, Usage
from modelwright.serve.chats import Kind
from modelwright.serve.errors import EngineDownError
from modelwright.serve.media import MediaReader
from modelwright.serve.metrics import Metrics
from modelwright.serve.telemetry import Telemetry
from modelwright.serve.tool_calls import CallDelta
from modelwright.serve.trace import Trace
from modelwright.serve.vectors import Encoders

if TYPE_CHECKING:  # a server of documents alone needs no engine, so importing this room loads none
    from modelwright.engine.stream import AsyncEngine
    from modelwright.rag.index import Index
    from modelwright.tokenizer.bpe import Tokenizer

DOCUMENTS_SUFFIX = "-documents"


@dataclass(frozen=True)
class Allowed:
    """What a server lets in from elsewhere; all of it is closed unless named."""

    origins: tuple[str, ...] = ()  # other sites whose pages may ask: https://app.example.org
    hosts: tuple[str, ...] = ()  # names to be called by, beside localhost; empty off loopback: any
    media_hosts: tuple[str, ...] = ()  # hosts that pictures are fetched from, with a port if it is not 443


@dataclass(frozen=True)
class ServeConfig:
    """How a server is built. The address is not part of it: the same application can listen anywhere."""

    answer_mode: Literal["extractive", "generated"] = "extractive"  # who writes answers: the documents, or the model
    num_passages: int = 5  # passages that an answer may draw on
    examples: tuple[str, ...] = ()  # questions that the page offers; empty: made from document titles
    max_body_bytes: int = 16 * 1024 * 1024
    body_timeout_seconds: float = 30.0  # for the body of a request to arrive
    answer_timeout_seconds: float | None = 3600.0  # for a whole answer, the queue included; None: no limit
    max_waiting: int = 256  # requests in the queue before new ones are told to come back
    adapters: tuple[tuple[str, Path], ...] = ()  # LoRA adapters to serve from the start: name, folder
    adapter_dir: Path | None = None  # clients may load LoRA adapters from folders under it; None: they may not
    max_prompts: int = 128  # prompts in one completion request
    reasoning: Literal["auto", "off"] = "auto"  # thoughts are told apart where the chat template knows of them
    state_dir: Path | None = None  # where files and batches are kept; None: a folder that goes with the server
    max_file_bytes: int = 200 * 1000 * 1000  # of an upload
    memory: Kind = "tokens"  # what of a conversation on the page the model is shown
    num_threads: int = 8  # answers from the documents worked on at once
    stall_seconds: float = 60.0  # without a token while requests run: not ready
    api_key_file: Path | None = None  # who may ask; None: everybody who reaches the address
    trace_file: Path | None = None  # every prompt and answer is written there, for mw replay; None: nowhere
    otlp_endpoint: str | None = None  # of an OpenTelemetry collector that is sent spans; None: no spans
    allowed: Allowed = Allowed()

    def __post_init__(self) -> None:
        for name in ("num_passages", "max_body_bytes", "max_waiting", "max_prompts", "num_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"serve.{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("body_timeout_seconds", "answer_timeout_seconds"):
            seconds = getattr(self, name)
            if seconds is not None and not seconds > 0:
                raise ConfigError(f"serve.{name} is {seconds:g}; it must be above 0. Give the seconds to wait.")
        url = self.otlp_endpoint
        if url is not None and not url.startswith(("http://", "https://")):
            raise ConfigError(f"serve.otlp_endpoint is {url!r}; expected a URL, such as http://localhost:4318.")


@dataclass(frozen=True)
class Token:
    """One token of an answer whose log-probabilities were asked for."""

    id: int
    logprob: float | None  # None: the first token of an echoed prompt
    top: TopLogprobs = ()


@dataclass(frozen=True)
class Piece:
    """A piece of an answer while it streams; the last one carries the reason, the usage and any extension fields."""

    text: str
    finish_reason: FinishReason | Literal["tool_calls"] | None = None
    usage: Usage | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[Token, ...] = ()
    calls: tuple[CallDelta, ...] = ()
    token_ids: tuple[int, ...] = ()
    reasoning: str = ""  # what the model thought, which is not part of its text


class Pulse:
    """Whether work moves: how many requests run, and when one of them last got a piece."""

    def __init__(self) -> None:
        self.num_running = 0
        self.num_steps = 0
        self.last_seconds = time.monotonic()

    def start(self) -> None:
        """Note a new request; the silence is counted from the first of them."""
        if self.num_running == 0:
            self.beat()
        self.num_running += 1

    def stop(self) -> None:
        """Note the end of a request, whatever it was."""
        self.num_running -= 1

    def beat(self) -> None:
        """Note that a request got on."""
        self.last_seconds = time.monotonic()

    def see_step(self, num_steps: int) -> None:
        """Count a step of the engine as progress: a long prompt takes many before its first token."""
        if num_steps != self.num_steps:
            self.num_steps = num_steps
            self.beat()

    def silence_seconds(self) -> float:
        """Return the seconds since work last moved; 0 when there is none to do."""
        return time.monotonic() - self.last_seconds if self.num_running else 0.0


class Served:
    """The parts that the routes of one application share."""

    def __init__(
        self,
        config: ServeConfig,
        engine: "AsyncEngine | None",
        tokenizer: "Tokenizer | None",
        model_name: str,
        index: "Index | None",
        encoders: Encoders | None = None,
    ):
        self.encoders = encoders or Encoders()
        if engine is None and index is None and not self.encoders.names:
            raise ConfigError("There is nothing to serve: give a model, an index of documents, or both.")
        if engine is not None and tokenizer is None:
            raise ConfigError("The model has no tokenizer; give the one that it was trained with.")
        if engine is None and config.answer_mode == "generated":
            raise ConfigError("serve.answer_mode is 'generated', which needs a model; give one, or use 'extractive'.")
        if index is not None and index.has_vectors:
            _ = index.embedder  # load it now: one that is missing is told at the start, not to the first who asks
        self.config = config
        self.engine = engine
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.index = index
        self.media = MediaReader(config.allowed.media_hosts)
        self.created = int(time.time())
        self.pulse = Pulse()
        self.metrics = Metrics(engine.stats if engine is not None else None)
        self.trace: Trace | None = None
        if config.trace_file is not None:
            if engine is None:
                raise ConfigError("serve.trace_file is given, but no language model, whose requests are traced.")
            self.trace = Trace(config.trace_file, engine.engine.model, engine.engine.config)
        self.telemetry = None if config.otlp_endpoint is None else Telemetry(config.otlp_endpoint)
        if config.adapters and engine is None:
            raise ConfigError("serve.adapters are given, but no language model that they belong to. Give one.")
        for name, folder in config.adapters:
            self.load_adapter(name, folder)
        self.pool = ThreadPoolExecutor(config.num_threads, thread_name_prefix="documents")

    @property
    def writes_thoughts(self) -> bool:
        """True when thoughts are to be told apart from answers."""
        template = self.tokenizer.chat_template if self.tokenizer is not None else None
        return self.config.reasoning == "auto" and template is not None and "</think>" in template

    @property
    def documents_name(self) -> str:
        """The name under which the documents answer."""
        return self.model_name + DOCUMENTS_SUFFIX

    @property
    def model_names(self) -> list[str]:
        """The names that a request can give as its model."""
        names = [self.model_name, *self.adapter_names] if self.engine is not None else []
        return names + ([self.documents_name] if self.index is not None else []) + self.encoders.names

    @property
    def adapter_names(self) -> list[str]:
        """The names of the language model's adapters."""
        return self.engine.engine.adapters.names if self.engine is not None else []

    def load_adapter(self, name: str, folder: Path) -> None:
        """Serve the language model with an adapter under a name of its own.

        Raises:
            ConfigError: The name is another model's, or no name.
        """
        assert self.engine is not None
        if name in self.model_names and name not in self.adapter_names:
            raise ConfigError(f"The adapter's name {name!r} is that of a model served here. Choose another.")
        self.engine.engine.adapters.load(name, folder)

    def check_model(self, name: Any) -> str:
        """Return the model that a request names; a missing or unknown name is the client's error."""
        if not isinstance(name, str):
            message = f"model is {name!r}; it must be one of: {', '.join(self.model_names)}."
            raise RequestError(message, param="model", code="invalid_type")
        if name not in self.model_names:
            message = f"The model {name!r} is not served here. Served: {', '.join(self.model_names)}."
            raise RequestError(message, param="model", code="model_not_found", status=404)
        return name

    def check_writer(self, name: Any) -> str:
        """Return the model that a request names, which must be one that writes text."""
        if self.check_model(name) in self.encoders.names:
            message = f"{name} makes vectors or scores; it writes no text. Use /v1/embeddings, /v1/rerank or /v1/score."
            raise RequestError(message, param="model", code="unsupported_model")
        return str(name)

    @property
    def max_context(self) -> int:
        """Tokens of prompt and completion together that the language model takes."""
        assert self.engine is not None
        return int(self.engine.engine.max_context)

    def silence_seconds(self) -> float:
        """Return the seconds since work last moved: a piece of an answer, or a step of the engine."""
        if self.engine is not None:
            self.pulse.see_step(self.engine.stats().num_steps)
        return self.pulse.silence_seconds()

    def admit(self, num_completions: int = 1) -> None:
        """Turn a request away when it cannot be served now; the engine looks again when it is put in the queue.

        Raises:
            RequestError: It asks for more completions than may ever wait.
            EngineDownError: The engine has stopped.
            CapacityError: The queue is full.
        """
        if num_completions > self.config.max_waiting:
            most = self.config.max_waiting
            message = f"{num_completions} completions are asked for; a request may have {most} here. Send several."
            raise RequestError(message, param="n", code="too_many_completions")
        if self.engine is not None and not self.engine.is_healthy:
            raise EngineDownError(f"The engine has stopped: {self.engine.error or ''} Start the server again.")
        waiting = self.engine.stats().waiting if self.engine is not None else 0
        if waiting >= self.config.max_waiting:
            raise CapacityError(f"{waiting} requests wait already, the most that this server queues. Try again soon.")

    async def close(self) -> None:
        """Wait for the threads, while the loop that they may be waiting for still runs."""
        await asyncio.to_thread(self.pool.shutdown, True, cancel_futures=True)
        if self.telemetry is not None:
            await asyncio.to_thread(self.telemetry.close)
        if self.trace is not None:
            self.trace.close()
