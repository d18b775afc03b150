"""Open what is to be served and serve it: what ``mw serve`` and ``mw quickstart`` share."""

from pathlib import Path

from modelwright.base.progress import console
from modelwright.engine.engine import EngineConfig
from modelwright.engine.stream import AsyncEngine
from modelwright.models.hub import fetch
from modelwright.rag.embed import Embedder
from modelwright.rag.index import Index
from modelwright.rag.rerank import CrossEncoder
from modelwright.serve.app import ServeConfig, create_app
from modelwright.serve.app import serve as run_server
from modelwright.serve.port import Address
from modelwright.serve.vectors import Encoders
from modelwright.studio import PAGE


def open_encoders(embedder: str | None, reranker: str | None) -> Encoders:
    """Load a sentence encoder and a reranker; each is called by its folder's name."""
    return Encoders(
        {Path(embedder).name: Embedder(embedder)} if embedder else {},
        {Path(reranker).name: CrossEncoder(reranker)} if reranker else {},
    )


def start(
    config: ServeConfig,
    model: str | None,
    index: Path | None,
    *,
    name: str | None,
    address: Address,
    embedder: str | None = None,
    engine: EngineConfig | None = None,
    encoders: Encoders | None = None,
) -> None:
    """Open what is to be served, say where, and serve it until interrupted."""
    opened = Index.open(index, embedder=embedder) if index is not None else None
    writer = AsyncEngine(fetch(model), config=engine) if model is not None else None
    name = name or Path(model or index or "modelwright").name
    app = create_app(config, writer, writer.tokenizer if writer else None, name, opened, PAGE, encoders)
    console.print(f"[bold]{address.url}/[/bold]  the page; {address.url}/v1  the API. Ctrl-C ends.")
    try:
        run_server(app, address.host, address.port, address.tls)
    except KeyboardInterrupt:  # Ctrl-C is how a server is meant to end
        console.print("stopped")
    finally:
        if writer is not None:
            writer.stop()
