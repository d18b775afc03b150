"""How much faster are the chunked scans than the sequential ones? Forward and backward of one layer's recurrence.

    python benchmarks/scans.py [--lengths 256 1024 4096] [--json FILE]

Run it on an idle machine. Each pair is timed in turns, a warm-up and then three rounds; the median counts. Sizes are
those of a small model: 4 rows, 256 inner channels, states of 16 (Mamba) or 4 heads of 64 with states of 64 (Mamba-2).
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from modelwright.base.device import describe_machine, pick_device
from modelwright.nn.rwkv import wkv, wkv_sequential
from modelwright.nn.ssd import ssd, ssd_sequential
from modelwright.nn.ssm import selective_scan, selective_scan_sequential

ROOT = Path(__file__).parents[1]
BATCH, WIDTH = 4, 256
SCANS = {
    "mamba": (selective_scan, selective_scan_sequential),
    "mamba2": (ssd, ssd_sequential),
    "rwkv": (wkv, wkv_sequential),
}


def make_inputs(name: str, length: int, device: torch.device) -> list[Tensor]:
    """Return the arguments of a scan, all wanting gradients."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    rows = (BATCH, length)
    if name == "mamba":
        tensors = [draw(*rows, WIDTH), F.softplus(draw(*rows, WIDTH) - 3), -torch.exp(draw(WIDTH, 16))]
        tensors += [draw(*rows, 16), draw(*rows, 16)]
    elif name == "mamba2":
        tensors = [draw(*rows, 4, WIDTH // 4), F.softplus(draw(*rows, 4) - 3), -torch.exp(draw(4))]
        tensors += [draw(*rows, 1, 64), draw(*rows, 1, 64)]
    else:
        tensors = [draw(*rows, WIDTH), draw(*rows, WIDTH), torch.exp(draw(WIDTH)), draw(WIDTH)]
    return [t.to(device).requires_grad_() for t in tensors]


def seconds(scan: Callable, inputs: list[Tensor]) -> float:
    """Time one forward and backward pass."""
    start = time.perf_counter()
    y, _ = scan(*inputs)
    y.square().mean().backward()
    if y.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, length: int, device: torch.device) -> dict:
    """Return the median seconds of both forms."""
    inputs = make_inputs(name, length, device)
    times: dict[str, list[float]] = {"chunked": [], "sequential": []}
    for _ in range(4):
        for form, scan in zip(times, SCANS[name], strict=True):
            times[form].append(seconds(scan, inputs))
    chunked, sequential = (statistics.median(times[form][1:]) for form in ("chunked", "sequential"))
    return {
        "scan": name,
        "length": length,
        "chunked_seconds": chunked,
        "sequential_seconds": sequential,
        "ratio": sequential / chunked,
    }


def main() -> None:
    """Measure every scan at every length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    device = pick_device()
    results = []
    for name in SCANS:
        for length in args.lengths:
            results.append(measure(name, length, device))
            r = results[-1]
            print(
                f"{name:7} T = {length:5}: sequential {r['sequential_seconds'] * 1000:8.1f} ms, chunked "
                f"{r['chunked_seconds'] * 1000:8.1f} ms, {r['ratio']:.1f}x",
                flush=True,
            )
    if args.json:
        git = ["git", "rev-parse", "--short", "HEAD"]
        result = {
            "command": "python benchmarks/scans.py",
            "commit": subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip(),
            "machine": asdict(describe_machine()),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "threads": torch.get_num_threads(),
            "device": str(device),
            "results": results,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
