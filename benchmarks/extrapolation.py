"""Which positions reach beyond the length that was trained? A character model, trained at 64 and read at 256.

    python benchmarks/extrapolation.py [--seeds 0 1 2] [--positions rope learned alibi] [--steps N] [--json FILE]
    python benchmarks/extrapolation.py --docs benchmarks/results/extrapolation.json

Three models are trained for each seed: rotary, ALiBi and learned positions; all else is equal. Held-out text is scored
twice, the same characters both times: in rows of 64, and in rows of 256. The figure is the second loss over the first.
The rotary model is also read with each scaling, as it is and after a brief tuning at 256; the loss in rows of 64 that
the tuned are held against is that of the untuned model. Two controls: the plain rotary model tuned just as briefly (how
much of the gain is the tuning?), and the learned one, likewise. Figures are added to the JSON file as they come, so a
long study can be made in parts, a seed or a kind of position at a time.

Source of the comparison: Press et al. 2022 (ALiBi), section 2; Chen et al. 2023 (position interpolation), section 3;
Peng et al. 2023 (YaRN), section 4.
"""

import argparse
import copy
import gzip
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.base.device import describe_machine
from modelwright.nn.attention import Attention
from modelwright.nn.init import init_weights, mark_residual_output
from modelwright.nn.mlp import GatedMlp
from modelwright.nn.norm import RMSNorm
from modelwright.nn.positions import LearnedPositions, alibi_bias, alibi_slopes
from modelwright.nn.rope import RopeScaling, RotaryTable

ROOT = Path(__file__).parents[1]
POSITIONS = ("rope", "learned", "alibi")
START, END = "<!-- study: made by benchmarks/extrapolation.py -->", "<!-- end of study -->"


@dataclass(frozen=True)
class Study:
    """How the models are built and trained."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    train_len: int = 64
    long_len: int = 256
    batch_tokens: int = 2048
    num_steps: int = 1200
    tuning_steps: int = 120
    learning_rate: float = 3e-3
    tuning_rate: float = 1e-3
    rope_theta: float = 10000.0
    scored_rows: int = 100  # rows of long_len


def scalings(study: Study) -> dict[str, RopeScaling | None]:
    """Return the ways of stretching the rotary model."""
    factor, original = study.long_len / study.train_len, study.train_len
    return {
        "rope": None,
        "rope + PI": RopeScaling("linear", factor),
        "rope + NTK": RopeScaling("ntk", factor),
        "rope + dynamic NTK": RopeScaling("dynamic", factor, original_max_seq_len=original),
        "rope + YaRN": RopeScaling("yarn", factor, original_max_seq_len=original),
    }


class CharModel(nn.Module):
    """A pre-norm decoder whose positions are rotary, ALiBi or learned."""

    def __init__(self, study: Study, vocab_size: int, positions: str):
        super().__init__()
        size, heads = study.hidden_size, study.num_heads
        self.positions = positions
        self.embed = nn.Embedding(vocab_size, size)
        self.learned = LearnedPositions(study.long_len, size) if positions == "learned" else None
        self.norms = nn.ModuleList(RMSNorm(size, 1e-5) for _ in range(2 * study.num_layers + 1))
        self.attentions = nn.ModuleList(Attention(size, heads, heads, size // heads) for _ in range(study.num_layers))
        self.mlps = nn.ModuleList(GatedMlp(size, size * 8 // 3) for _ in range(study.num_layers))
        self.lm_head = nn.Linear(size, vocab_size, bias=False)
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            mark_residual_output(attention.o, study.num_layers)
            mark_residual_output(mlp.down, study.num_layers)
        self.study = study
        self.stretch(None)

    def stretch(self, scaling: RopeScaling | None) -> "CharModel":
        """Turn the heads by another table from now on."""
        s = self.study
        self.rope = RotaryTable(s.hidden_size // s.num_heads, s.long_len, s.rope_theta, scaling)
        return self

    def forward(self, ids: Tensor) -> Tensor:
        """Map (B, T) to logits (B, T, V)."""
        x, at = self.embed(ids), torch.arange(ids.shape[1])[None]
        if self.learned is not None:
            x = x + self.learned(at)
        rope = self.rope(ids.shape[1]) if self.positions == "rope" else None
        bias = alibi_bias(alibi_slopes(self.study.num_heads), at) if self.positions == "alibi" else None
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * i](x), rope, bias=bias)
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.lm_head(self.norms[-1](x))


def encode(text: str) -> tuple[Tensor, int]:
    """Return a number for each character, and how many different ones there are."""
    number = {c: i for i, c in enumerate(sorted(set(text)))}
    return torch.tensor([number[c] for c in text]), len(number)


def draw(ids: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` rows of ``length`` + 1 from random places, (B, T + 1)."""
    starts = torch.randint(len(ids) - length, (count,), generator=generator)
    return ids[starts[:, None] + torch.arange(length + 1)]


