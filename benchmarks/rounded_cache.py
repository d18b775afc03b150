"""What rounding the key-value cache costs on a trained model: perplexity, and distance from the plain cache.

    python benchmarks/rounded_cache.py --model FILE --tokenizer FILE --text FILE [--text FILE] [--json FILE]

The engine reads the text in the model's contexts, chunk by chunk as it serves, with its cache plain, in int8 and in
int4; the logits of every position are compared: perplexity, the Kullback-Leibler divergence from the plain cache in
nats a token, and how often the likeliest token is the same. Weights are bfloat16. One model and one text: the figures
are those of this model, not an estimate over models.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelwright.base.measured import write_result
from modelwright.base.types import SamplingParams
from modelwright.engine.engine import EngineConfig
from modelwright.engine.llm import LLM
from modelwright.models.weights import load_model
from modelwright.tokenizer.formats import load_tokenizer


def logprobs_of(model: Any, ids: list[int], context: int, kv_dtype: str | None, dtype: str) -> Tensor:
    """Return the log-probabilities (tokens, V) that the engine has at each position."""
    llm = LLM(model, config=EngineConfig(kv_dtype=kv_dtype, dtype=dtype, has_prefix_cache=False))
    run, seen = llm.engine.runner.run, list[Tensor]()

    def keep(chunks: Sequence[Any]) -> Tensor:
        logits: Tensor = run(chunks)
        seen.append(torch.log_softmax(logits.float(), -1))
        return logits

    llm.engine.runner.run = keep
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=True)
    for start in range(0, len(ids) - 1, context):
        llm.generate([ids[start : start + context]], params)
    return torch.cat(seen)


def targets_of(ids: list[int], context: int) -> tuple[Tensor, Tensor]:
    """Return which rows foretell a token of the text, and which tokens."""
    rows, targets = [], []
    for start in range(0, len(ids) - 1, context):
        part = ids[start : start + context]
        rows += range(start, start + len(part) - 1)
        targets += part[1:]
    return torch.tensor(rows), torch.tensor(targets)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    for name in ("model", "tokenizer"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, nargs="+")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.tokenizer)
    ids = [i for path in arguments.text for i in tokenizer.encode(path.read_text(encoding="utf-8"))]
    context = model.config.max_seq_len - 1
    rows, targets = targets_of(ids, context)
    found = {
        name: logprobs_of(model, ids, context, kv, dtype)[rows]
        for name, kv, dtype in (
            ("float32", None, "float32"),
            ("bfloat16", None, "bfloat16"),
            ("int8", "int8", "bfloat16"),
            ("int4", "int4", "bfloat16"),
        )
    }
    plain = found["bfloat16"]
    table, result = {}, list[dict[str, Any]]()
    for name, logprobs in found.items():
        perplexity = math.exp(-float(logprobs.gather(1, targets[:, None]).mean()))
        distance = float((plain.exp() * (plain - logprobs)).sum(1).mean())
        table[name] = {
            "perplexity": perplexity,
            "kl_nats": distance,
            "same_likeliest": float((plain.argmax(1) == logprobs.argmax(1)).float().mean()),
        }
    for name in ("int8", "int4"):
        ours, rival = table[name]["perplexity"], table["bfloat16"]["perplexity"]
        result.append(
            {"name": f"perplexity with an {name} cache", "ours": ours, "rival": rival, "rival_name": "bfloat16 cache",
             "ratio": ours / rival, "unit": "perplexity", "runs": 1}
        )  # fmt: skip
    figures = {"tokens": len(targets), "caches": table, "rows": result}
    print(figures)
    if arguments.json:
        write_result(arguments.json, figures)


if __name__ == "__main__":
    main()
