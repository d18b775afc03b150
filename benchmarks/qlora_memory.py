"""What a QLoRA step costs in memory: a 0.5B shape, rank 16 on all linear layers, rows of 1,024 tokens.

The shape is that of Qwen2.5-0.5B with random weights, loaded from a folder in 4 bits, trained with paged 8-bit moments
and blocks computed again. The figure is the largest resident size of a fresh process less what it had after importing.

    python benchmarks/qlora_memory.py --json benchmarks/results/qlora_memory.json
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from modelwright.base.device import peak_memory_bytes
from modelwright.base.measured import write_result
from modelwright.data.load import RowLoader
from modelwright.data.pack import Rows
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.weights import load_model, save_model
from modelwright.nn.adapters import attach_adapter, trained_parameters
from modelwright.nn.lora import LoraConfig
from modelwright.nn.nf4 import NF4Linear, to_nf4
from modelwright.train.fast import TrainerConfig
from modelwright.train.loop import Run
from modelwright.train.objective import CausalLanguageModeling

TARGET_BYTES = 1.6e9


def make(folder: Path, scale: int) -> None:
    """Write random weights in bfloat16."""
    config = LlamaConfig(
        vocab_size=151_936 // scale,
        hidden_size=896 // scale,
        intermediate_size=4864 // scale,
        num_layers=24 // scale,
        num_heads=14 // (2 if scale > 1 else 1),
        num_kv_heads=1 if scale > 1 else 2,
        head_dim=64,
        max_seq_len=2048,
        tie_embeddings=True,
        family="qwen2",
        attention_bias=True,
    )
    with torch.device("meta"):
        model = Llama(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    save_model(model, folder)


def step(folder: Path, num_rows: int, length: int) -> dict[str, float]:
    """Do one step and return what they took."""
    torch.zeros(64, 64, dtype=torch.bfloat16) @ torch.zeros(64, 64, dtype=torch.bfloat16)
    baseline = peak_memory_bytes()
    model = load_model(folder, dtype=torch.bfloat16)
    to_nf4(model)
    quantized = [m for m in model.modules() if isinstance(m, NF4Linear)]
    attach_adapter(model, LoraConfig(("all-linear",), rank=16))
    loaded = peak_memory_bytes()
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (num_rows, length + 1))
    rows = Rows(ids[:, :-1], ids[:, 1:])
    loop = TrainerConfig(num_steps=2, micro_batch_size=num_rows, grad_accum_steps=1).loop()
    run = Run(model, CausalLanguageModeling(), RowLoader(lambda _: rows, num_rows), loop)
    seconds = [run.do_step().seconds]
    return {
        "baseline_bytes": baseline,
        "loading_bytes": loaded - baseline,
        "above_baseline_bytes": peak_memory_bytes() - baseline,
        "quantized_weights": sum(m.in_features * m.out_features for m in quantized),
        "quantized_bytes": sum(m.num_bytes() for m in quantized),
        "trained_parameters": sum(p.numel() for p in trained_parameters(model)),
        "expected_trained": 16 * sum(m.in_features + m.out_features for m in quantized),
        "step_seconds": min(seconds),
    }


def main() -> None:
    """Make the weights in one process and measure in another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--scale", type=int, default=1, help="divide the shape, for a quick look")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--step", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        return make(arguments.make, arguments.scale)
    if arguments.step:
        print("FIGURES", step(arguments.step, 2, 1024))
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--scale", str(arguments.scale)]
        subprocess.run([*command, "--make", folder], check=True)
        shown = subprocess.run([*command, "--step", folder], check=True, capture_output=True, text=True).stdout
    figures = eval(shown.rpartition("FIGURES ")[2], {"__builtins__": {}})
    ours = figures["above_baseline_bytes"]
    row = {
        "name": "QLoRA step, 0.5B shape, rank 16, 2 x 1,024 tokens: bytes above the process's baseline",
        "ours": ours,
        "rival": TARGET_BYTES,
        "rival_name": "the bound asked for",
        "ratio": ours / TARGET_BYTES,
        "unit": "bytes",
        "runs": 1,
    }
    print(figures)
    if arguments.json:
        write_result(arguments.json, {"rows": [row], "figures": figures})
    return None


if __name__ == "__main__":
    main()
