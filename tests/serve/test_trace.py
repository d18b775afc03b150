"""A trace holds what was asked and what came; its replay finds the same tokens, and says where they part."""

import concurrent.futures
import dataclasses
import json
import os
import stat

import pytest
import torch

from modelwright.base.config import build
from modelwright.base.errors import DataError
from modelwright.cli.main import main
from modelwright.engine.engine import EngineConfig
from modelwright.engine.llm import LLM
from modelwright.engine.speculative import SpeculationConfig
from modelwright.engine.stream import AsyncEngine
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.weights import save_model
from modelwright.serve.app import ServeConfig, create_app
from modelwright.serve.trace import Trace, engine_settings, read_trace, replay
from modelwright.tokenizer.train import train_bpe

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def traced(start, tmp_path_factory):
    """A server that was asked in every way at once; gives the trace and the model."""
    path = tmp_path_factory.mktemp("trace") / "deep" / "trace.jsonl"
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=256
    )
    tokenizer = train_bpe(["the heap is a heap of heaps and queues " * 20], 300)
    model = Llama(shape).to(torch.bfloat16)
    settings = EngineConfig(dtype="bfloat16", device="cpu", num_blocks=60, max_tokens_per_step=32)
    with AsyncEngine(model, tokenizer=tokenizer, config=settings) as engine:
        app = create_app(ServeConfig(trace_file=path), engine, tokenizer, "tiny", None, None)
        with start(app, engine) as server:
            client = server.client()

            def ask(i):
                more = [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.8, "seed": i, "top_p": 0.9}][i % 3]
                texts = {"model": "tiny", "prompt": ["the heap " * (1 + i % 5), "queues"][: 1 + i % 2]}
                return client.completions.create(**texts, max_tokens=10 + i, n=1 + i % 2, **more)

            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                list(pool.map(ask, range(24)))
            stream = client.completions.create(
                model="tiny", prompt="the", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(stream))
            stream.close()
            server.wait_until_idle()
    return path, model, tokenizer, settings


def test_every_completion_comes_out_the_same_alone(traced):
    path, model, tokenizer, settings = traced
    found = replay(path, LLM(model, tokenizer=tokenizer, config=settings))
    assert found.num_completions == 12 * 1 + 12 * 4 + 1
    assert found.differences == [] and found.num_tokens > 500 and found.num_skipped == 0
    kinds = [row["finish_reason"] for _, row in read_trace(path) if row["kind"] == "completion"]
    assert kinds.count("abort") == 1
    assert all(row["params"]["seed"] is not None for _, row in read_trace(path) if row["kind"] == "completion")


def test_another_model_or_a_changed_token_is_found(traced, tmp_path):
    path, model, tokenizer, settings = traced
    lines = path.read_text().splitlines()
    row = json.loads(lines[5])
    row["token_ids"][3] += 1
    changed = tmp_path / "changed.jsonl"
    changed.write_text("\n".join([*lines[:5], json.dumps(row), *lines[6:]]) + "\n")
    found = replay(changed, LLM(model, tokenizer=tokenizer, config=settings))
    assert [(d.line, d.at, d.was) for d in found.differences] == [(6, 3, row["token_ids"][3])]
    torch.manual_seed(1)
    other = LLM(type(model)(model.config), tokenizer=tokenizer, config=settings)
    found = replay(path, other)
    assert found.num_completions == 0 and found.num_skipped == len(lines) - 1


def test_the_file_is_its_owners_and_survives_a_cut(traced, tmp_path):
    path, *_ = traced
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert engine_settings(path)["max_tokens_per_step"] == 32
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(path.read_bytes()[:-20])
    assert len(list(read_trace(cut))) == len(list(read_trace(path))) - 1
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"kind": "poem"}\n')
    with pytest.raises(DataError, match="line 1: kind is 'poem'"):
        list(read_trace(strange))
    with pytest.raises(DataError, match="does not exist"):
        list(read_trace(tmp_path / "none.jsonl"))


def test_whoever_guesses_is_no_part_of_a_trace(traced, tmp_path):
    _, model, tokenizer, settings = traced
    guessed = dataclasses.replace(settings, speculation=SpeculationConfig("draft", draft=tmp_path / "draft"))
    trace = Trace(tmp_path / "trace.jsonl", model, guessed)  # a path, or a model, that JSON has no word for
    trace.close()
    assert build(EngineConfig, engine_settings(tmp_path / "trace.jsonl")) == settings


def test_the_verb_replays_a_folder(traced, tmp_path, capsys):
    path, model, tokenizer, _ = traced
    save_model(model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    assert main(["replay", str(path), str(tmp_path / "model")]) == 0
    assert "61 of 61 completions are the same" in " ".join(capsys.readouterr().out.split())
