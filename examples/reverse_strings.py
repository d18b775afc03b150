"""Teach a sequence-to-sequence model to write strings backwards, and see where it looks.

python examples/reverse_strings.py [STEPS]
"""

import random
import sys

from modelwright.models.fit import fit_steps
from modelwright.models.seq2seq import Seq2Seq, Seq2SeqConfig
from modelwright.nn.init import init_weights

FIRST = 3  # ids 0, 1, 2 are padding, beginning and end


def draw(source: random.Random, num: int) -> list[list[int]]:
    """Return ``num`` strings of 2 to 6 of the letters a to h, as ids."""
    return [[FIRST + source.randrange(8) for _ in range(source.randint(2, 6))] for _ in range(num)]


def main(num_steps: int = 200) -> None:
    """Train, count exact matches on new strings, and print one string with its attention."""
    model = Seq2Seq(Seq2SeqConfig(vocab_size=FIRST + 8, attention="bahdanau"))
    init_weights(model, seed=0, std=0.2)
    source = random.Random(0)

    def loss_at(step: int):
        rows = draw(source, 64)
        return model.loss(model.make_pairs(rows, [row[::-1] for row in rows]))

    fit_steps(model, loss_at, num_steps, learning_rate=1e-2)
    new = draw(random.Random(1), 200)
    exact = sum(a == b[::-1] for a, b in zip(model.greedy(new), new, strict=True))
    print(f"{exact} of {len(new)} new strings reversed")
    pairs = model.make_pairs([[3, 4, 5, 6]], [[6, 5, 4, 3]])
    weights = model(pairs.input_ids, pairs.decoder_input_ids).attention[0]  # (T, S)
    print("      " + "".join(f"{letter:>6}" for letter in "abcd."))
    for letter, row in zip("dcba.", weights.tolist(), strict=True):
        print(f"{letter:>6}" + "".join(f"{weight:6.2f}" for weight in row))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
