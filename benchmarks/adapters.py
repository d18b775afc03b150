"""Users of four adapters at once, beside llama.cpp, which computes one adapter at a time.

    python benchmarks/adapters.py --folder runs/serve --rival-python PYTHON [--rounds 4] [--rank 16] [--json FILE]

The model, its 4-bit forms and the rival's process are those of serve.py (a Llama of 0.5B parameters, random weights).
Four random adapters of one rank on all seven linear layers of each block; llama.cpp gets the same ones as GGUF in
float16, loaded before the clock starts, and serves each adapter's users in one batch, then the next adapter's. Ours
computes all users in every step. Prompts of 32 tokens, 32 drawn greedily; rounds alternate, medians are shown. One row
compares ours with adapters to ours without, which is what adapters cost.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import serve
from modelwright.base.gguf_file import NewTensor, write_container
from modelwright.base.measured import write_result
from modelwright.engine.engine import Engine, EngineConfig
from modelwright.models.weights import load_model
from modelwright.nn.lora import add_lora, lora_layers
from modelwright.train.adapter import save_adapter

GGUF = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
GGUF |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
NUM_TOKENS = 32


def make_adapters(folder: Path, rank: int) -> list[Path]:
    """Write four adapters, as PEFT folders and as GGUF files; what is there stays."""
    made = [folder / f"adapter-{rank}-{index}" for index in range(4)]
    if all((path / "adapter_config.json").is_file() for path in made):
        return made
    model = load_model(folder / "bf16")
    add_lora(model, rank=rank, alpha=2 * rank)
    for seed, path in enumerate(made):
        generator = torch.Generator().manual_seed(seed)
        tensors = []
        for name, layer in lora_layers(model).items():
            _, block, _, kind = name.split(".")
            for part in ("lora_a", "lora_b"):
                weight = getattr(layer, part)
                weight.data.normal_(0, 0.02, generator=generator)
                halves = weight.detach().half().numpy()
                full = f"blk.{block}.{GGUF[kind]}.weight.{part}"
                tensors.append(NewTensor(full, tuple(weight.shape), "F16", lambda halves=halves: halves))
        metadata = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
        write_container(path.with_suffix(".gguf"), {**metadata, "adapter.lora.alpha": float(2 * rank)}, tensors)
        save_adapter(model, path)
    return made


def run_ours(engine: Engine, prompts: list[list[int]], names: list[str | None]) -> float:
    """Serve all users at once and return the completion tokens a second."""
    engine.pool.forget_all()
    start = serve.CLOCKS[serve.CLOCK]()
    for prompt, name in zip(prompts, names, strict=True):
        engine.add(prompt, serve.greedy(NUM_TOKENS), {"adapter": name} if name else None)
    while engine.has_work:
        engine.step()
    return len(prompts) * NUM_TOKENS / (serve.CLOCKS[serve.CLOCK]() - start)


def measure(engine: Engine, rival: "serve.Rival", paths: list[Path], rounds: int) -> list[dict[str, Any]]:
    """One and two users of each adapter."""
    rows = []
    for num_each in (1, 2):
        prompts = [serve.random_ids(32, 50 + i) for i in range(4 * num_each)]
        names = [path.name for path in paths for _ in range(num_each)]
        ours, plain, theirs = [], [], []
        order = {"paths": [str(p.with_suffix(".gguf")) for p in paths], "prompts": prompts, "num_tokens": NUM_TOKENS}
        for turn in range(rounds + 1):  # the first round warms both up and is not counted
            ours.append(run_ours(engine, prompts, list(names)))
            theirs.append(len(prompts) * NUM_TOKENS / rival.ask(do="adapters", num_each=num_each, **order)["seconds"])
            plain.append(run_ours(engine, prompts, [None] * len(prompts)))
            print(f"round {turn}: {num_each} each {ours[-1]:.0f} / {theirs[-1]:.0f}, none {plain[-1]:.0f}", flush=True)
        label = f"four adapters, {num_each} user{'s' if num_each > 1 else ''} of each"
        rows.append(serve.row(label, ours[1:], theirs[1:], "llama.cpp Q4_0, one adapter after the other"))
        rows.append(serve.row(f"{label}, cost", ours[1:], plain[1:], "ours without adapters"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="that of serve.py")
    parser.add_argument("--rival-python", required=True, help="an interpreter with llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--clock", choices=tuple(serve.CLOCKS), default=serve.CLOCK)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    serve.CLOCK = given.clock
    serve.make_files(given.folder)
    paths = make_adapters(given.folder, given.rank)
    config = EngineConfig(quantize="int4", kernels="native", kv_cache_bytes=256 << 20, max_running=8)
    engine = Engine(load_model(given.folder / "bf16"), config=config)
    for path in paths:
        engine.adapters.load(path.name, path)
    rival = serve.Rival(given.rival_python, given.folder, torch.get_num_threads())
    rows = measure(engine, rival, paths, given.rounds)
    for line in rows:
        print(f"{line['name']:40} {line['ours']:8.1f} {line['rival']:8.1f} {line['ratio']:6.2f}  {line['rival_name']}")
    if given.json:
        facts = {"threads": torch.get_num_threads(), "clock": given.clock, "rank": given.rank, "rival": rival.version}
        facts |= {"adapter_bytes": engine.adapters.num_bytes, "median_of": given.rounds}
        write_result(given.json, {**facts, "rows": rows}, packages=("torch",))


if __name__ == "__main__":
    main()
