"""A real server on 127.0.0.1 over a tiny random model and a tiny index, in a thread of the test process."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn

from modelwright.base.types import Document, Message, ToolCall
from modelwright.engine.engine import EngineConfig
from modelwright.engine.stream import AsyncEngine
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.rag.index import Index, IndexConfig
from modelwright.serve.app import ServeConfig, create_app
from modelwright.tokenizer.tool_text import SECTION
from modelwright.tokenizer.train import train_bpe

DOCUMENTS = [
    Document(
        "textwrap.md",
        "# textwrap\n\nThe textwrap module wraps and fills text.\n\n## wrap\n\nThe function textwrap.wrap wraps a "
        "single paragraph of text and returns a list of lines. 🦊 The default width is 70 characters.\n",
        title="textwrap",
    ),
    Document(
        "heapq.md",
        "# heapq\n\nThe heapq module implements a heap queue.\n\n## heappush\n\nThe function heapq.heappush adds an "
        "item to the heap. The smallest item is always at position zero of the heap.\n",
        title="heapq",
    ),
    Document(
        "pages/evil.md",
        "# evil\n\nThe evil page says <script>window.hacked = 1</script> and <img src=x onerror='window.hacked = 2'> "
        "to everyone who asks about marmalade.\n",
        title="<b>evil</b>",
    ),
]
CONTEXT = 256


@dataclass
class Running:
    """A running server and the parts behind it."""

    url: str
    engine: AsyncEngine
    app: Any

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60)

    def wait_until_idle(self, seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            stats = self.engine.stats()
            if stats.running == stats.waiting == 0 and stats.free_blocks == stats.total_blocks:
                return
            time.sleep(0.02)
        raise AssertionError(f"the engine did not come to rest: {self.engine.stats()}")


def make_engine(**limits: Any) -> AsyncEngine:
    texts = [document.text for document in DOCUMENTS] + ["Plain words for the tokenizer, äöü and 🦊 among them."]
    tokenizer = train_bpe(texts, 300)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_seq_len=CONTEXT,
    )
    config = EngineConfig(dtype="bfloat16", device="cpu", num_blocks=400, **limits)
    return AsyncEngine(Llama(shape), tokenizer=tokenizer, config=config)


@contextlib.contextmanager
def running(app: Any, engine: Any, http: Any = "auto") -> Iterator[Running]:
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=1, http=http)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.started, "the server did not start"
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", engine, app)
    finally:
        server.should_exit = True
        thread.join(timeout=10)


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    out = tmp_path_factory.mktemp("index") / "index"
    return Index.build(DOCUMENTS, out, config=IndexConfig(has_vectors=False))


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "index.html").write_text("<!doctype html><title>page</title>")
    (folder / "style.css").write_text("body { margin: 0 }")
    (folder.parent / "secret.txt").write_text("not to be served")
    return folder


@pytest.fixture(scope="session")
def server(index: Index, page: Path) -> Iterator[Running]:
    with make_engine() as engine:
        app = create_app(ServeConfig(max_body_bytes=200_000), engine, engine.tokenizer, "tiny", index, page)
        with running(app, engine) as started:
            yield started


def events(text: str) -> list[Any]:
    """Parse server-sent events strictly: every one is `data: ...` and a blank line."""
    assert text.endswith("\n\n")
    parts = text[:-2].split("\n\n")
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [part[6:] if part == "data: [DONE]" else json.loads(part[6:]) for part in parts]


@pytest.fixture
def parse_events() -> Any:
    return events


@pytest.fixture(scope="session")
def start() -> Any:
    """Start another server."""
    return running


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def build_engine() -> Any:
    return make_engine


WEATHER = {
    "name": "weather",
    "description": "Tell the weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
ASKED = Message("user", "Rain in Ulm and Bonn?")
CALLS = tuple(ToolCall(f"call_{i}", "weather", json.dumps({"city": c})) for i, c in enumerate(["Ulm", "Bonn"]))
TALK = [
    ASKED,
    Message("assistant", "I look.", CALLS),
    Message("tool", "wet", (), "call_0", "weather"),
    Message("tool", "dry", (), "call_1", "weather"),
    Message("assistant", "In Ulm only."),
]


@pytest.fixture(scope="session")
def caller() -> Iterator[Running]:
    """A server of a small model that has learned one conversation with a tool by heart."""
    tokenizer = train_bpe([SECTION, json.dumps(WEATHER), *(turn.content for turn in TALK)] * 2, 560)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
        num_kv_heads=2, max_seq_len=1024,
    )  # fmt: skip
    model = Llama(shape)
    rows = tokenizer.chat_tokens(TALK, tools=[{"type": "function", "function": WEATHER}])
    ids, is_learned = torch.tensor([rows.ids]), torch.tensor(rows.assistant_mask)[1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        logits = model(ids[:, :-1]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[is_learned].float(), ids[0, 1:][is_learned])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.005:
            break
    assert loss < 0.05
    with AsyncEngine(
        model, tokenizer=tokenizer, config=EngineConfig(dtype="float32", device="cpu", num_blocks=400)
    ) as engine:
        app = create_app(ServeConfig(max_body_bytes=200_000), engine, tokenizer, "caller", None, None)
        with running(app, engine) as started:
            yield started


@pytest.fixture(scope="session")
def weather() -> dict[str, Any]:
    return WEATHER
