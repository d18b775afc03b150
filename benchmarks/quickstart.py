"""The numbers of `mw quickstart --no-serve`: time, memory, training speed beside transformers, quality, the server.

Run it on an idle machine: ``python benchmarks/quickstart.py [--out FOLDER] [--json FILE]``. It runs the quickstart in
a process of its own as a user would, twice, then alternates our training step with that of `transformers` on the
same shape, and talks to a real server over HTTP. Writes ``benchmarks/results/quickstart.json``.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import platform
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn import functional as F

from modelwright.base.device import describe_machine, measure_matmul_flops
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.train.budget import flops_per_token
from modelwright.train.loop import LoopConfig, Run
from modelwright.train.objective import CausalLanguageModeling

ROOT = Path(__file__).parents[1]
ROW_LEN, ROWS = 256, 16
ROUNDS, STEPS = 5, 8


def run_quickstart(out):
    """Run the command of the README and return its wall time, peak memory of the process tree, and its report."""
    mw = Path(sys.executable).with_name("mw")
    start = time.perf_counter()
    subprocess.run([mw, "quickstart", "--no-serve", "--out", out], check=True, stdout=sys.stderr, cwd=out.parent)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return seconds, peak, json.loads((out / "report.json").read_text())


class SameBatch:
    """A loader that gives one batch of random tokens again and again."""

    def __init__(self, vocab_size):
        from modelwright.data.load import Batch

        ids = torch.randint(0, vocab_size, (ROWS, ROW_LEN + 1), generator=torch.Generator().manual_seed(0))
        self.batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def next_batch(self):
        """Return the batch."""
        return self.batch


def transformers_step(config):
    """Return a function that does one training step of transformers' Llama: compiled, autocast bf16, fused AdamW."""
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    fields = {k: v for k, v in config.to_hf().items() if k not in ("architectures", "model_type")}
    model = LlamaForCausalLM(TheirConfig(**fields, attn_implementation="sdpa")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = SameBatch(config.vocab_size).batch

    def loss_of(ids, labels):
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    compiled = torch.compile(loss_of, dynamic=False)

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(batch.input_ids, batch.labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_step(config):
    """Return a function that does one of our training steps, as the quickstart does them, Muon included."""
    loop = LoopConfig(num_steps=10**6, micro_batch_size=ROWS)
    run = Run(init_weights(Llama(config), 0), CausalLanguageModeling(), SameBatch(config.vocab_size), loop)
    return run.do_step


def training_speed(shape):
    """Alternate our step with theirs and return tokens/s of both, the median ratio and our share of the matrix rate."""
    config = replace(LlamaConfig.from_hf(shape), max_seq_len=ROW_LEN)
    steps = {"ours": our_step(config), "transformers": transformers_step(config)}
    for step in steps.values():
        for _ in range(3):
            step()
    seconds = {name: [] for name in steps}
    rates = []
    for _ in range(ROUNDS):
        rates.append(measure_matmul_flops(torch.device("cpu"), torch.bfloat16, 0.5))
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                step()
            seconds[name].append((time.perf_counter() - start) / STEPS)
    tokens = ROWS * ROW_LEN
    ratios = [t / o for o, t in zip(seconds["ours"], seconds["transformers"], strict=True)]
    ours = tokens / statistics.median(seconds["ours"])
    return {
        "tokens_per_second": ours,
        "transformers_tokens_per_second": tokens / statistics.median(seconds["transformers"]),
        "ratio_median": statistics.median(ratios),
        "ratios": ratios,
        "matmul_gflops": [rate / 1e9 for rate in rates],
        "mfu_fraction": ours * flops_per_token(config, ROW_LEN) / statistics.median(rates),
    }


@contextlib.contextmanager
def server(out):
    """Serve the finished run on a free port and yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mw = Path(sys.executable).with_name("mw")
    command = [mw, "serve", out / "chat", "--index", out / "index", "--name", "quickstart", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def serving(out):
    """Measure the first token of a request whose prompt is cached, and 200 mixed requests from 8 clients."""
    import openai

    with server(out) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        prompt = [{"role": "user", "content": "What does textwrap.dedent do? " * 12}]

        def first_token():
            start = time.perf_counter()
            stream = client.chat.completions.create(
                model="quickstart", messages=prompt, max_tokens=8, temperature=0, stream=True
            )
            for piece in stream:
                if piece.choices and piece.choices[0].delta.content:
                    return time.perf_counter() - start
            return None

        cold = first_token()
        warm = [first_token() for _ in range(9)]

        def one(i):
            arguments = {
                "model": "quickstart-documents" if i % 5 == 0 else "quickstart",
                "messages": [{"role": "user", "content": f"What does {('json.dumps', 'os.walk', 'abs')[i % 3]} do?"}],
                "temperature": 0,
                "seed": 1,
            }
            if i % 5:
                arguments["max_tokens"] = 8 + i % 40
            whole = client.chat.completions.create(**arguments).choices[0].message.content
            pieces = client.chat.completions.create(**arguments, stream=True)
            streamed = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
            return whole == streamed

        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            same = list(pool.map(one, range(100)))
        seconds = time.perf_counter() - start
    return {
        "first_token_cold_seconds": cold,
        "first_token_cached_seconds": [round(w, 4) for w in warm],
        "first_token_cached_median_seconds": statistics.median(warm),
        "requests": 2 * len(same),
        "answered_and_stream_equals_whole": 2 * sum(same),
        "requests_seconds": seconds,
    }


def main():
    """Measure everything and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark-quickstart")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "quickstart.json")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    first_seconds, peak, report = run_quickstart(out)
    second_seconds, _, _ = run_quickstart(out)
    shape = json.loads((out / "base" / "config.json").read_text())
    result = {
        "command": "python benchmarks/quickstart.py",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip(),
        "machine": asdict(describe_machine()),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "tokenizers")}
        | {"python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "first_run_seconds": first_seconds,
        "second_run_seconds": second_seconds,
        "peak_memory_bytes": peak,
        "training": training_speed(shape),
        "serving": serving(out),
        "report": {k: v for k, v in report.items() if k not in ("documents",)},
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2, default=str) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "report"}, indent=2, default=str))


if __name__ == "__main__":
    main()
