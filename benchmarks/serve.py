"""Generation on a CPU beside llama.cpp and transformers: one user, prompts, eight users; batching, paging, starting.

    python benchmarks/serve.py --folder runs/serve [--rival-python PYTHON] [--rounds 5] [--only NAME ...] [--json FILE]

The model is a Llama of 0.5B parameters with random weights (hidden 1024, 28 layers, 16/8 heads of 128, mlp 3072,
vocabulary 32,000): speed does not depend on what the weights say. Ours rounds them to 4 bits in groups of 32 and the
output matrix to 8; llama.cpp's file is our export, rounded by llama.cpp itself to Q4_0 (its output matrix is Q6_K).
PYTHON is an interpreter with llama-cpp-python, built with GGML_NATIVE=ON; without it those rows are left out. Both get
the same prompts and draw greedily; rounds alternate, and the median of each side is shown. Threads: as many as torch
takes (OMP_NUM_THREADS). On a machine with other work, ``--clock cpu`` with one thread counts each side's own CPU time
instead of the time that passes. "seconds to first token" are of a fresh process each, from the engine's constructor on.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from modelwright.base.measured import write_result
from modelwright.base.types import SamplingParams
from modelwright.engine.engine import Engine, EngineConfig
from modelwright.models.gguf import write_gguf
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.weights import load_model, save_model
from modelwright.nn.kernels import build
from modelwright.nn.kernels.packed import round_linear
from modelwright.nn.linear import linears, replace_module
from modelwright.nn.lowbit import quantization_config

SHAPE = LlamaConfig(
    vocab_size=32000, hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16, num_kv_heads=8,
    head_dim=128, max_seq_len=4096,
)  # fmt: skip
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CLOCK = "wall"
WORKER = Path(__file__).with_name("llama_worker.py")
START = """
import sys, time, torch
from modelwright.engine.engine import Engine, EngineConfig
from modelwright.base.types import SamplingParams
from modelwright.models.weights import load_model
start = time.perf_counter()
engine = Engine(load_model(sys.argv[1]))
engine.add(list(range(10, 42)), SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
engine.step()
print(time.perf_counter() - start)
"""


def make_files(folder: Path) -> None:
    """Write the model in bfloat16, in 4 bits, and as GGUF in float16; what is there stays."""
    if not (folder / "bf16" / "config.json").is_file():
        model = Llama(SHAPE)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.02, generator=generator)
        model = model.bfloat16().eval()
        save_model(model, folder / "bf16")
        write_gguf(model, None, folder / "f16.gguf", "f16")
    if not (folder / "int4" / "config.json").is_file():
        model = load_model(folder / "bf16")
        library = build.wait()
        assert library is not None, build.failure()
        for name, layer in list(linears(model)):
            if name != "lm_head":
                replace_module(model, name, round_linear(library, layer, 4, 32))
        model.quantization_config = quantization_config(4, 32, ["lm_head"])
        save_model(model, folder / "int4")


class Rival:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, folder: Path, num_threads: int):
        self.process = subprocess.Popen([python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        settings = {"path": str(folder / "q4_0.gguf"), "source": str(folder / "f16.gguf"), "num_threads": num_threads}
        self.version = self.ask(**settings, context=4096, num_sequences=8, clock=CLOCK)["version"]

    def ask(self, **order: Any) -> dict[str, Any]:
        """Send an order and wait for its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def random_ids(num: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, SHAPE.vocab_size, (num,), generator=generator).tolist()


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def run_single(engine: Engine, prompt: list[int], num_tokens: int) -> dict[str, float]:
    engine.pool.forget_all()
    request = engine.add(prompt, greedy(num_tokens))
    start = CLOCKS[CLOCK]()
    while not request.output_ids:
        engine.step()
    middle = CLOCKS[CLOCK]()
    while engine.has_work:
        engine.step()
    return {"prefill": middle - start, "decode": CLOCKS[CLOCK]() - middle}


def run_users(engine: Engine, shared: list[int], own: list[list[int]], num_tokens: int) -> dict[str, float]:
    """All arrive at once; the first computes the shared beginning, the others find it in the cache."""
    engine.pool.forget_all()
    start = CLOCKS[CLOCK]()
    first = engine.add(shared + own[0], greedy(num_tokens))
    while not first.output_ids:
        engine.step()
    for ids in own[1:]:
        engine.add(shared + ids, greedy(num_tokens))
    while engine.has_work:
        engine.step()
    return {"seconds": CLOCKS[CLOCK]() - start}


def measure_single(engine: Engine, rival: Rival, rounds: int) -> list[dict[str, Any]]:
    """One user: the tokens after a short prompt, and a prompt of 512."""
    short, long, num = random_ids(32, 1), random_ids(512, 2), 64
    ours: dict[str, list[float]] = {"decode": [], "prefill": []}
    theirs: dict[str, list[float]] = {"decode": [], "prefill": []}
    for turn in range(rounds + 1):  # the first round warms both up and is not counted
        ours["decode"].append((num - 1) / run_single(engine, short, num)["decode"])
        theirs["decode"].append((num - 1) / rival.ask(do="single", prompt=short, num_tokens=num)["decode"])
        ours["prefill"].append(512 / run_single(engine, long, 1)["prefill"])
        theirs["prefill"].append(512 / rival.ask(do="single", prompt=long, num_tokens=1)["prefill"])
        print(f"round {turn}: " + ", ".join(f"{k} {ours[k][-1]:.0f} / {theirs[k][-1]:.0f}" for k in ours), flush=True)
    return [
        row("decode, one user, 4 bits", ours["decode"][1:], theirs["decode"][1:], "llama.cpp Q4_0"),
        row("prefill, 512 tokens, 4 bits", ours["prefill"][1:], theirs["prefill"][1:], "llama.cpp Q4_0"),
    ]


def measure_shared(engine: Engine, rival: Rival, rounds: int) -> list[dict[str, Any]]:
    """Eight users after one system prompt: completion tokens a second, everything counted."""
    order = {"shared": random_ids(1000, 3), "own": [random_ids(24, 10 + i) for i in range(8)], "num_tokens": 64}
    ours, batched, serial = [], [], []
    for turn in range(rounds):
        ours.append(8 * 64 / run_users(engine, **order)["seconds"])
        batched.append(8 * 64 / rival.ask(do="users", one_by_one=False, **order)["seconds"])
        if turn == 0:  # takes a minute
            serial.append(8 * 64 / rival.ask(do="users", one_by_one=True, **order)["seconds"])
        print(f"round {turn}: eight users {ours[-1]:.0f} / {batched[-1]:.0f} / {serial[-1]:.0f}", flush=True)
    name = "eight users share 1,000 tokens"
    return [
        row(f"{name}, one batch", ours, batched, "llama.cpp Q4_0, C interface: shared cells, one batch"),
        row(f"{name}, server", ours, serial, "llama.cpp Q4_0, one after the other as llama_cpp.server does"),
    ]


def measure_transformers(engine: Engine, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Eight users with nothing in common, 128 tokens in; 32 out (mostly prompts) and 128 out (mostly answers)."""
    prompts = [random_ids(128, 20 + i) for i in range(8)]
    peer: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "bf16", dtype=torch.bfloat16)
    ids = torch.tensor(prompts)
    rows = []
    for num in (32, 128):
        limits = {"min_new_tokens": num, "max_new_tokens": num, "do_sample": False, "pad_token_id": 0}
        ours, theirs = [], []
        for turn in range(rounds + 1):  # the first round warms both up and is not counted
            start = CLOCKS[CLOCK]()
            run_users(engine, [], prompts, num)
            ours.append(8 * num / (CLOCKS[CLOCK]() - start))
            start = CLOCKS[CLOCK]()
            peer.generate(ids, attention_mask=torch.ones_like(ids), **limits)
            theirs.append(8 * num / (CLOCKS[CLOCK]() - start))
            print(f"round {turn}: transformers, {num} out, {ours[-1]:.0f} / {theirs[-1]:.0f}", flush=True)
        rival_name = f"transformers {transformers.__version__} generate, bf16"
        rows.append(row(f"eight users, 128 in, {num} out", ours[1:], theirs[1:], rival_name))
    return rows


def measure_batching(engine: Engine) -> list[dict[str, Any]]:
    """A mix of lengths: continuous batching beside batches that wait for their longest, and the cache's waste.

    Lengths are log-normal with ShareGPT's means in vLLM's paper: 161 tokens in, 338 out (arXiv 2309.06180, figure 11).
    """
    generator = torch.Generator().manual_seed(4)
    sizes = torch.exp(torch.randn(24, 2, generator=generator) * 0.9 + torch.tensor([4.68, 5.42]))  # medians 108 and 226
    jobs = [(int(a.clamp(8, 1000)), int(b.clamp(4, 1000))) for a, b in sizes]
    total = sum(job[1] for job in jobs)
    held = used = 0  # slots of the cache, summed over the steps

    def run(groups: list[list[tuple[int, int]]]) -> float:
        nonlocal held, used
        engine.pool.forget_all()
        held = used = 0
        start, seed = CLOCKS[CLOCK](), 100
        for group in groups:
            for num_in, num_out in group:
                seed += 1
                engine.add(random_ids(num_in, seed), greedy(num_out))
            while engine.has_work:
                engine.step()
                running = engine.scheduler.running
                held += sum(len(r.block_table) for r in running) * engine.config.block_size
                used += sum(r.num_computed for r in running)
        return total / (CLOCKS[CLOCK]() - start)

    static = run([jobs[i : i + 8] for i in range(0, len(jobs), 8)])
    continuous = run([jobs])
    wasted = 100 * (1 - used / held)
    print(f"static {static:.0f}, continuous {continuous:.0f}, waste {wasted:.1f} %", flush=True)
    return [
        row("24 requests of mixed lengths, 8 at a time", [continuous], [static], "static batches of 8, same engine"),
        bounded("KV cache waste", [wasted], 4.0, "percent of held slots, all steps together"),
    ]


def measure_start(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """A folder of 4 bits, kernels compiled before: constructor to first token, in fresh processes."""
    command = [sys.executable, "-c", START, str(folder / "int4")]
    runs = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(rounds)]
    print("first token after", runs, flush=True)
    return [bounded("first token of a cold engine", runs, 1.0, "s")]


def row(name: str, ours: list[float], theirs: list[float], rival_name: str) -> dict[str, Any]:
    sides = {"ours": statistics.median(ours), "rival": statistics.median(theirs), "rival_name": rival_name}
    ratio = sides["ours"] / sides["rival"]  # type: ignore[operator]
    return {"name": name, **sides, "ratio": ratio, "unit": "tokens/s", "runs": {"ours": ours, "rival": theirs}}


def bounded(name: str, runs: list[float], bound: float, unit: str) -> dict[str, Any]:
    found = statistics.median(runs)
    sides = {"ours": found, "rival": bound, "rival_name": "bound, smaller is better", "ratio": found / bound}
    return {"name": name, **sides, "unit": unit, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the model's files are made and kept")
    parser.add_argument("--rival-python", help="an interpreter with llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="single, start, batching, transformers, shared; left out: all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default=CLOCK)
    given = parser.parse_args()
    globals()["CLOCK"] = given.clock
    make_files(given.folder)
    engine = Engine(
        load_model(given.folder / "bf16"),
        config=EngineConfig(quantize="int4", kernels="native", kv_cache_bytes=512 << 20, max_running=8),
    )
    rival = Rival(given.rival_python, given.folder, torch.get_num_threads()) if given.rival_python else None
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "single": lambda: measure_single(engine, rival, given.rounds) if rival else [],
        "start": lambda: measure_start(given.folder, 3),
        "batching": lambda: measure_batching(engine),
        "transformers": lambda: measure_transformers(engine, given.folder, 2),
        "shared": lambda: measure_shared(engine, rival, given.rounds) if rival else [],
    }
    flags = {"llama_cpp_python": rival.version if rival else None, "built": "GGML_NATIVE=ON, n_ubatch 512, kv_unified"}
    rows: list[dict[str, Any]] = []
    for name in given.only or parts:
        rows += parts[name]()
        if given.json:  # after each part: a run that is cut short keeps what it has
            figures = {"threads": torch.get_num_threads(), "clock": CLOCK, "rival": flags, "rows": rows}
            write_result(given.json, figures, packages=("torch", "transformers"))
    for line in rows:
        print(f"{line['name']:45} {line['ours']:8.1f} {line['rival']:8.1f} {line['ratio']:6.2f}  {line['rival_name']}")


if __name__ == "__main__":
    main()
