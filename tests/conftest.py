"""A whole life at toy size, made once a test session: documents, data set, pairs, tokenizer, model."""

import importlib
from dataclasses import dataclass
from pathlib import Path

import pytest

MODULES = ("bisect", "fnmatch", "getopt", "heapq", "keyword", "netrc", "sched", "shlex", "string", "textwrap")


@dataclass(frozen=True)
class Toy:
    """Where the toy artifacts are. Read-only: a test that changes one copies it first."""

    documents: Path  # plain folder of Markdown
    data: Path
    pairs: Path
    tokenizer: Path
    model: Path


@pytest.fixture(scope="session")
def toy_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from modelwright.data.interpreter_pages import render_module

    folder = tmp_path_factory.mktemp("toy") / "documents"
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.md").write_text(render_module(importlib.import_module(name), name), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def toy(toy_documents: Path) -> Toy:
    from modelwright.data.pipeline import PrepareConfig
    from modelwright.ops.make import make_data, make_tokenizer
    from modelwright.train.loop import LoopConfig
    from modelwright.train.pretrain import PretrainConfig, ShapeConfig, run_pretrain

    root = toy_documents.parent
    made = make_data(toy_documents, root / "data", PrepareConfig(validation_fraction=0.2))
    assert made.pairs is not None
    make_tokenizer(root / "data", root / "tokenizer", vocab_size=512)
    shape = ShapeConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)
    loop = LoopConfig(num_steps=3, micro_batch_size=2, compile=False)
    config = PretrainConfig(root / "data", root / "tokenizer", root / "model", max_seq_len=512, shape=shape, loop=loop)
    run_pretrain(config)
    return Toy(toy_documents, root / "data", made.pairs, root / "tokenizer", root / "model")
