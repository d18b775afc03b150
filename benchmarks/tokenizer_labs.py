"""Two labs: a tokenizer for contracts, and one for medicine in two languages; beside general ones.

    python benchmarks/tokenizer_labs.py --data FOLDER [--lab legal medical] [--seeds 0 1 2] [--flops 2e12] [--json FILE]

Legal: a BPE of 16,000 pieces learned from 120 commercial contracts of CUAD, beside one of the same size learned from
general English (WikiText-2 and books) and GPT-2's 50,257. On 30 other contracts: bytes per token, fertility, and bits
per byte of a small decoder (2 layers of 64) trained on the contracts under each tokenizer with the same FLOPs; and, so
that the price of a large output matrix at this size can be told from the cut of the text, under GPT-2's with as many
steps as the legal one had, which costs three times the FLOPs (seeds 0 and 1).

Medical: the data folder has no German medical text, so the bilingual tokenizer learns from English medical abstracts
and from general German (paragraphs and a book), as many bytes of each; it is held against one learned from the English
abstracts alone and against GPT-2's. Fertility and bytes per token on the same paragraphs in English and German, of the
articles "Pharmacy" and "Black Death", which none of them has seen, and on English abstracts.

`ratio` is ours / rival. What the JSON file has of other labs and seeds is kept, so that the labs can be run in parts.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizer_texts import abstracts, contracts, english, german_book, parallel

from modelwright.base.measured import circumstances
from modelwright.ops.fixed_compute import ComputeConfig, score_tokenizer, shape_of
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.compare import measure
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.tokenizer.train import train_bpe
from modelwright.train.budget import flops_per_token

MEDICAL = ("Pharmacy", "Black_Death")
LEGAL_SIZE, MEDICAL_SIZE = 16_000, 8_000
HELD_OUT_CHARS = 8_000  # of each held-out contract, for bits per byte

SMALL = {"hidden_size": 64, "num_layers": 2}

Row = dict[str, Any]
Keep = Callable[[dict[str, Any]], None]


def gpt2(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "tokenizers/tiktoken/r50k_base.tiktoken")


def row(name: str, ours: list[float], rival: list[float], rival_name: str, unit: str) -> Row:
    a, b = statistics.mean(ours), statistics.mean(rival)
    runs = {"ours": ours, "rival": rival}
    return {"name": name, "ours": a, "rival": b, "rival_name": rival_name, "ratio": a / b, "unit": unit, "runs": runs}


def legal(folder: Path, seeds: list[int], flops: float, kept: dict[str, Any], keep: Keep) -> dict[str, Any]:
    training, held_out = contracts(folder)
    size = sum(len(text) for text in training)
    known = {
        "legal 16k": train_bpe(training, LEGAL_SIZE),
        "general 16k": train_bpe(english(folder, size), LEGAL_SIZE),
        "GPT-2 50k": gpt2(folder),
    }
    figures = {name: vars(measure(one, held_out)) for name, one in known.items()}
    runs: dict[str, dict[str, Any]] = kept.get("runs", {})
    scored = {"contracts": [text[:HELD_OUT_CHARS] for text in held_out]}
    costs = {name: flops_per_token(shape_of(one, ComputeConfig(**SMALL)), 128) for name, one in known.items()}
    budgets = {f"{name}, equal FLOPs": flops for name in known}
    budgets["GPT-2 50k, equal steps"] = flops * costs["GPT-2 50k"] / costs["legal 16k"] * 1.0001
    for seed in seeds:
        for at, budget in budgets.items():
            if str(seed) in runs.get(at, {}) or ("steps" in at and seed > 1):
                continue
            config = ComputeConfig(flops=budget, **SMALL)
            found = score_tokenizer(known[at.split(",")[0]], training, scored, config, seed)
            one = {**vars(found), "bits_per_byte": found.bits_per_byte["contracts"]}
            runs.setdefault(at, {})[str(seed)] = one
            print(at, seed, one, flush=True)
            keep({"runs": runs})
    rows = [
        row(f"legal: {unit} on held-out contracts", [figures["legal 16k"][key]], [figures[name][key]], name, unit)
        for key, unit in (("bytes_per_token", "bytes per token"), ("fertility", "tokens per word"))
        for name in ("general 16k", "GPT-2 50k")
    ]
    bits = {at: [run["bits_per_byte"] for _, run in sorted(found.items())] for at, found in runs.items()}
    ours = bits.get("legal 16k, equal FLOPs", [])
    for at, rival in bits.items():
        if at != "legal 16k, equal FLOPs":
            rows.append(row("legal: held-out contracts", ours[: len(rival)], rival, at, "bits per byte"))
    sizes = {"training_bytes": size, "held_out_contracts": len(held_out), "vocab_size": LEGAL_SIZE, "flops": flops}
    return {"data": sizes, "figures": figures, "runs": runs, "rows": rows}


def medical(folder: Path, seeds: list[int], flops: float, kept: dict[str, Any], keep: Keep) -> dict[str, Any]:
    training, held_out = abstracts(folder)
    test = parallel(folder, MEDICAL)
    german = [text for text in parallel(folder)["de"] if text not in test["de"]] + [german_book(folder)]
    share = sum(len(text.encode()) for text in german)
    few, size = [], 0
    for text in training:
        few.append(text)
        size += len(text.encode())
        if size >= share:
            break
    known = {
        "bilingual 8k": train_bpe([*few, *german], MEDICAL_SIZE),
        "English medical 8k": train_bpe(few, MEDICAL_SIZE),
        "GPT-2 50k": gpt2(folder),
    }
    texts = {
        "English paragraphs": test["en"],
        "German paragraphs": test["de"],
        "English abstracts": held_out,
    }
    figures = {name: {place: vars(measure(one, some)) for place, some in texts.items()} for name, one in known.items()}
    rows = [
        row(
            f"medical: fertility on {place}",
            [figures["bilingual 8k"][place]["fertility"]],
            [figures[name][place]["fertility"]],
            name,
            "tokens per word",
        )
        for place in texts
        for name in ("English medical 8k", "GPT-2 50k")
    ]
    sizes = {"training_bytes": {"English": size, "German": share}, "vocab_size": MEDICAL_SIZE}
    return {"data": sizes, "figures": figures, "rows": rows}


LABS: dict[str, Callable[..., dict[str, Any]]] = {"legal": legal, "medical": medical}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MODELWRIGHT_DATA"), help="Folder of the texts.")
    parser.add_argument("--lab", nargs="+", choices=list(LABS), default=list(LABS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="None: how texts are cut, no training.")
    parser.add_argument("--flops", type=float, default=2e12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give --data FOLDER, or set MODELWRIGHT_DATA")
    for lab in arguments.lab:
        whole = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.is_file() else {}

        def keep(found, lab=lab, whole=whole):
            if arguments.json:
                whole[lab] = {**circumstances(("torch", "tokenizers")), "seeds": arguments.seeds, **found}
                whole["rows"] = [one for name in LABS for one in whole.get(name, {}).get("rows", [])]
                arguments.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

        found = LABS[lab](arguments.data, arguments.seeds, arguments.flops, whole.get(lab, {}), keep)
        keep(found)
        for one in found["rows"]:
            print(f"{one['name']}: {one['ours']:.3f} {one['unit']}, {one['rival_name']} {one['rival']:.3f}")


if __name__ == "__main__":
    main()
