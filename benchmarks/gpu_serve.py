"""Serving on one GPU: how near a single user comes to the memory's speed, and many users beside transformers.

    python benchmarks/gpu_serve.py [--parts decode throughput] [--rounds 3] [--json FILE]
    python benchmarks/gpu_serve.py --tiny --json FILE                    (toy size, on a CPU too)

Shape of 8B parameters (hidden 4,096, 32 layers, 32/8 heads of 128, mlp 14,336, vocabulary 128,256), bfloat16, random
weights. decode: one user, 128 tokens behind a prompt of 128. Every token reads all weights but the embedding once, so
no engine is faster than the rate at which this GPU's memory is read; that rate is taken from copying 4 GB, counted as
read and written. Asked for are 0.8 of it. Beside it stand the recorded step alone, without scheduling and drawing, and
the same user through PyTorch's operations. throughput: 256 requests, prompts of 32 to 256 tokens, 16 to 256 tokens out,
beside the continuous batching of transformers over the same weights; the two take turns.

Not run on a GPU yet, only at toy size on a CPU: there the steps go the GPU's way (`modelwright.engine.gpu`) with plain
twins of the kernels and without recording, and transformers' batching does not run and is left out. The notes in the
file say which runner computed, and why steps were not replayed if they were not.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from modelwright.base.measured import write_result
from modelwright.base.types import SamplingParams
from modelwright.engine.engine import EngineConfig
from modelwright.engine.gpu import GpuRunner
from modelwright.engine.llm import LLM
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.weights import save_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARTS = ("decode", "throughput")
EIGHT = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32, num_kv_heads=8,
    max_seq_len=2048,
)  # fmt: skip
TINY = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, max_seq_len=512)


def make_model(config: LlamaConfig) -> Llama:
    """Return a model of random bfloat16 weights on the device, made there and never in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = Llama(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(std=0.02)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def open_engine(model: Llama, **settings: Any) -> LLM:
    """Return an engine whose steps go the GPU's way, on a CPU too unless the settings say otherwise."""
    llm = LLM(model, config=EngineConfig(has_prefix_cache=False, **settings))
    if DEVICE == "cpu" and settings.get("kernels") is None:
        pool, rows = llm.engine.pool, llm.engine.config.max_running
        sizes = {"num_blocks": pool.num_blocks, "block_size": pool.block_size, "max_rows": rows}
        llm.engine._steps.runner = GpuRunner(model, **sizes, record=lambda work: work)
    return llm


def note_of(llm: LLM) -> dict[str, Any]:
    """Return who computed the steps."""
    runner = llm.engine.runner
    graphs = getattr(runner, "graphs", None)
    told = {} if graphs is None else {"replays": graphs.num_replays, "not replayed because": graphs.why_not}
    return {"runner": type(runner).__name__, **told}


def seconds_of(work: Any) -> float:
    """Return how long a call takes, the device's work included."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def copy_rate(num_bytes: int) -> float:
    """Return the bytes a second that a copy reads and writes together."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * num_bytes / statistics.median(seconds_of(lambda: target.copy_(source)) for _ in range(10))


def decode(model: Llama, is_tiny: bool, rounds: int) -> list[dict[str, Any]]:
    """Return one user's tokens a second beside the limit of the memory."""
    length = 24 if is_tiny else 128
    prompt = list(range(3, 131))
    embedding = model.embed.weight.numel() * (not model.config.tie_embeddings)
    num_bytes = 2 * (sum(p.numel() for p in model.parameters()) - embedding)
    limit = copy_rate(64 << 20 if is_tiny else 4 << 30) / num_bytes
    named = "the memory's limit, by the rate of a copy"
    rows = []
    for kernels, name in ((None, "one user, decode (0.8 wanted)"), ("plain", "one user, PyTorch's operations")):
        llm = open_engine(model, kernels=kernels)

        def run(num: int, llm: LLM = llm) -> float:
            params = SamplingParams(temperature=0, max_tokens=num, ignore_eos=True)
            return seconds_of(lambda: llm.generate([prompt], params))

        run(length)  # warm-up
        speeds = [(length - 1) / (run(length) - run(1)) for _ in range(rounds)]
        rows.append({**row(name, speeds, [limit], named), "note": note_of(llm)})
        graphs = getattr(llm.engine.runner, "graphs", None)
        if graphs is not None and graphs.why_not is None:
            alone = [1 / statistics.median(seconds_of(graphs.again) for _ in range(20)) for _ in range(rounds)]
            rows.append(row("one user, the recorded step alone", alone, [limit], named))
        llm.close()
    return rows


def throughput(model: Llama, is_tiny: bool, rounds: int) -> list[dict[str, Any]]:
    """Return the tokens a second of 256 requests beside transformers' continuous batching."""
    rng = random.Random(0)
    num, most = (16, 32) if is_tiny else (256, 256)
    prompts = [[rng.randrange(3, model.config.vocab_size) for _ in range(rng.randint(32, most))] for _ in range(num)]
    lengths = [rng.randint(16, most) for _ in prompts]
    gigabytes = 1 if is_tiny else 24
    sizes = {"max_running": num, "max_tokens_per_step": 512 if is_tiny else 4096, "kv_cache_bytes": gigabytes << 30}
    llm = open_engine(model, **sizes)
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]
    rival = batching_of_transformers(model) if DEVICE == "cuda" else None
    ours: list[float] = []
    theirs: list[float] = []
    for round_number in range(rounds + 1):
        spent = seconds_of(lambda: llm.generate(prompts, params))
        other = seconds_of(lambda: rival(prompts, lengths)) if rival is not None else None
        if round_number:  # the first warms up
            ours.append(sum(lengths) / spent)
            theirs += [] if other is None else [sum(lengths) / other]
    note = note_of(llm)
    llm.close()
    return [{**row(f"{num} requests, tokens out", ours, theirs, "transformers, continuous batching"), "note": note}]


