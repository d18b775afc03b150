"""A small corpus with traps in it, and its index with and without vectors."""

import importlib.util
from pathlib import Path

import pytest

from modelwright.rag.embed import PACKAGE, Embedder
from modelwright.rag.index import Index, IndexConfig

NAMES = (
    "# naïve.md\r\n\r\nDie Straße ist größer als e\u0301 und 👩‍👩‍👧 zusammen. Ein zweiter Satz mit 🇩🇪 folgt hier.\r\n"
)
PAGES = {
    "textwrap.md": (
        "# textwrap\n\nText wrapping and filling.\n\n"
        "## textwrap.dedent(text)\n\nRemove any common leading whitespace from every line in `text`.\n\n"
        "This can be used to make triple-quoted strings line up with the left\nedge of the display.\n\n"
        "## textwrap.fill(text, width=70, **kwargs)\n\nFill a single paragraph of text, returning a new string.\n"
    ),
    "json.md": (
        "# json\n\nJSON encoder and decoder. Use json.dumps and json.loads for text.\n\n"
        "## json.dumps(obj, *, indent=None, sort_keys=False)\n\nSerialize ``obj`` to a JSON formatted ``str``.\n\n"
        ">>> json.dumps([1, 2])\n'[1, 2]'\n\n"
        "## json.loads(s)\n\nDeserialize ``s`` (a ``str``) to a Python object.\n"
    ),
    "handbook/leave.md": (
        "# Leave\n\n## Parental leave\n\nEmployees receive 26 weeks of paid parental leave. Apply 30 days before.\n\n"
        "## Sick leave\n\nTell your manager before 9 a.m. on the first day. A doctor's note is needed after 3 days.\n"
    ),
    "notes/naïve 名前.md": NAMES,
    "plain.txt": "\ufeffOne line with a byte order mark. Bananas are berries, but strawberries are not.",
    "日本.txt": "東京は日本の首都です。大阪は西にあります。",
}


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    for name, text in PAGES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    return folder


@pytest.fixture(scope="session")
def lexical(pages: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index.build(pages, tmp_path_factory.mktemp("lexical") / "index", config=IndexConfig(has_vectors=False))


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f"the sentence encoder {PACKAGE} is not installed")
    return Embedder()


@pytest.fixture(scope="session")
def index(pages: Path, embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index.build(pages, tmp_path_factory.mktemp("index") / "index", embedder=embedder)
