"""How fast is the own FlashAttention in Triton beside torch's? Needs a GPU; says so and stops where there is none.

    python benchmarks/gpu_flash.py [--json FILE]

bfloat16, 16,384 tokens in all whatever the length, 2,048 numbers of queries a token (16 heads of 128 or 32 of 64).
The rival is ``F.scaled_dot_product_attention`` held to its FlashAttention backend, given (B, N, T, H) views of the same
tensors; grouped heads are repeated for it outside the timing where it does not take them. The two are timed in turns
with CUDA events after a warm-up; ours, rival and ratio are medians of the rounds, in TFLOP/s (4 T S H a head forward,
2.5 times that backward, half when causal; windows are counted by the keys seen). The results are compared first.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from modelwright.base.device import describe_machine
from modelwright.nn.attention import AttentionRule
from modelwright.nn.flash import attend_triton

ROOT = Path(__file__).parents[1]
ROUNDS, WARM_UPS, TOKENS, WIDTH = 15, 5, 16384, 2048
# name: (head size, length, query heads per key head, causal, window)
CASES = {
    f"{'causal' if causal else 'full'}, heads of {size}, T = {length}, {groups} to one key head": (
        size,
        length,
        groups,
        causal,
        None,
    )
    for size in (64, 128)
    for length in (1024, 4096, 16384)
    for groups, causal in ((1, True), (4, True), (1, False))
} | {"causal, window of 1024, heads of 128, T = 16384": (128, 16384, 1, True, 1024)}


def rival(q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool) -> Tensor:
    """Attend by the FlashAttention of torch."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        x = (y.transpose(1, 2) for y in (q, k, v))
        grouped = q.shape[2] != k.shape[2]
        out = F.scaled_dot_product_attention(*x, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def milliseconds(run: Callable[[], Any]) -> float:
    """Return the time of one call on the GPU."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def time_case(name: str, direction: str) -> dict[str, Any]:
    """Compare the results of one case, then time both in turns."""
    size, length, groups, causal, window = CASES[name]
    heads, batch, scale = WIDTH // size, TOKENS // length, size**-0.5
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, length, n, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, heads // groups, heads // groups)
    )
    up = torch.randn_like(q)
    rule = AttentionRule(window=window)
    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: attend_triton(q, k, v, scale=scale, is_causal=causal, rule=rule),
        "rival": lambda: rival(q, k, v, scale, causal),  # without a window: torch's kernel has none
    }
    if window is None:
        out, want = (way() for way in ways.values())
        assert (out - want).abs().max() < 2e-2, name
        grads, wanted = (torch.autograd.grad(x, (q, k, v), up) for x in (out, want))
        assert all((a - b).abs().max() < 5e-2 * b.abs().max() for a, b in zip(grads, wanted, strict=True)), name
    runs: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(WARM_UPS + ROUNDS):
        for way, attend in ways.items():
            if direction == "forward":
                with torch.no_grad():
                    taken = milliseconds(attend)
            else:
                out = attend()
                taken = milliseconds(lambda out=out: torch.autograd.grad(out, (q, k, v), up))
            if i >= WARM_UPS:
                runs[way].append(taken)
    keys = length if not causal else length / 2 if window is None else window
    flops = 4 * batch * heads * length * keys * size * (1 if direction == "forward" else 2.5)
    ours, theirs = (flops / statistics.median(runs[way]) / 1e9 for way in ("ours", "rival"))
    return {
        "name": f"{direction}, {name}",
        "ours": ours,
        "rival": theirs,
        "rival_name": "SDPA, FlashAttention backend" + (" (no window)" if window else ""),
        "ratio": ours / theirs,
        "unit": "TFLOP/s",
        "runs": ROUNDS,
        "milliseconds": runs,
    }


def main() -> None:
    """Time all cases and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("No CUDA device is here; this benchmark times a GPU kernel. Run it on a machine with one.")
    rows = []
    for name in CASES:
        for direction in ("forward", "backward"):
            rows.append(time_case(name, direction))
            r = rows[-1]
            print(f"{r['name']}: {r['ours']:.0f} against {r['rival']:.0f} {r['unit']}, {r['ratio']:.2f}", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {
        "command": " ".join(["python benchmarks/gpu_flash.py", *sys.argv[1:]]),
        "commit": commit.strip(),
        "machine": asdict(describe_machine()),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
