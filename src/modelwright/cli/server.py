"""Open what is to be served and serve it: what ``mw serve`` and ``mw quickstart`` share."""

import signal
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from modelwright.base.errors import ConfigError
from modelwright.base.progress import console
from modelwright.engine.engine import EngineConfig
from modelwright.engine.stream import AsyncEngine
from modelwright.models.hub import fetch
from modelwright.rag.embed import Embedder
from modelwright.rag.index import Index
from modelwright.rag.rerank import CrossEncoder
from modelwright.serve.app import Allowed, ServeConfig, create_app
from modelwright.serve.app import serve as run_server
from modelwright.serve.port import Address
from modelwright.serve.vectors import Encoders
from modelwright.studio import PAGE

if TYPE_CHECKING:
    from modelwright.serve.web import FastAPI


def named_folder(text: str) -> tuple[str, Path]:
    """Read an adapter's option, NAME=DIR."""
    name, sign, folder = text.partition("=")
    if not (name and sign and folder):
        raise ConfigError(f"--adapters is {text!r}; expected NAME=DIR, such as law=runs/law. Give both.")
    return name, Path(folder)


def open_encoders(embedder: str | None, reranker: str | None) -> Encoders:
    """Load a sentence encoder and a reranker; each is called by its folder's name."""
    return Encoders(
        {Path(embedder).name: Embedder(embedder)} if embedder else {},
        {Path(reranker).name: CrossEncoder(reranker)} if reranker else {},
    )


@dataclass(frozen=True)
class Plan:
    """What is to be opened; a replica gets it and opens it in its own process."""

    config: ServeConfig
    model: str | None
    index: Path | None
    name: str
    embedder: str | None = None
    engine: EngineConfig | None = None
    encoders: tuple[str | None, str | None] = (None, None)  # a sentence encoder and a reranker

    def open(self) -> "tuple[FastAPI, AsyncEngine | None]":
        """Load everything and return the application, with the engine that is to be stopped at its end."""
        index = Index.open(self.index, embedder=self.embedder) if self.index is not None else None
        writer = AsyncEngine(fetch(self.model), config=self.engine) if self.model is not None else None
        tokenizer, encoders = writer.tokenizer if writer else None, open_encoders(*self.encoders)
        return create_app(self.config, writer, tokenizer, self.name, index, PAGE, encoders), writer

    def __call__(self) -> "FastAPI":
        """Return the application alone, for a replica, which ends with its process."""
        return self.open()[0]


def start(plan: Plan, address: Address) -> None:
    """Open what is to be served, say where, and serve it until interrupted."""
    app, writer = plan.open()
    console.print(f"[bold]{address.url}/[/bold]  the page; {address.url}/v1  the API. Ctrl-C ends.")
    try:
        run_server(app, address.host, address.port, address.tls, address.head_seconds)
    except KeyboardInterrupt:  # Ctrl-C is how a server is meant to end
        console.print("stopped")
    finally:
        if writer is not None:
            writer.stop()


def start_with(engine: str, plan: Plan, address: Address, num_replicas: int) -> None:
    """Serve in this process, or in several on Ray.

    Raises:
        ConfigError: The engine is unknown, replicas are asked of a local server, or they would write one trace or have
            different adapters.
    """
    if engine not in ("local", "ray"):
        raise ConfigError(f"--engine is {engine!r}; it must be 'local' or 'ray'. Give one of them.")
    if num_replicas < 1 or (engine == "local" and num_replicas > 1):
        raise ConfigError(
            f"--replicas is {num_replicas} with --engine {engine}; several need --engine ray, at least 1."
        )
    if engine == "local":
        start(plan, address)
        return
    if plan.config.trace_file is not None:
        raise ConfigError("--trace is written by one process; leave it out with --engine ray.")
    if plan.config.adapter_dir is not None:
        message = "--adapter-dir lets clients load adapters, which one replica of several would have. Name all of them"
        raise ConfigError(f"{message} with --adapters where --engine is ray.")
    start_replicas(plan, num_replicas, address)


def inside(config: ServeConfig) -> ServeConfig:
    """Return how a replica is set up whose front is set up so: doors, keys and files are the front's."""
    return replace(config, api_key_file=None, state_dir=None, allowed=Allowed(media_hosts=config.allowed.media_hosts))


def start_replicas(plan: Plan, num_replicas: int, address: Address) -> None:
    """Serve the same thing from several processes on Ray until interrupted; SIGHUP replaces them one by one."""
    from modelwright.serve.replicas import ReplicaConfig, Replicas, create_front  # Ray is an optional extra

    replicas = Replicas(replace(plan, config=inside(plan.config)), ReplicaConfig(num_replicas))
    console.print(f"starting {num_replicas} replicas on Ray")
    replicas.start()
    signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=replicas.restart, daemon=True).start())
    console.print(f"[bold]{address.url}/[/bold]  the page; {address.url}/v1  the API. Ctrl-C ends.")
    try:
        run_server(create_front(replicas, plan.config), address.host, address.port, address.tls, address.head_seconds)
    except KeyboardInterrupt:
        console.print("stopped")
    finally:
        replicas.stop()