def loss_of(model: CharModel, rows: Tensor) -> Tensor:
    """Return the mean loss, in nats a character."""
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def train(model: CharModel, ids: Tensor, length: int, num_steps: int, rate: float, seed: int) -> CharModel:
    """Train in place with AdamW; the rate rises over a tenth of the steps, then falls along a cosine to a tenth."""
    study, generator = model.study, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(num_steps):
        factor = min(1.0, (step + 1) / (num_steps / 10)) * (0.55 + 0.45 * math.cos(math.pi * step / num_steps))
        optimizer.param_groups[0]["lr"] = rate * factor
        loss = loss_of(model, draw(ids, length, study.batch_tokens // length, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@torch.no_grad()
def score(model: CharModel, ids: Tensor) -> dict[str, float]:
    """Return the loss of the same held-out characters in short rows and in long ones."""
    study = model.study
    count = min(study.scored_rows, (len(ids) - 1) // study.long_len)
    used = count * study.long_len
    losses = {}
    for name, length in (("short", study.train_len), ("long", study.long_len)):
        inputs, targets = ids[:used].view(-1, length), ids[1 : used + 1].view(-1, length)
        each = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none").view(-1, length)
        losses[name] = each.mean().item()
        if name == "long":
            losses["beyond"] = each[:, study.train_len :].mean().item()  # the characters after the trained length
    return losses


Figures = dict[str, float]


def run_seed(study: Study, text: str, seed: int, positions: str, note: Callable[[str, Figures], None]) -> None:
    """Train one model, stretch it, tune it; ``note`` is told the name of each and its losses and their ratios."""
    ids, vocab_size = encode(text)
    training, held_out = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    model = init_weights(CharModel(study, vocab_size, positions), seed)
    train(model, training, study.train_len, study.num_steps, study.learning_rate, 1000 + seed)
    base = score(model, held_out)["short"]

    def judge(name: str, model: CharModel) -> None:
        losses = score(model, held_out)
        note(name, {**losses, "ratio": losses["long"] / base, "beyond_ratio": losses["beyond"] / base})

    def judge_tuned(name: str, model: CharModel) -> None:
        train(model, training, study.long_len, study.tuning_steps, study.tuning_rate, 2000 + seed)
        judge(f"{name}, tuned", model)

    judge(positions, model)
    if positions == "learned":
        judge_tuned(positions, model)
    if positions == "rope":
        stretched = scalings(study)
        for name, scaling in stretched.items():
            if scaling is not None:
                judge(name, copy.deepcopy(model).stretch(scaling))
        for name in ("rope + PI", "rope + YaRN", "rope"):
            judge_tuned(name, copy.deepcopy(model).stretch(stretched[name]))


def summarize(runs: dict[str, dict[str, Figures]]) -> dict[str, Figures]:
    """Return the mean of each figure over the seeds that have it, and the lowest and highest ratio."""
    result = {}
    for name in dict.fromkeys(name for run in runs.values() for name in run):
        found = [run[name] for run in runs.values() if name in run]
        means = {k: statistics.mean(x[k] for x in found) for k in found[0]}
        ratios = [x["ratio"] for x in found]
        result[name] = {**means, "ratio_lowest": min(ratios), "ratio_highest": max(ratios), "seeds": len(found)}
    return result


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table of docs/attention.md."""
    s = result["study"]
    lines = [
        f"{s['num_layers']} layers of {s['hidden_size']}, {s['num_steps']} steps of {s['batch_tokens']} characters of "
        f"Tiny Shakespeare in rows of {s['train_len']}; tuned: {s['tuning_steps']} steps in rows of {s['long_len']}. "
        f"Seeds {', '.join(sorted(result['runs']))}; nats a character; commit {result['commit']}; "
        f"`{result['command']}`.",
        "",
        f"| positions | rows of {s['train_len']} | rows of {s['long_len']} | ratio (lowest, highest) | ratio beyond "
        f"{s['train_len']} |",
        "|---|---|---|---|---|",
    ]
    for name, r in result["summary"].items():
        spread = f"{r['ratio']:.2f} ({r['ratio_lowest']:.2f}, {r['ratio_highest']:.2f})"
        lines.append(f"| {name} | {r['short']:.3f} | {r['long']:.3f} | {spread} | {r['beyond_ratio']:.2f} |")
    return "\n".join(lines)


def write_docs(result: dict[str, Any]) -> None:
    """Put the table between its marks."""
    page = ROOT / "docs" / "attention.md"
    head, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{START}\n{table(result)}\n{END}{tail}", encoding="utf-8")


def main() -> None:
    """Run the study and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--positions", nargs="+", default=list(POSITIONS), choices=POSITIONS)
    parser.add_argument("--steps", type=int, default=Study.num_steps)
    parser.add_argument("--tuning-steps", type=int, default=Study.tuning_steps)
    parser.add_argument("--theta", type=float, default=Study.rope_theta)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--docs", type=Path, help="train nothing: write the table of docs/attention.md from this file")
    args = parser.parse_args()
    if args.docs:
        write_docs(json.loads(args.docs.read_text(encoding="utf-8")))
        return
    if "MODELWRIGHT_DATA" not in os.environ:
        parser.error("MODELWRIGHT_DATA is not set; it names the folder that has text/tinyshakespeare.txt.gz.")
    packed = Path(os.environ["MODELWRIGHT_DATA"]) / "text" / "tinyshakespeare.txt.gz"
    text = gzip.decompress(packed.read_bytes()).decode("utf-8")
    study = replace(Study(), num_steps=args.steps, tuning_steps=args.tuning_steps, rope_theta=args.theta)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result: dict[str, Any] = {
        "commit": commit.strip(),
        "machine": asdict(describe_machine()),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "study": asdict(study),
        "runs": {},
    }
    for seed in args.seeds:
        for positions in args.positions:

            def note(name: str, figures: Figures, seed: int = seed) -> None:
                print(f"seed {seed}, {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()), file=sys.stderr)
                add(result, args.json, seed, name, figures)

            run_seed(study, text, seed, positions, note)
    print(table(result))


def add(result: dict[str, Any], path: Path | None, seed: int, name: str, figures: Figures) -> None:
    """Add one model's figures to the result, and to what ``path`` holds already of the same study."""
    if path is not None and path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["study"] == result["study"]:
            result["runs"] = old["runs"]
    result["runs"].setdefault(str(seed), {})[name] = figures
    result["summary"] = summarize(result["runs"])
    result["command"] = f"python benchmarks/extrapolation.py --seeds {' '.join(sorted(result['runs']))}"
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
