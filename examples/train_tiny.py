"""From a folder of documents to a language model that continues a sentence: data, tokenizer, training, sampling.

python examples/train_tiny.py my-docs/ runs/tiny [STEPS]

A model this small only learns what the text looks like; more steps and a larger shape make it better.
"""

import sys
from pathlib import Path

import modelwright as mw
from modelwright.data.pipeline import PrepareConfig
from modelwright.ops.make import make_data, make_tokenizer
from modelwright.train.loop import LoopConfig
from modelwright.train.pretrain import PretrainConfig, ShapeConfig, run_pretrain


def main(folder: Path, out: Path, num_steps: int) -> None:
    """Train a decoder of two layers and let it write."""
    make_data(folder, out / "data", PrepareConfig())
    make_tokenizer(out / "data", out / "tokenizer", vocab_size=512)
    config = PretrainConfig(
        data=out / "data",
        tokenizer=out / "tokenizer",
        out=out / "model",
        max_seq_len=64,
        shape=ShapeConfig(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=192),
        loop=LoopConfig(num_steps=num_steps, micro_batch_size=8),
    )
    losses = run_pretrain(config).losses
    print(f"loss {losses[0][1]:.2f} -> {losses[-1][1]:.2f} nats a token")

    params = mw.SamplingParams(temperature=0.8, max_tokens=32, seed=1)
    print(mw.LLM(out / "model").generate("The ", params)[0].text)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python examples/train_tiny.py FOLDER OUT [STEPS]")
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) == 4 else 300)
