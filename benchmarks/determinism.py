"""A thousand mixed requests, each alone and all together: how many different outputs, and what sameness costs.

    python benchmarks/determinism.py [--requests 1000] [--kinds bf16 int8 int4 kv8 kv4 mamba] [--json FILE]
    python benchmarks/determinism.py --kinds bf16 --cuttings together speculation --no-cost --json PART.json
    python benchmarks/determinism.py --join PART.json PART.json --json FILE

A random model (hidden 64, 3 layers; lively outputs) answers requests of mixed lengths, temperatures, penalties and
shared beginnings: each alone, then all together in random order under other chunk sizes, block sizes, a memory so small
that requests are preempted, with speculation, and with 1 and 2 threads. An output is token ids and log-probabilities,
compared bit by bit; the promise is one distinct output a request. int8 and int4 are weights in the compiled step, kv8
and kv4 a rounded cache, mamba a model with recurrent layers.

The cost is that of attention's canonical shape in bf16 (tiles of 4 query rows, for a token alone as few as have the
same bits, keys up to a multiple of 128): tokens a second of eight users in turns with the same engine in the shapes
that suit each kind of step and promise nothing: one query row for decoding, sixteen for reading prompts, keys up to a
multiple of 16, or of 128 where that is faster. With ``--clock cpu`` one thread's own time is counted, which other work
disturbs less.
"""

import argparse
import hashlib
import json
import random
import statistics
import sys
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
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
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


def trial(kind: str, count: int, cuttings: list[str]) -> dict[str, Any]:
    """Return the outputs of each request of one kind, as short hashes, and how often a cutting differed from alone."""
    model, (prompts, params) = make_model(kind), make_requests(count)
    torch.set_num_threads(1)
    llm = LLM(model, config=EngineConfig(kv_dtype={"kv8": "int8", "kv4": "int4"}.get(kind), has_prefix_cache=False))
    alone = [llm.generate(p, q)[0] for p, q in zip(prompts, params, strict=True)]
    first = [_name((c.token_ids, c.logprobs)) for c in alone]
    outputs = [{name} for name in first]
    differing, rng = {}, random.Random(1)
    for name in cuttings:
        if kind == "mamba" and name == "speculation":
            continue  # refused: a recurrent state cannot go back behind a wrong guess
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = answers(model, kind, prompts, params, rng.sample(range(count), count), **CUTTINGS[name])
            names = [_name(output) for output in found]
            differing[f"{name}, threads {threads}"] = sum(a != b for a, b in zip(names, first, strict=True))
            for seen, output in zip(outputs, names, strict=True):
                seen.add(output)
    return {"outputs": [sorted(seen) for seen in outputs], "differing": differing}


def _name(output: Any) -> str:
    return hashlib.blake2b(repr(output).encode(), digest_size=8).hexdigest()


def summary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what several parts of one kind's trial have found."""
    seen = [{name for trial in trials for name in trial["outputs"][i]} for i in range(len(trials[0]["outputs"]))]
    differing = {name: number for trial in trials for name, number in trial["differing"].items()}
    return {
        "requests": len(seen),
        "runs of each": 1 + len(differing),
        "distinct outputs": sum(map(len, seen)),
        "most outputs of a request": max(map(len, seen)),
        "differing": differing,
    }


def set_tiles(llm: LLM, query_tile: int, key_tile: int, decode_rows: int) -> None:
    """Change the shape of attention."""
    llm.engine.runner.planner.decode_rows = decode_rows
    for module in (runner, *(m for name, m in sys.modules.items() if name == "modelwright.nn.tiles")):
        module.QUERY_TILE, module.KEY_TILE = query_tile, key_tile  # type: ignore[attr-defined]


def timed(llm: LLM, prompts: list[list[int]], params: SamplingParams, clock: Any) -> tuple[float, float]:
    """Return the seconds of all steps that read prompts, and of all that only decode."""
    for prompt in prompts:
        llm.engine.add(prompt, params)
    reading = decoding = 0.0
    while llm.engine.has_work:
        is_decode = all(r.num_output for r in llm.engine.scheduler.requests())
        start = clock()
        llm.engine.step()
        seconds = clock() - start
        reading, decoding = (reading, decoding + seconds) if is_decode else (reading + seconds, decoding)
    return reading, decoding


