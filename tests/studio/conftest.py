"""The page in a real browser, over a real server: documents alone, a model alone, and both."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn

from modelwright.base.types import Document
from modelwright.engine.engine import EngineConfig
from modelwright.engine.stream import AsyncEngine
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.rag.index import Index, IndexConfig
from modelwright.serve.app import ServeConfig, create_app
from modelwright.studio import PAGE
from modelwright.tokenizer.train import train_bpe

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LONG = "🦊 Filler words stand here and say nothing at all.\n" * 10_000
DOCUMENTS = [
    Document(
        "library/textwrap.md",
        "# textwrap\n\nThe textwrap module wraps and fills text.\n\n"
        + "## History\n\nNothing of note happened for a long while.\n\n" * 40
        + "## wrap\n\nThe function textwrap.wrap wraps a single paragraph of text and returns a list of lines. "
        "🦊 The default width of textwrap.wrap is 70 characters.\n\n"
        "## fill\n\nThe function textwrap.fill wraps a single paragraph of text and returns one string.\n",
        title="textwrap — Text wrapping and filling",
    ),
    Document(
        "library/heapq.md",
        "# heapq\n\nThe heapq module implements a heap queue.\n\n## heappush\n\nThe function heapq.heappush adds an "
        "item to the heap. The smallest item is always at position zero of the heap.\n",
        title="heapq — Heap queue algorithm",
    ),
    Document(
        "evil.md",
        "# evil\n\nThe marmalade page says <script>window.hacked = 1</script> and "
        "<img src=x onerror='window.hacked = 2'> to everyone who asks about marmalade.\n",
        title="<img src=x onerror='window.hacked = 3'>",
    ),
    Document("long.md", f"# long\n\n{LONG}\n\nThe zanzibar constant is exactly forty-two.\n\n{LONG}", title="long"),
]


def make_engine() -> AsyncEngine:
    """A random model whose answers are long enough to be stopped."""
    tokenizer = train_bpe([document.text[:2000] for document in DOCUMENTS], 300)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_seq_len=4096,
    )
    engine = AsyncEngine(Llama(shape), tokenizer=tokenizer, config=EngineConfig(dtype="bfloat16", device="cpu"))
    engine.engine.stop_ids = ()  # a random model says "the end" at random; this one goes on until it is stopped
    return engine


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    out = tmp_path_factory.mktemp("studio") / "index"
    return Index.build(DOCUMENTS, out, config=IndexConfig(has_vectors=False))


@pytest.fixture(scope="session")
def config() -> ServeConfig:
    return ServeConfig(examples=("What does textwrap.wrap do?", "What wraps a single paragraph of text?"))


@pytest.fixture(scope="session")
def quotes(index: Index, config: ServeConfig) -> Iterator[str]:
    """A server of documents alone."""
    with running(create_app(config, None, None, "library", index, PAGE)) as url:
        yield url


@pytest.fixture(scope="session")
def engine() -> Iterator[AsyncEngine]:
    with make_engine() as made:
        yield made


@pytest.fixture
def start_server() -> Callable[..., Any]:
    return running


@pytest.fixture(scope="module")  # while it is open, its event loop occupies this thread and asyncio.run fails
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.is_file():
        pytest.skip(f"{CHROMIUM} is not there; install Debian's package chromium")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open the page at an address; a script error, a blocked load or a request to elsewhere fails the test."""
    contexts, problems = [], []

    def opened(url: str, **settings: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: problems.append(m.text) if "Content Security Policy" in m.text else None)
        page.on("request", lambda r: problems.append(r.url) if not r.url.startswith(url) else None)
        page.goto(url)
        page.wait_for_selector("#badge:not([hidden])")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []
