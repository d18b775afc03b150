"""Time of one attention layer over long rows, in pieces and densely: Longformer and BigBird against their twins.

    python benchmarks/long_encoders.py [--json FILE] [--lengths 1024 2048 4096]

One thread, float32, hidden size 128, 4 heads, windows of 256 with one global token, blocks of 64 with 3 random ones;
the best of five runs after one that is not counted. What is claimed: doubling the length at most doubles the time in
pieces (give or take the constant part), and quadruples it densely.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from modelwright.base.measured import write_result
from modelwright.models.bigbird import BigBirdAttention, BigBirdConfig
from modelwright.models.longformer import LongformerAttention, LongformerConfig, Seen
from modelwright.nn.init import init_weights

SIZES = {"vocab_size": 8, "hidden_size": 128, "intermediate_size": 128, "num_layers": 1, "num_heads": 4}


def best_ms(compute: Callable[[], object], runs: int = 5) -> float:
    """Return the milliseconds of the fastest run."""
    compute()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        compute()
        seconds.append(time.perf_counter() - start)
    return round(1000 * min(seconds), 2)


@torch.no_grad()
def measure(length: int) -> dict[str, float]:
    """Return the milliseconds of each way at one length."""
    window = init_weights(LongformerAttention(LongformerConfig(**SIZES, attention_window=(256,)), 0), 0)
    blocks = init_weights(BigBirdAttention(BigBirdConfig(**SIZES), 0), 0).eval()
    x, is_token = torch.randn(1, length, 128), torch.ones(1, length, dtype=torch.bool)
    seen = Seen(is_token, torch.arange(length)[None] == 0)
    q, drawn = torch.randn(1, length, 4, 32), blocks.draw(length // 64)
    return {
        "longformer_pieces_ms": best_ms(lambda: window.attend_pieces(x, seen)),
        "longformer_dense_ms": best_ms(lambda: window.attend_dense(x, seen)),
        "bigbird_blocks_ms": best_ms(lambda: blocks.attend_blocks(q, q, q, is_token, drawn)),
        "bigbird_dense_ms": best_ms(lambda: blocks.attend_dense(q, q, q, is_token, drawn)),
    }


def main() -> None:
    """Measure and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="multiples of 64")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for length in args.lengths:
        rows.append({"length": length, **measure(length)})
        print(rows[-1], flush=True)
    if args.json:
        write_result(args.json, {"threads": 1, "rows": rows})


if __name__ == "__main__":
    main()
