"""Every feature of the engine with every other: run, compared, and written as a table into docs/engine.md.

    python benchmarks/compatibility.py [--write] [--json FILE]
    python benchmarks/compatibility.py --rows 0 1 2 --json PART.json
    python benchmarks/compatibility.py --join PART.json PART.json --write --json FILE

A cell is run with both features on: four requests together and each alone must give the same token ids, and those must
be the same with features switched off that promise to change nothing (prefix cache, chunks, preemption, speculation).
*works* says that this held; *refused* that the pair is turned away with an error that names it; a dash that the two
are kinds of model, of which there is one. Anything else is a red cell, and ends this script with an error.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from modelwright.base.errors import ConfigError, RequestError
from modelwright.base.measured import write_result
from modelwright.base.types import Completion, SamplingParams
from modelwright.engine.engine import EngineConfig
from modelwright.engine.llm import LLM
from modelwright.engine.prepare import rounded
from modelwright.engine.speculative import SpeculationConfig
from modelwright.models.hybrid import Hybrid, HybridConfig
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.mamba import Mamba, MambaConfig
from modelwright.models.multi_token import MultiTokenDecoder, save_heads
from modelwright.nn.init import init_weights
from modelwright.nn.ssd import SsdShape
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.train import train_bpe

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. "
PROMPTS = (TEXT[:60], TEXT[:60] + "fox", "box " * 9, "a")
VOCAB_SIZE = 300
SIZES = dict(hidden_size=64, intermediate_size=192, num_layers=3, num_heads=4, num_kv_heads=2, max_seq_len=256)
PAGE = Path(__file__).parents[1] / "docs" / "engine.md"
BEGIN, END = "<!-- compatibility: begin -->", "<!-- compatibility: end -->"


@dataclass(frozen=True)
class Feature:
    """One feature: what it does to the engine, to the requests, or which model it is."""

    name: str
    engine: dict[str, Any] | None = None
    params: dict[str, Any] | None = None
    model: Callable[[], Any] | None = None
    weights: str | None = None
    changes_nothing: bool = False  # it promises the tokens that come without it
    without: dict[str, Any] | None = None  # what the engine keeps when the feature is left out
    has_adapter: bool = False


def lively(model: Any) -> Any:
    """Return a random model whose next token depends on what came before."""
    init_weights(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return model.bfloat16().eval()


def llama(window: int | None = None) -> Any:
    """Return the model of most cells."""
    family = "mistral" if window else "llama"
    return lively(Llama(LlamaConfig(vocab_size=VOCAB_SIZE, **SIZES, sliding_window=window, family=family)))


def hybrid() -> Any:
    """Return a model of recurrent and attention layers."""
    mixer = SsdShape(num_heads=4, head_dim=32, state_size=8)
    config = HybridConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, num_layers=2, attention_layers=(1,), mixer=mixer, max_seq_len=256
    )
    return lively(Hybrid(config))


def mamba() -> Any:
    """Return a model of recurrent layers alone."""
    return lively(Mamba(MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=64, num_layers=2, max_seq_len=256)))


def features(folder: Path) -> list[Feature]:
    """Return all features; the heads and the adapter stand in ``folder``."""
    same: dict[str, Any] = {"changes_nothing": True}

    def guess(method: str, **settings: Any) -> dict[str, Any]:
        return {"speculation": SpeculationConfig(method, is_timed=False, **settings)}

    heads = guess("medusa", draft=folder) | {"kernels": "plain"}  # the compiled step tells no hidden states
    return [
        Feature("prefix cache", {"has_prefix_cache": True}, **same),
        Feature("chunked prefill", {"max_tokens_per_step": 13}, **same),
        Feature("preemption", {"num_blocks": 9}, **same),
        Feature("n-gram speculation", guess("ngram"), **same),
        Feature("draft model", guess("draft", draft=llama()), **same),
        Feature("early exit", guess("early_exit", num_layers=1), **same),
        Feature("Medusa heads", heads, **same, without={"kernels": "plain"}),
        Feature("grammar", params={"regex": "(fox |box ){2,5}"}),
        Feature("log-probabilities", params={"logprobs": 3}),
        Feature("prompt log-probabilities", params={"prompt_logprobs": True}),
        Feature("n", params={"n": 3}),
        Feature("best-of", params={"best_of": 4}),
        Feature("beam search", params={"beam_width": 3}),
        Feature("penalties", params={"frequency_penalty": 0.5, "repetition_penalty": 1.3}),
        Feature("int8 cache", {"kv_dtype": "int8"}),
        Feature("int4 cache", {"kv_dtype": "int4"}),
        Feature("int8 weights", weights="int8"),
        Feature("int4 weights", weights="int4"),
        Feature("compiled step, bf16", {"kernels": "native"}),
        Feature("sliding window", model=lambda: llama(24)),
        Feature("hybrid model", model=hybrid),
        Feature("Mamba", model=mamba),
        Feature("adapter", has_adapter=True),
        Feature("tensor parallel", {"tensor_parallel": 2}),
        Feature("no jump-forward", {"has_jump_forward": False}, **same),
    ]


def write_parts(folder: Path) -> None:
    """Write Medusa heads and an adapter for the Llama."""
    model = MultiTokenDecoder(llama(), 2)
    save_heads(model, folder)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    generator, tensors = torch.Generator().manual_seed(3), {}
    for layer in range(3):
        for name, out in (("q_proj", 64), ("v_proj", 32)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora"
            tensors[f"{stem}_A.weight"] = torch.randn(4, 64, generator=generator) * 0.2
            tensors[f"{stem}_B.weight"] = torch.randn(out, 4, generator=generator) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")


def build(chosen: tuple[Feature, ...], tokenizer: Tokenizer, folder: Path) -> LLM:
    """Return an engine with these features."""
    make = next((f.model for f in chosen if f.model), llama)
    model = make()
    weights = next((f.weights for f in chosen if f.weights), None)
    if weights is not None:
        model = rounded(model, weights)
    settings: dict[str, Any] = {"has_prefix_cache": False, "max_context": 128}
    for feature in chosen:
        settings |= feature.engine or {}
    llm = LLM(model, tokenizer=tokenizer, config=EngineConfig(**settings))
    if any(f.has_adapter for f in chosen):
        try:
            llm.load_adapter("changed", folder)
        except ConfigError:
            llm.close()
            raise
    return llm


def ask(chosen: tuple[Feature, ...], tokenizer: Tokenizer, folder: Path, together: bool) -> list[Any]:
    """Return the answers to all prompts, twice, so that a cache is warm the second time."""
    settings: dict[str, Any] = {"max_tokens": 14, "seed": 5}
    for feature in chosen:
        settings |= feature.params or {}
    if "beam_width" not in settings:
        settings["temperature"] = 0.8
    params = SamplingParams(**settings)
    adapter = "changed" if any(f.has_adapter for f in chosen) else None
    llm = build(chosen, tokenizer, folder)
    try:
        if together:
            done = llm.generate(PROMPTS, params, adapter=adapter)
            assert _shown(done) == _shown(llm.generate(PROMPTS, params, adapter=adapter)), "the second time differs"
        else:
            done = [llm.generate(prompt, params, adapter=adapter)[0] for prompt in PROMPTS]
        llm.engine.pool.check([])
    finally:
        llm.close()
    return _shown(done)


def _shown(done: list[Completion]) -> list[Any]:
    return [[(c.token_ids, c.text) for c in (one, *one.others)] for one in done]


def cell(first: Feature, second: Feature, tokenizer: Tokenizer, folder: Path) -> tuple[str, str]:
    """Return what happens to a pair, and the error's text."""
    if first.model and second.model or (first.weights and second.weights):
        return "—", ""
    if first.engine and second.engine and set(first.engine) & set(second.engine):
        return "—", ""
    pair = (first, second)
    try:
        found = ask(pair, tokenizer, folder, together=True)
        if found != ask(pair, tokenizer, folder, together=False):
            return "RED", "together and alone differ"
        plain = tuple(Feature(f.name, f.without) if f.changes_nothing else f for f in pair)
        if plain != pair and found != ask(plain, tokenizer, folder, together=True):
            return "RED", "differs from the answers without the feature that changes nothing"
    except (ConfigError, RequestError) as error:
        return "refused", str(error)
    except Exception as error:
        return "RED", f"{type(error).__name__}: {error}"
    return "works", ""


