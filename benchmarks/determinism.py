"""A thousand mixed requests, each alone and all together: how many different outputs, and what sameness costs.

    python benchmarks/determinism.py [--requests 1000] [--kinds bf16 int8 int4 kv8 kv4 mamba] [--json FILE]

A random model (hidden 64, 3 layers; lively outputs) answers requests of mixed lengths, temperatures, penalties and
shared beginnings: each alone, then all together in random order under other chunk sizes, block sizes, a memory so small
that requests are preempted, with speculation, and with 1 and 2 threads. An output is token ids and log-probabilities,
compared bit by bit; the promise is one distinct output a request. int8 and int4 are weights in the compiled step, kv8
and kv4 a rounded cache, mamba a model with recurrent layers.

The cost is that of attention's canonical shape in bf16 (tiles of 4 query rows, keys up to a multiple of 128) beside the
same step with one query row and keys up to a multiple of 16: tokens a second of eight users, in turns.
"""

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import modelwright.engine.runner as runner
from modelwright.base.measured import write_result
from modelwright.base.types import SamplingParams
from modelwright.engine.engine import EngineConfig
from modelwright.engine.llm import LLM
from modelwright.engine.prepare import rounded
from modelwright.engine.speculative import SpeculationConfig
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.mamba import Mamba, MambaConfig
from modelwright.nn.init import init_weights

VOCAB_SIZE = 320
KINDS = ("bf16", "int8", "int4", "kv8", "kv4", "mamba")
CUTTINGS: dict[str, dict[str, Any]] = {
    "together": {},
    "chunks of 16 tokens": {"max_tokens_per_step": 16},
    "blocks of 32": {"block_size": 32},
    "too little memory": {"num_blocks": 24},
    "speculation": {"speculation": SpeculationConfig(is_timed=False)},
}


def make_model(kind: str) -> Any:
    """Return a random model whose next token depends on what came before."""
    if kind == "mamba":
        model: Any = Mamba(MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=64, num_layers=2, max_seq_len=256))
    else:
        sizes = dict(hidden_size=64, intermediate_size=192, num_layers=3, num_heads=4, num_kv_heads=2, max_seq_len=256)
        model = Llama(LlamaConfig(vocab_size=VOCAB_SIZE, **sizes))
    init_weights(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    model = model.bfloat16().eval()
    return rounded(model, kind) if kind in ("int8", "int4") else model


def make_requests(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Return prompts, many of which begin alike, and how each is completed."""
    rng = random.Random(0)
    beginnings = [[rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(16, 120))] for _ in range(12)]
    prompts, params = [], []
    for i in range(count):
        start = rng.choice(beginnings)
        tail = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 40))]
        prompts.append(start[: rng.randint(1, len(start))] + (tail * 3)[: rng.randint(1, 60)])
        params.append(
            SamplingParams(
                temperature=rng.choice((0.0, 0.7, 1.0)),
                top_p=rng.choice((1.0, 0.9)),
                frequency_penalty=rng.choice((0.0, 0.0, 0.3)),
                seed=i,
                max_tokens=rng.randint(1, 16),
                ignore_eos=True,
            )
        )
    return prompts, params


def answers(model: Any, kind: str, prompts: list, params: list, order: list[int], **sizes: Any) -> list:
    """Return each request's output, however they are computed together."""
    kv_dtype = {"kv8": "int8", "kv4": "int4"}.get(kind)
    llm = LLM(model, config=EngineConfig(kv_dtype=kv_dtype, **sizes))
    if kind in ("int8", "int4"):
        assert type(llm.engine.runner).__name__ == "NativeRunner", "the promise is the compiled step's"
    done = llm.generate([prompts[i] for i in order], [params[i] for i in order])
    llm.engine.pool.check([])
    found: list = [None] * len(order)
    for place, completion in zip(order, done, strict=True):
        found[place] = (completion.token_ids, completion.logprobs)
    return found


def trial(kind: str, count: int) -> dict[str, Any]:
    """Return how many requests of one kind have more than one output."""
    model, (prompts, params) = make_model(kind), make_requests(count)
    torch.set_num_threads(1)
    llm = LLM(model, config=EngineConfig(kv_dtype={"kv8": "int8", "kv4": "int4"}.get(kind), has_prefix_cache=False))
    alone = [llm.generate(p, q)[0] for p, q in zip(prompts, params, strict=True)]
    outputs = [{(c.token_ids, c.logprobs)} for c in alone]
    differing, rng = {}, random.Random(1)
    for name, sizes in CUTTINGS.items():
        if kind == "mamba" and name == "speculation":
            continue
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = answers(model, kind, prompts, params, rng.sample(range(count), count), **sizes)
            differing[f"{name}, threads {threads}"] = sum(
                f != (c.token_ids, c.logprobs) for f, c in zip(found, alone, strict=True)
            )
            for seen, output in zip(outputs, found, strict=True):
                seen.add(output)
    distinct = sum(len(seen) for seen in outputs)
    return {"requests": count, "runs of each": 1 + len(differing), "distinct outputs": distinct, "differing": differing}


def cost(rounds: int = 5) -> dict[str, Any]:
    """Return tokens a second of eight users with the canonical shape and without."""
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, num_layers=8, num_heads=6, num_kv_heads=2,
        max_seq_len=1024,
    )  # fmt: skip
    llm = LLM(init_weights(Llama(config), 0).bfloat16().eval(), config=EngineConfig(has_prefix_cache=False))
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 4096) for _ in range(300)] for _ in range(8)]
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    speeds: dict[bool, list[float]] = {True: [], False: []}
    for round_number in range(2 * rounds + 2):
        is_canonical = round_number % 2 == 0
        runner.QUERY_TILE, runner.KEY_TILE = (4, 128) if is_canonical else (1, 16)
        start = time.perf_counter()
        llm.generate(prompts, params)
        if round_number > 1:
            speeds[is_canonical].append(8 * 32 / (time.perf_counter() - start))
    runner.QUERY_TILE, runner.KEY_TILE = 4, 128
    same, free = statistics.median(speeds[True]), statistics.median(speeds[False])
    return {
        "name": "eight users, 300 tokens of prompt and 32 of completion each",
        "ours": same,
        "rival": free,
        "rival_name": "attention of one query row, keys to a multiple of 16",
        "ratio": same / free,
        "unit": "tokens/s",
        "runs": rounds,
    }


def main() -> None:
    """Run the trials that were asked for and print what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--no-cost", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    for kind in arguments.kinds:
        result[kind] = trial(kind, arguments.requests)
        print(kind, result[kind], flush=True)
    if not arguments.no_cost:
        result["rows"] = [cost()]
        print(result["rows"][0])
    if arguments.json:
        write_result(arguments.json, result)


if __name__ == "__main__":
    main()