def cost(rounds: int, clock_name: str) -> list[dict[str, Any]]:
    """Return tokens a second of eight users with the canonical shape and with what each kind of step does best in."""
    torch.set_num_threads(2 if clock_name == "wall" else 1)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, num_layers=8, num_heads=6, num_kv_heads=2,
        max_seq_len=1024,
    )  # fmt: skip
    llm = LLM(init_weights(Llama(config), 0).bfloat16().eval(), config=EngineConfig(has_prefix_cache=False))
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 4096) for _ in range(300)] for _ in range(8)]
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    canonical = (4, 128, llm.engine.runner.planner.decode_rows)
    shapes = {"canonical": canonical, "reading": (16, 16, 1), "decoding": (1, 16, 1), "decoding by 128": (1, 128, 1)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in shapes}
    for round_number in range(rounds + 1):
        for name in random.Random(round_number).sample(list(shapes), len(shapes)):
            set_tiles(llm, *shapes[name])
            seconds = timed(llm, prompts, params, CLOCKS[clock_name])
            if round_number:
                found[name].append(seconds)
    set_tiles(llm, *canonical)
    middle = {name: [statistics.median(pass_[i] for pass_ in passes) for i in (0, 1)] for name, passes in found.items()}
    print(json.dumps(found), canonical, flush=True)
    (reading, decoding), free_reading = middle["canonical"], middle["reading"][0]
    best = min(("decoding", "decoding by 128"), key=lambda name: middle[name][1])
    free_decoding, keys = middle[best][1], shapes[best][1]
    num_read, num_drawn = 8 * 300, 8 * 63  # the first token comes with the prompt
    name = "decode, eight users behind 300 tokens"
    return [
        _row(name, num_drawn, decoding, free_decoding, f"a query row, {keys} keys", rounds),
        _row("prompts of 300, eight at once", num_read, reading, free_reading, "16 query rows, 16 keys", rounds),
        _row("both", num_read + num_drawn, reading + decoding, free_reading + free_decoding, "the better", rounds),
    ]


def _row(name: str, tokens: int, seconds: float, other: float, other_name: str, runs: int) -> dict[str, Any]:
    return {"name": name, "ours": tokens / seconds, "rival": tokens / other, "rival_name": f"attention by {other_name}",
            "ratio": other / seconds, "unit": "tokens/s", "runs": runs}  # fmt: skip


def _promise(kind: str, told: dict[str, Any]) -> dict[str, Any]:
    outputs, requests = told["distinct outputs"], told["requests"]
    name = f"{kind}: different outputs of {requests:,} requests, each computed in {told['runs of each']} ways"
    return {"name": name, "ours": outputs, "rival": requests, "rival_name": "one of each request",
            "ratio": outputs / requests, "unit": "outputs", "runs": told["runs of each"]}  # fmt: skip


def main() -> None:
    """Run the trials that were asked for, or join parts, and print what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--cuttings", nargs="*", choices=CUTTINGS, default=list(CUTTINGS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--no-cost", action="store_true")
    parser.add_argument("--join", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    parts: list[dict[str, Any]] = [json.loads(path.read_text()) for path in arguments.join or ()]
    if not parts:
        parts = [{"trials": {kind: trial(kind, arguments.requests, arguments.cuttings)}} for kind in arguments.kinds]
        parts += [] if arguments.no_cost else [{"rows": cost(arguments.rounds, arguments.clock)}]
    trials: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        for kind, one in part.get("trials", {}).items():
            trials.setdefault(kind, []).append(one)
    result: dict[str, Any] = {kind: summary(found) for kind, found in trials.items()}
    result["rows"] = [_promise(kind, told) for kind, told in result.items()]
    result["rows"] += [row for part in parts for row in part.get("rows", ()) if row["unit"] == "tokens/s"]
    print(json.dumps(result, indent=1))
    if arguments.json:
        kept = {} if arguments.join else {"trials": {kind: found[0] for kind, found in trials.items()}}
        write_result(arguments.json, result | kept)


if __name__ == "__main__":
    main()
