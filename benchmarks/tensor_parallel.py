"""One model over two processes beside one process: tokens a second, one thread each, on one machine's CPU.

    python benchmarks/tensor_parallel.py [--layers 4] [--rounds 2] [--json FILE]

A Llama of random weights in bfloat16 (hidden 1,024, 16/8 heads of 64, mlp 3,072, vocabulary 32,000) reads a prompt of
512 tokens and writes for one user and for eight: by two processes of one thread, one process of one thread, one process
of two threads, in turn. Prompts are new in each round, so that nothing is found in the cache. Medians; and whether the
greedy tokens are the same. Two processes add their parts twice a layer, in other roundings, so a near tie may fall
the other way.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from modelwright.base.measured import write_result
from modelwright.base.types import SamplingParams
from modelwright.engine.engine import EngineConfig
from modelwright.engine.llm import LLM
from modelwright.models.llama import Llama, LlamaConfig

PROMPT = 512
WRITTEN = 24
VOCAB = 32_000
WAYS = {"2 processes, 1 thread each": 2, "1 process, 1 thread": 1, "1 process, 2 threads": 1}


def make_model(num_layers: int) -> Llama:
    """Return the model with random weights."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCAB, hidden_size=1024, intermediate_size=3072, num_layers=num_layers, num_heads=16,
        num_kv_heads=8, max_seq_len=1024,
    )  # fmt: skip
    return Llama(shape).to(torch.bfloat16)


def prompts(num: int, length: int, seed: int) -> list[list[int]]:
    """Return prompts that no other call returns."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (num, length), generator=generator).tolist()


def measure(llm: LLM, seed: int) -> tuple[dict[str, float], list[Any]]:
    """Return tokens a second of a prompt and of writing, and what was written."""
    found: dict[str, float] = {}
    written: list[Any] = []
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    begun = time.perf_counter()
    llm.generate(prompts(1, PROMPT, seed), params)
    found[f"prefill, {PROMPT} tokens"] = PROMPT / (time.perf_counter() - begun)
    for num in (1, 8):
        texts = prompts(num, 16, seed + num)
        llm.generate(texts, params)  # now the prompts stand in the cache, but for their last tokens
        begun = time.perf_counter()
        done = llm.generate(texts, SamplingParams(temperature=0, max_tokens=WRITTEN, ignore_eos=True))
        found[f"decode, {num} user{'s' if num > 1 else ''}"] = num * WRITTEN / (time.perf_counter() - begun)
        written += [c.token_ids for c in done]
    return found, written


def main() -> None:
    """Measure all ways in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = make_model(arguments.layers)
    torch.set_num_threads(2)  # an engine of several processes gives each its share of these
    engines = {ranks: LLM(model, config=EngineConfig(tensor_parallel=ranks)) for ranks in (1, 2)}
    runs: dict[str, dict[str, list[float]]] = {}
    tokens: dict[str, list[Any]] = {way: [] for way in WAYS}
    for number in range(arguments.rounds + 1):
        for way, ranks in WAYS.items():
            torch.set_num_threads(1 if way.endswith("1 thread") else 2)
            found, written = measure(engines[ranks], 1000 * number)
            tokens[way] += written
            for name, value in found.items() if number else ():  # the first round warms up
                runs.setdefault(name, {}).setdefault(way, []).append(value)
    engines[2].close()
    two, *others = WAYS
    rows: list[dict[str, Any]] = []
    for name, by_way in runs.items():
        for other in others:
            ours, rival = (statistics.median(by_way[way]) for way in (two, other))
            rows.append(
                {"name": f"{name}, {two}", "ours": ours, "rival": rival, "rival_name": other, "ratio": ours / rival,
                 "unit": "tokens/s", "runs": {"ours": by_way[two], "rival": by_way[other]}}
            )  # fmt: skip
    same = [sum(a == b for a, b in zip(tokens[two], tokens[other], strict=True)) for other in others]
    rows.append(
        {"name": "the same greedy answers", "ours": same[0], "rival": len(tokens[two]), "rival_name": "all",
         "ratio": same[0] / len(tokens[two]), "unit": "answers", "runs": 1}
    )  # fmt: skip
    for row in rows:
        print(f"{row['name']}: {row['ours']:.1f}, {row['rival_name']} {row['rival']:.1f} ({row['ratio']:.2f})")
    if arguments.json:
        write_result(arguments.json, {"parameters": sum(p.numel() for p in model.parameters()), "rows": rows})


if __name__ == "__main__":
    main()
