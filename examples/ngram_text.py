"""Train an n-gram model on a text, compare smoothings on its last tenth, and let the best one write.

python examples/ngram_text.py TEXT [ORDER]
"""

import sys
from pathlib import Path

import modelwright as mw


def main(path: str, order: int = 3) -> None:
    """Print the held-out perplexity of each smoothing and three sentences of the best."""
    lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    train, held_out = lines[: -len(lines) // 10], lines[-len(lines) // 10 :]
    models = {
        smoothing: mw.NgramModel.train(train, order, smoothing, min_count=2)
        for smoothing in ("laplace", "katz", "interpolated", "modified_kneser_ney")
    }
    perplexities = {name: model.perplexity(*held_out) for name, model in models.items()}
    for name, perplexity in perplexities.items():
        print(f"{name:20} {perplexity:10.1f}")
    best = models[min(perplexities, key=lambda name: perplexities[name])]
    for seed in range(3):
        print(" ".join(best.generate(seed)))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python examples/ngram_text.py TEXT [ORDER]")
    main(sys.argv[1], *map(int, sys.argv[2:]))