def batching_of_transformers(model: Llama) -> Any:
    """Return a call that completes prompts by transformers over the same weights."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    with tempfile.TemporaryDirectory() as name:
        save_model(model, Path(name))
        other = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, device_map=DEVICE).eval()

    def run(prompts: list[list[int]], lengths: list[int]) -> None:
        settings = GenerationConfig(max_new_tokens=max(lengths), do_sample=False, eos_token_id=None, pad_token_id=0)
        manager = other.init_continuous_batching(generation_config=settings)
        manager.start()
        try:
            for prompt, length in zip(prompts, lengths, strict=True):
                manager.add_request(prompt, max_new_tokens=length)
            left = len(prompts)
            while left:
                left -= manager.get_result(timeout=600).is_finished()
        finally:
            manager.stop(block=True)

    return run


def row(name: str, ours: list[float], rival: list[float], rival_name: str) -> dict[str, Any]:
    """Return medians as a row; without a rival there is no ratio."""
    mine, other = statistics.median(ours), statistics.median(rival) if rival else None
    ratio = mine / other if other else None
    print(name, round(mine, 1), rival_name, other, flush=True)
    return {"name": name, "ours": mine, "rival": other, "rival_name": rival_name, "ratio": ratio,
            "unit": "tokens/s", "runs": {"ours": ours, "rival": rival}}  # fmt: skip


def main() -> None:
    """Measure the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if DEVICE == "cpu" and not given.tiny:
        parser.error("there is no GPU here; --tiny goes through all parts at toy size")
    model = make_model(TINY if given.tiny else EIGHT)
    rows = [one for part in given.parts for one in globals()[part](model, given.tiny, given.rounds)]
    if given.json:
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
        write_result(given.json, {"device": device, "rows": rows}, ("transformers",))


if __name__ == "__main__":
    main()
