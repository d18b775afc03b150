"""What each weight format costs in perplexity and takes in memory, on one small published model.

    python benchmarks/weight_formats.py --model MODEL --tokenizer FILE --text FILE [--json FILE]

MODEL is a folder or a file that `load_model` reads; TEXT is cut into the model's contexts. Every format is written to
disk and read back the way a user's would be: ours by rounding, GGUF by our writer, GPTQ in AutoGPTQ's packing (rounded
to nearest, group 32, symmetric, so that the row shows the format and not the calibration). "kept": the matrices stay
in their bits; "dense": multiplied out. Perplexity is of bfloat16 models through PyTorch; the rival of each row is the
model in bfloat16. One model, one text: the spread between formats is the rounding's, not an estimate over texts.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.measured import write_result
from modelwright.engine.prepare import rounded
from modelwright.models.gguf import read_gguf, write_gguf
from modelwright.models.layout import to_published
from modelwright.models.tensor_file import read_folder, write_tensors
from modelwright.models.weights import load_model, save_model
from modelwright.nn.linear import linears
from modelwright.nn.lowbit import Int4Linear, Int8Linear, LowBitLinear
from modelwright.nn.nf4 import NF4Linear
from modelwright.tokenizer.formats import load_tokenizer


@torch.inference_mode()
def perplexity(model: nn.Module, ids: list[int], context: int) -> float:
    """Return the perplexity of all tokens but the first of each stretch."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, context):
        part = torch.tensor([ids[start : start + context]])
        if part.shape[1] < 2:
            continue
        logits = model(part).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum"))
        count += part.shape[1] - 1
    return math.exp(total / count)


def weight_bytes(model: nn.Module) -> int:
    """Return the memory of all distinct tensors."""
    found = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(found.values())


def write_gptq(model: nn.Module, folder: Path, bits: int) -> None:
    """Write a model's blocks in AutoGPTQ's packing, rounded to nearest."""
    save_model(model, folder)
    tensors = {name: tensor for _, name, tensor in read_folder(folder)}
    kind = Int4Linear if bits == 4 else Int8Linear
    for name, layer in linears(model):
        if name == "lm_head" or not isinstance(layer, nn.Linear):
            continue
        published = to_published(model, f"{name}.weight").removesuffix(".weight")
        made = kind.from_linear(layer, 32, dtype=torch.float16)
        middle = 1 << (bits - 1)
        q = (made.integers().int() + middle).t()  # (in, out)
        zeros = torch.full((q.shape[0] // 32, q.shape[1]), middle - 1, dtype=torch.int32)
        del tensors[f"{published}.weight"]
        tensors |= {
            f"{published}.qweight": _words(q, bits, 0),
            f"{published}.qzeros": _words(zeros, bits, 1),
            f"{published}.scales": made.weight_scale.t().contiguous(),
            f"{published}.g_idx": (torch.arange(q.shape[0]) // 32).int(),
        }
    write_tensors(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    scheme = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": True, "desc_act": False}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": scheme}))


def _words(numbers: Tensor, bits: int, dim: int) -> Tensor:
    parts = numbers.movedim(dim, -1).unflatten(-1, (-1, 32 // bits)).long()
    words = (parts << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int().movedim(-1, dim).contiguous()


def formats(model: nn.Module, folder: Path) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, model) for every format."""
    yield "int8, a scale a row", rounded(model, "int8")
    yield "int4, groups of 32", rounded(model, "int4")
    yield "nf4, blocks of 64", rounded(model, "nf4")
    for bits in (8, 4):
        write_gptq(model, folder / f"gptq{bits}", bits)
        yield f"GPTQ folder, {bits} bits, kept", load_model(folder / f"gptq{bits}", dtype=torch.bfloat16)
    for kind in ("q8_0", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k"):
        if kind.endswith("k") and model.config.hidden_size % 256:  # type: ignore[union-attr, operator]
            continue  # no whole blocks: the writer would take another type
        file = folder / f"{kind}.gguf"
        write_gguf(model, None, file, kind)
        if kind in ("q8_0", "q4_0"):
            yield f"GGUF {kind}, kept", read_gguf(file, dtype=torch.bfloat16, is_packed=True)
        yield f"GGUF {kind}, dense", read_gguf(file, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = load_model(given.model, dtype=torch.bfloat16)
    ids = load_tokenizer(given.tokenizer).encode(given.text.read_text(encoding="utf-8"))[: given.max_tokens]
    context = int(model.config.max_seq_len)  # type: ignore[union-attr, arg-type]
    base, size = perplexity(model, ids, context), weight_bytes(model)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, made in formats(model, Path(folder)):
            found = perplexity(made, ids, context)
            kept = sum(isinstance(module, (LowBitLinear, NF4Linear)) for module in made.modules())
            sides = {"ours": found, "rival": base, "rival_name": "bfloat16", "ratio": found / base}
            facts = {"weight_bytes": weight_bytes(made), "bfloat16_bytes": size, "low_bit_layers": kept}
            rows.append({"name": name, **sides, "unit": "perplexity", "runs": [found], **facts})
            print(
                f"{name:28} {found:9.4f} {found / base:8.4f} {facts['weight_bytes'] / 1e6:7.2f} MB {kept}", flush=True
            )
    print(f"bfloat16 {base:.4f}, {size / 1e6:.2f} MB, {len(ids)} tokens")
    if given.json:
        facts = {"model": given.model.name, "text": given.text.name, "tokens": len(ids), "context": context}
        write_result(given.json, {**facts, "rows": rows}, packages=("torch",))


if __name__ == "__main__":
    main()
