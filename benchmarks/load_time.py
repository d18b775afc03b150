"""How long from a folder to the first logits, beside reading its file once.

    python benchmarks/load_time.py [--rounds N] [--json FILE] [--small]

A random Llama of 0.5B parameters in bfloat16 (the shape of Qwen2.5-0.5B) is written to a temporary folder. In processes
of their own, alternating, three things are timed after the imports: reading the file once in pieces of 16 MB;
`load_model` and the logits of one token; ``from_pretrained`` of transformers and the same. Cold: the file's pages are
dropped from the page cache before (posix_fadvise; a virtual machine's host may still hold them). Warm: they are there.
Import times are reported on their own. Medians; the target is 1.2 times the cold read.

Run it on an idle machine.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from modelwright.base.device import describe_machine
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.weights import save_model

TARGET = 1.2
HALF_BILLION = LlamaConfig(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    max_seq_len=4096,
    tie_embeddings=True,
)
SMALL = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2)

# Each prints the seconds of its imports and of its work.
COMMON = """
import json, os, sys, time
folder, is_cold = sys.argv[1], sys.argv[2] == "cold"
file = folder + "/model.safetensors"
if is_cold:
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
before = time.perf_counter()
"""
READ = """
start = time.perf_counter()
piece = bytearray(16 << 20)
with open(file, "rb", buffering=0) as handle:
    while handle.readinto(piece):
        pass
"""
OURS = """
import torch
from modelwright.models.weights import load_model
import modelwright.models.llama
ids = torch.tensor([[5]])
start = time.perf_counter()
with torch.no_grad():
    logits = load_model(folder)(ids).logits
"""
TRANSFORMERS = """
import torch
from transformers import LlamaForCausalLM
ids = torch.tensor([[5]])
start = time.perf_counter()
with torch.no_grad():
    logits = LlamaForCausalLM.from_pretrained(folder, dtype="auto")(ids).logits
"""
END = """
print(json.dumps({"import": start - before, "work": time.perf_counter() - start}))
"""


def write_model(folder: Path, config: LlamaConfig) -> None:
    """Write random weights in bfloat16."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Llama(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    save_model(model, folder)


def time_once(code: str, folder: Path, state: str) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, "-c", COMMON + code + END, str(folder), state]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, rounds: int) -> list[dict[str, object]]:
    """Time all three in turns; return rows."""
    kinds = {"read the file once": READ, "ours": OURS, "transformers": TRANSFORMERS}
    rows: list[dict[str, object]] = []
    imports: dict[str, list[float]] = {name: [] for name in kinds}
    for state in ("cold", "warm"):
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(rounds):
            for name, code in kinds.items():
                took = time_once(code, folder, state)
                seconds[name].append(took["work"])
                imports[name].append(took["import"])
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for rival in ("read the file once", "transformers"):
            rows.append(
                {
                    "name": f"0.5B bf16 folder to first logits, {state}, against {rival}",
                    "unit": "seconds",
                    "ours": round(medians["ours"], 4),
                    "rival": round(medians[rival], 4),
                    "ratio": round(medians["ours"] / medians[rival], 3),
                    "all": {name: [round(v, 4) for v in seconds[name]] for name in ("ours", rival)},
                }
            )
    rows.append(
        {
            "name": "imports alone, against transformers",
            "unit": "seconds",
            "ours": round(statistics.median(imports["ours"]), 3),
            "rival": round(statistics.median(imports["transformers"]), 3),
            "ratio": round(statistics.median(imports["ours"]) / statistics.median(imports["transformers"]), 3),
        }
    )
    return rows


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a toy model: to see that the script works")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, SMALL if args.small else HALF_BILLION)
        size = (folder / "model.safetensors").stat().st_size
        rows = measure(folder, args.rounds)
    for row in rows:
        print(f"{row['name']:<72} {row['ours']:>8} {row['rival']:>8}  x {row['ratio']}")
    is_met = rows[0]["ratio"] <= TARGET  # type: ignore[operator]
    print(f"target: at most {TARGET} times the cold read: {'met' if is_met else 'NOT met'}")
    if args.json:
        result = {
            "command": "python " + " ".join(["benchmarks/load_time.py", *sys.argv[1:]]),
            "machine": asdict(describe_machine()),
            "versions": {n: version(n) for n in ("torch", "transformers", "safetensors")}
            | {"python": platform.python_version()},
            "file_bytes": size,
            "target_ratio": TARGET,
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
