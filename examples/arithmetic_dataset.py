"""Write sums of 1 to 3 digits as conversations, to learn from short to long: python examples/arithmetic_dataset.py OUT

A tenth of all pairs of numbers, told by the pair itself, is held out, so that no sum of the test was ever learned. The
last digit of an answer comes first: a carry is known when it is needed (Lee et al. 2023, arXiv:2307.03381).
"""

import random
import sys
from pathlib import Path

from modelwright.base.files import write_jsonl

MAX_DIGITS = 3


def is_held_out(a: int, b: int) -> bool:
    """A tenth of the pairs; sums of single digits are too few and are all learned."""
    return max(a, b) > 9 and (a * 31 + b * 17) % 10 == 3


def draw(rng: random.Random, held_out: bool) -> tuple[int, int]:
    """Draw how many digits first, so that short sums are not rare."""
    while True:
        digits = rng.randint(1, MAX_DIGITS)
        low = 10 ** (digits - 1) if digits > 1 else 0
        a, b = (rng.randrange(low, 10**digits) for _ in range(2))
        if is_held_out(a, b) == held_out:
            return a, b


def conversation(a: int, b: int) -> dict[str, object]:
    """Spell digits apart: each becomes a token of its own."""
    question = " ".join(f"{a}+{b}=")
    answer = " ".join(reversed(str(a + b)))
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


if __name__ == "__main__":
    out, num = Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 20_000
    rng = random.Random(0)
    for part, size in (("train", num), ("validation", max(1, num // 20))):
        rows = [conversation(*draw(rng, part == "validation")) for _ in range(size)]
        print(f"{write_jsonl(out / f'{part}.jsonl', rows):,} sums in {out / part}.jsonl, such as {rows[0]['messages']}")
