"""Open a model and its tokenizer as plain PyTorch and look at the likeliest next tokens.

python examples/inspect_model.py runs/quickstart/base "The function"
"""

import sys

import torch

import modelwright as mw


def main(folder: str, prompt: str) -> None:
    """Print the five likeliest tokens behind the prompt, with their probabilities."""
    model, tokenizer = mw.load_model(folder), mw.load_tokenizer(folder)
    ids = torch.tensor([tokenizer.encode(prompt)])  # (1, T)
    with torch.no_grad():
        logits = model(ids).logits[0, -1].float()  # (V,)
    top = logits.softmax(-1).topk(5)
    for probability, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        print(f"{probability:6.1%}  {tokenizer.decode([token])!r}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/inspect_model.py MODEL PROMPT")
    main(*sys.argv[1:])
