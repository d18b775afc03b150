"""The training step beside `transformers`: time and peak memory on the shape of a 15M-parameter Llama, rows of 512.

Run it on an idle machine: ``python benchmarks/train.py [--rounds N] [--json FILE]``. Every contender is a process of
its own that is told when to do a step, so that they take turns and each has its own peak of memory. All do the same
update: 8 rows of 512 tokens, clipping at 1, AdamW (fused), no dropout, tied embeddings, a vocabulary of 32,000. Weights
begin as each library draws them, so the losses differ.

- ours: `Run.do_step` as `mw train` does it, with AdamW; bf16 and torch.compile as it chooses by itself.
- compiled: `LlamaForCausalLM`, torch.compile, autocast bf16.
- default: `LlamaForCausalLM` in float32, eager: what `transformers.Trainer` and TRL's SFT do where nothing is set.

The peak of the cross-entropy alone is measured for three vocabularies, in processes of their own. Ratios are medians
over rounds of ours to theirs in the same round. Writes ``benchmarks/results/train.json``.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from modelwright.base.device import peak_memory_bytes
from modelwright.base.measured import write_result

SHAPE = {"vocab_size": 32_000, "hidden_size": 288, "intermediate_size": 768, "num_layers": 6, "num_heads": 6}
ROWS, ROW_LEN, RATE, STEPS = 8, 512, 1e-3, 3
NAMES = {
    "compiled": "transformers, torch.compile, autocast bf16",
    "default": "transformers, float32 eager (Trainer's default)",
}


def tokens():
    """Return the ids of the batch that everyone trains on, one more than a row."""
    return torch.randint(0, SHAPE["vocab_size"], (ROWS, ROW_LEN + 1), generator=torch.Generator().manual_seed(0))


def our_step():
    """Return a function that does one step of ours."""
    from modelwright.data.load import Batch
    from modelwright.models.llama import Llama, LlamaConfig
    from modelwright.nn.init import init_weights
    from modelwright.optim.build import AdamWConfig, OptimizerConfig
    from modelwright.train.loop import LoopConfig, Run
    from modelwright.train.objective import CausalLanguageModeling

    class SameBatch:
        def __init__(self):
            ids = tokens()
            self.batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

        def next_batch(self):
            return self.batch

    model = init_weights(Llama(LlamaConfig(**SHAPE, max_seq_len=ROW_LEN, tie_embeddings=True)), 0)
    rule = OptimizerConfig(name="adamw", adamw=AdamWConfig(learning_rate=RATE))
    config = LoopConfig(num_steps=100_000, micro_batch_size=ROWS, optimizer=rule)
    run = Run(model, CausalLanguageModeling(), SameBatch(), config)
    return lambda: run.do_step().loss


def their_step(kind):
    """Return a function that does one step of `transformers`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["hidden_size"],
        intermediate_size=SHAPE["intermediate_size"],
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=SHAPE["num_heads"],
        max_position_embeddings=ROW_LEN,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()
    rule = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = tokens()[:, :-1].contiguous()
    called = torch.compile(model) if kind == "compiled" else model
    context = torch.autocast("cpu", dtype=torch.bfloat16) if kind == "compiled" else contextlib.nullcontext()

    def step():
        with context:
            loss = called(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        rule.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def work(kind):
    """Be a contender: do a turn for every line that is read, and answer with a step's time, loss and peak memory.

    A turn is `STEPS` steps in a row after one that does not count: a process that slept through the others' turns
    begins with cold caches, and training knows no pauses.
    """
    step = our_step() if kind == "ours" else their_step(kind)
    for _ in sys.stdin:
        step()
        start = time.perf_counter()
        for _ in range(STEPS):
            loss = step()
        seconds = (time.perf_counter() - start) / STEPS
        answer = {"seconds": seconds, "loss": loss, "peak_bytes": peak_memory_bytes()}
        print(json.dumps(answer), flush=True)


class Contender:
    """A process that does steps on demand."""

    def __init__(self, kind):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self):
        """Do one turn and return what was measured."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


LOSS = """
import sys, torch
from torch import nn
from modelwright.base.device import peak_memory_bytes
from modelwright.nn.cross_entropy import head_loss
vocab_size = int(sys.argv[1])
head, hidden = nn.Linear(64, vocab_size, bias=False), torch.randn(4096, 64, requires_grad=True)
labels = torch.randint(0, vocab_size, (4096,))
def loss(max_logits):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return head_loss(head, hidden, labels, max_logits=max_logits)
loss(2**18).backward()
head.weight.grad = hidden.grad = None
before = peak_memory_bytes()
loss(2**22 if sys.argv[2] == "pieces" else 2**60).backward()
print(peak_memory_bytes() - before - 2 * head.weight.numel() * 4)  # without the gradient and its sum
"""


def loss_peak(vocab_size, kind):
    """Return the peak that the cross-entropy of 4,096 positions adds, beside the gradient of the matrix."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # large blocks go back at once, so that the peak is theirs
    command = [sys.executable, "-c", LOSS, str(vocab_size), kind]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)


def measure(rounds, warm):
    """Let the contenders take turns; return for each what was measured in every round."""
    contenders = {kind: Contender(kind) for kind in ("ours", "compiled", "default")}
    for _ in range(warm):
        for contender in contenders.values():
            contender.step()
    found = {kind: [] for kind in contenders}
    for _ in range(rounds):
        for kind, contender in contenders.items():
            found[kind].append(contender.step())
            print(f"  {kind}: {found[kind][-1]}", file=sys.stderr, flush=True)
    for contender in contenders.values():
        contender.close()
    return found


def compare(found):
    """Turn rounds into rows of ours beside a rival."""
    rows = []
    speed = {kind: [ROWS * ROW_LEN / r["seconds"] for r in runs] for kind, runs in found.items()}
    peak = {kind: max(r["peak_bytes"] for r in runs) for kind, runs in found.items()}
    for kind, rival in NAMES.items():
        ratios = [a / b for a, b in zip(speed["ours"], speed[kind], strict=True)]
        rows.append(
            {
                "name": f"training step, 15M Llama, T = {ROW_LEN}, beside {kind}",
                "ours": statistics.median(speed["ours"]),
                "rival": statistics.median(speed[kind]),
                "rival_name": rival,
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "unit": "tokens/s",
                "runs": len(ratios),
            }
        )
        rows.append(
            {
                "name": f"peak memory of the process, beside {kind}",
                "ours": peak["ours"],
                "rival": peak[kind],
                "rival_name": rival,
                "ratio": peak["ours"] / peak[kind],
                "unit": "bytes",
                "runs": 1,
            }
        )
    return rows


def main():
    """Measure everything and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "train.json")
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    rows = compare(measure(arguments.rounds, warm=1))
    for vocab_size in (8_000, 32_000, 128_000):
        pieces, whole = (loss_peak(vocab_size, kind) for kind in ("pieces", "whole"))
        rows.append(
            {
                "name": f"peak of the cross-entropy of 4,096 positions, V = {vocab_size:,}",
                "ours": pieces,
                "rival": whole,
                "rival_name": "all logits at once",
                "ratio": pieces / whole,
                "unit": "bytes",
                "runs": 1,
            }
        )
    for row in rows:
        print(f"{row['name']}: {row['ours']:,.0f} beside {row['rival']:,.0f} {row['unit']}, ratio {row['ratio']:.2f}")
    write_result(arguments.json, {"shape": SHAPE, "batch": [ROWS, ROW_LEN], "rows": rows}, ("torch", "transformers"))


if __name__ == "__main__":
    main()