def table(names: list[str], cells: dict[tuple[str, str], tuple[str, str]]) -> str:
    """Return the matrix and the refusals as Markdown."""
    marks = {"works": "✓", "refused": "r", "—": "—", "RED": "RED"}
    lines = ["| | " + " | ".join(str(i + 1) for i in range(len(names))) + " |", "|---" * (len(names) + 1) + "|"]
    for i, name in enumerate(names):
        row = [marks[cells[names[min(i, j)], names[max(i, j)]][0]] if i != j else "" for j in range(len(names))]
        lines.append(f"| {i + 1} {name} | " + " | ".join(row) + " |")
    reasons: dict[str, list[str]] = {}
    for (first, second), (kind, why) in cells.items():
        if kind == "refused":
            reasons.setdefault(why, []).append(f"{first} + {second}")
    lines += ["", "✓ works, r refused by name, — not a pair. Refused:", ""]
    lines += [f"- {'; '.join(pairs)}: {why}" for why, pairs in reasons.items()]
    return "\n".join(lines)


def run(rows: list[int] | None) -> tuple[list[str], list[list[str]]]:
    """Return the names of all features, and the cells (first, second, kind, why) of the rows that are asked for."""
    tokenizer = train_bpe([TEXT * 5], vocab_size=VOCAB_SIZE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parts(folder)
        listed = features(folder)
        cells = []
        for (i, first), (_, second) in itertools.combinations(enumerate(listed), 2):
            if rows is None or i in rows:
                kind, why = cell(first, second, tokenizer, folder)
                cells.append([first.name, second.name, kind, why.replace(name, "FOLDER")])
                print(*cells[-1], sep=" | ", flush=True)
    return [f.name for f in listed], cells


def main() -> None:
    """Run every pair, or those of some rows, or join the results of parts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="*", help="the numbers of features, from 0; left out: all")
    parser.add_argument("--join", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true", help="put the table into docs/engine.md")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.join:
        names = [f.name for f in features(Path("FOLDER"))]
        listed = [one for part in arguments.join for one in json.loads(part.read_text())["cells"]]
    else:
        names, listed = run(arguments.rows)
    cells = {(first, second): (kind, why) for first, second, kind, why in listed}
    if arguments.rows is None:
        text = table(names, cells)
        print(text)
        if arguments.write:
            page = PAGE.read_text(encoding="utf-8")
            before, rest = page.split(BEGIN)
            PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    if arguments.json:
        write_result(arguments.json, {"cells": listed})
    red = {pair: why for pair, (kind, why) in cells.items() if kind == "RED"}
    if red:
        raise SystemExit(f"{len(red)} red cells: {red}")


if __name__ == "__main__":
    main()
