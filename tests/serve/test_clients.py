"""Real clients of others against a real server, each in the interpreter that has it (``make clients``)."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from modelwright.base.env import read
from modelwright.engine.engine import EngineConfig
from modelwright.engine.stream import AsyncEngine
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.serve.app import ServeConfig, create_app
from modelwright.tokenizer.train import train_bpe

SCRIPTS = Path(__file__).parent / "clients"
ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.peer, pytest.mark.service]
NEEDED = {
    "langchain_openai": "langchain_openai",
    "llama_index_openai_like": "llama_index.llms.openai_like",
    "litellm_client": "litellm",
    "lm_eval_harness": "lm_eval",
}


def interpreter(script: str) -> str:
    """Return the Python that has the client's package, or skip with the reason."""
    folder = Path(read("MODELWRIGHT_CLIENTS") or ROOT / ".venv-clients")
    python = folder / "bin" / "python"
    found = f"import importlib.util as u, sys; sys.exit(u.find_spec('{NEEDED[script].split('.')[0]}') is None)"
    if python.exists() and subprocess.run([python, "-c", found], check=False).returncode == 0:
        return str(python)
    if importlib.util.find_spec(NEEDED[script].split(".")[0]):
        return sys.executable
    pytest.skip(f"{NEEDED[script]} is not installed: make clients, or name its environment with MODELWRIGHT_CLIENTS")


def run_client(script: str, *arguments: Any) -> str:
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONSAFEPATH": "1"}
    command = [interpreter(script), str(SCRIPTS / f"{script}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=settings, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def tiny(start: Any) -> Iterator[Any]:
    """A server of a tiny random model with room for the text of tools."""
    tokenizer = train_bpe(["The list of paths, plain words, äöü. Rain in Ulm and Bonn."] * 3, 300)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4,
        num_kv_heads=2, max_seq_len=2048,
    )  # fmt: skip
    config = EngineConfig(dtype="bfloat16", device="cpu", num_blocks=400)
    with AsyncEngine(Llama(shape), tokenizer=tokenizer, config=config) as engine:
        app = create_app(ServeConfig(), engine, engine.tokenizer, "tiny", None, None)
        with start(app, engine) as running:
            yield running


@pytest.mark.parametrize("script", ["langchain_openai", "llama_index_openai_like", "litellm_client"])
def test_the_client_gets_what_it_asks_for(script: str, tiny: Any):
    assert "ok" in run_client(script, tiny.url, "tiny")
    tiny.wait_until_idle()


QUESTIONS = [
    ("Rain in", [" Ulm", " Bonn"], 0),
    ("The list of", [" paths", " lines"], 1),
    ("Plain words", [" äöü", " x"], 0),
]


def test_the_evaluation_harness_gets_the_scores_of_the_engine_itself(tiny: Any, tmp_path: Path):
    (tmp_path / "rain.jsonl").write_text(
        "".join(json.dumps({"question": q, "choices": c, "gold": g}) + "\n" for q, c, g in QUESTIONS)
    )
    (tmp_path / "rain.yaml").write_text(
        f"task: rain\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rain.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    tiny.engine.tokenizer.save(tmp_path / "tokenizer")
    out = run_client("lm_eval_harness", tiny.url, "tiny", tmp_path / "tokenizer", tmp_path)
    told = json.loads(next(line for line in out.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))

    model, tokenizer = tiny.engine.engine.model, tiny.engine.tokenizer
    right = 0
    for (question, choices, gold), theirs in zip(QUESTIONS, told["scores"], strict=True):
        own = []
        for choice in choices:
            context = tokenizer.encode(question)
            whole = tokenizer.encode(question + choice)
            with torch.no_grad():
                logprobs = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
            own.append(sum(float(logprobs[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        right += max(range(len(own)), key=own.__getitem__) == gold
        assert theirs == pytest.approx(own, abs=0.02)  # bfloat16, a cache in place of one pass
    assert told["acc"] == pytest.approx(right / len(QUESTIONS))
