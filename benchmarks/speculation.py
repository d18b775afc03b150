"""Guessing tokens: the same answers, and how much sooner, on answers that quote and on answers that do not.

    python benchmarks/speculation.py train --folder runs/speculation [--steps N] [--only target draft heads]
    python benchmarks/speculation.py run --folder runs/speculation [--prompts 500] [--rounds 3] [--json FILE]
    python benchmarks/speculation.py run --folder ... --temperatures 0.7 --tasks --json PART.json
    python benchmarks/speculation.py pairs --folder runs/speculation [--rounds 60] --json PART.json
    python benchmarks/speculation.py join --parts PART.json PART.json --json FILE

`train` makes a pair here: a target (hidden 96, 4 layers) and a draft (hidden 48, 2 layers) of 64 tokens, and three
heads on the target. Their texts are questions over passages: three passages of random tokens, each behind a key, then
the key of one of them, whose passage is the answer. `run` checks that 500 answers at temperatures 0, 0.7 and 1 are the
same with each way of guessing and without, bit by bit, and times one user's answers in turns: quoting answers (the
right passage), and free ones (no passages; the target continues random tokens), where guessing has little to find.

`pairs` asks what guessing costs where it brings nothing: two engines of one process, one thread, take turns at the same
request (20 random tokens, 64 drawn at temperature 1), each by its own CPU time, the first by turns; the row is
the median of the rounds' ratios, with the bounds within which 95 % of resampled medians lie. "always wrong" turns every
guess into a token that no answer has, so that the proposer's whole cost stands against no gain (and has the lookup find
four tokens whatever the text); "as it is" leaves them.

A draft of a target this small costs nearly what the target costs. What it brings beside a target that costs more is
timed with the same target on 32 layers, of which 28 add nothing: the same answers, at eight times the layers.
"""

import argparse
import json
import math
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modelwright.base.measured import write_result
from modelwright.base.types import SamplingParams
from modelwright.engine.engine import EngineConfig
from modelwright.engine.llm import LLM
from modelwright.engine.speculative import SpeculationConfig
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.multi_token import MultiTokenDecoder, save_heads
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights

VOCAB_SIZE, ASK, KEYS = 64, 0, range(1, 9)
NUM_PASSAGES, PASSAGE = 3, 16
LENGTH = NUM_PASSAGES * (PASSAGE + 1) + 2
TEMPERATURES = (0.0, 0.7, 1.0)
DEEP = 32  # layers of the target that costs more
MADE, TASKS = ("target", "draft", "heads"), ("quoting", "free")
CASES = ("always wrong", "as it is")


def make_rows(count: int, generator: torch.Generator) -> Tensor:
    """Return questions with their answers, (count, LENGTH + PASSAGE)."""
    keys = torch.rand(count, len(KEYS), generator=generator).argsort(1)[:, :NUM_PASSAGES] + KEYS[0]
    shape = (count, NUM_PASSAGES, PASSAGE)
    passages = torch.randint(KEYS[-1] + 1, VOCAB_SIZE, shape, generator=generator)
    chosen = torch.randint(NUM_PASSAGES, (count,), generator=generator)
    rows = torch.arange(count)
    told = torch.cat((keys[..., None], passages), dim=2).flatten(1)
    ask = torch.full((count, 1), ASK)
    return torch.cat((told, ask, keys[rows, chosen][:, None], passages[rows, chosen]), dim=1)


def make_model(hidden_size: int, num_layers: int, seed: int) -> Llama:
    """Return an untrained Llama."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_layers=num_layers,
        num_heads=hidden_size // 16, max_seq_len=512,
    )  # fmt: skip
    return init_weights(Llama(config), seed)


def fit(model: Any, num_steps: int, seed: int, kept: Path, stop_at: float, num_heads: int = 0) -> bool:
    """Train on fresh rows: the answers fully, the rest (which is random) at a tenth; heads on the answers.

    Goes on from what is kept of an earlier part; False where the time was up before the last step.
    """
    peak, parameters = 3e-3, list(model.heads.parameters() if num_heads else model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.01)
    generator, first = torch.Generator().manual_seed(seed), 0
    if kept.exists():
        state = torch.load(kept)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        first = state["step"]
    for step in range(first, num_steps):
        if time.monotonic() > stop_at:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**parts, "generator": generator.get_state(), "step": step}, kept)
            return False
        rate = min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / num_steps))
        optimizer.param_groups[0]["lr"] = peak * rate
        rows = make_rows(32, generator)
        if num_heads:
            hidden = model.decoder(rows, hidden_only=True).hidden[:, LENGTH - 1 :].detach()  # answers alone
            loss = sum(
                F.cross_entropy(
                    model.decoder.lm_head(head(hidden[:, : PASSAGE - k - 1])).flatten(0, 1),
                    rows[:, LENGTH + k + 1 :].flatten(),
                )
                for k, head in enumerate(model.heads)
            )
        else:
            logits = model(rows[:, :-1]).logits
            each = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(32, -1)
            loss = each[:, LENGTH - 1 :].mean() + 0.1 * each[:, : LENGTH - 1].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(step + 1, round(float(loss), 3), flush=True)
    kept.unlink(missing_ok=True)
    return True


def train(folder: Path, num_steps: int, parts: list[str], seconds: float) -> None:
    """Train the pair and the heads, or some of them, and write them as folders; what is not done is kept for later."""
    stop_at = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in (("target", make_model(96, 4, 0)), ("draft", make_model(48, 2, 1))):
        if name in parts and fit(model, num_steps, 1, folder / f"{name}.part", stop_at):
            save_model(model.bfloat16(), folder / name)
    if "heads" not in parts or not (folder / "target").exists():
        return
    target = load_model(folder / "target", dtype=torch.float32)
    heads = MultiTokenDecoder(target, 3)
    if fit(heads, num_steps // 4, 2, folder / "heads.part", stop_at, num_heads=3):
        save_heads(heads.bfloat16(), folder / "target")


def ways(folder: Path, is_timed: bool) -> dict[str, SpeculationConfig | None]:
    """Return the ways of guessing."""
    return {
        "off": None,
        "ngram": SpeculationConfig(is_timed=is_timed, max_draft=16),
        "draft": SpeculationConfig("draft", draft=folder / "draft", is_timed=is_timed),
        "early_exit": SpeculationConfig("early_exit", num_layers=2, is_timed=is_timed),
        "medusa": SpeculationConfig("medusa", draft=folder / "target", is_timed=is_timed),
    }


def deepened(model: Any, num_layers: int) -> Llama:
    """Return the model with layers behind its own that add nothing, so that it costs more and says the same."""
    deep = init_weights(Llama(replace(model.config, num_layers=num_layers)), 0).bfloat16()
    with torch.no_grad():
        for layer in deep.layers[model.config.num_layers :]:
            layer.attention.o.weight.zero_()
            layer.mlp.down.weight.zero_()
    deep.load_state_dict(model.state_dict(), strict=False)
    return deep.eval()


def open_llm(folder: Path, speculation: SpeculationConfig | None, num_layers: int | None = None) -> LLM:
    """Return an engine over the target, or over the target with so many layers."""
    model = load_model(folder / "target", dtype=torch.bfloat16).eval()
    model = model if num_layers is None else deepened(model, num_layers)
    return LLM(model, config=EngineConfig(speculation=speculation))


def compare(folder: Path, count: int, temperatures: list[float]) -> dict[str, Any]:
    """Return how many answers differ from those without guessing, and how much of the drafts was right."""
    questions = make_rows(count, torch.Generator().manual_seed(99))
    rng = random.Random(0)
    prompts = [row[: LENGTH if i % 2 else rng.randint(4, LENGTH)].tolist() for i, row in enumerate(questions)]
    found: dict[str, Any] = {}
    for temperature in temperatures:
        params = [SamplingParams(temperature=temperature, seed=i, max_tokens=PASSAGE) for i in range(count)]
        answers: dict[str, list] = {}
        for name, speculation in ways(folder, is_timed=False).items():
            llm = open_llm(folder, speculation)
            answers[name] = [(c.token_ids, c.logprobs) for c in llm.generate(prompts, params)]
            stats = llm.stats()
            differing = sum(a != b for a, b in zip(answers[name], answers["off"], strict=True))
            found[f"{name}, temperature {temperature}"] = {
                "differing": differing,
                "accepted": stats.num_accepted / max(1, stats.num_drafted),
                "steps": stats.num_steps,
            }
        right = sum(a[0] == tuple(r[LENGTH:].tolist()) for a, r in zip(answers["off"], questions, strict=True))
        found[f"answers that are the right passage, temperature {temperature}"] = right / (count // 2)
    return found


def measure(folder: Path, rounds: int, chosen: list[str]) -> list[dict[str, Any]]:
    """Return tokens a second of one user with each way of guessing beside none."""
    questions = make_rows(20, torch.Generator().manual_seed(5))
    rng = random.Random(1)
    tasks = {
        "quoting": ([row[:LENGTH].tolist() for row in questions], PASSAGE),
        "free": ([[rng.randrange(9, VOCAB_SIZE) for _ in range(20)] for _ in range(4)], 120),
    }
    rows = []
    for task in chosen:
        prompts, length = tasks[task]
        for temperature in (0.0, 1.0):
            speeds: dict[str, list[float]] = {}
            known = ways(folder, is_timed=True)
            engines = {name: open_llm(folder, s) for name, s in known.items()}
            engines |= {f"{name}, {DEEP} layers": open_llm(folder, known[name], DEEP) for name in ("off", "draft")}
            for round_number in range(rounds + 1):
                for name, llm in engines.items():
                    start = time.perf_counter()
                    for number, prompt in enumerate(prompts):
                        seed = 1000 * round_number + number
                        params = SamplingParams(temperature=temperature, seed=seed, max_tokens=length, ignore_eos=True)
                        llm.generate(prompt, params)
                    if round_number:
                        speed = len(prompts) * length / (time.perf_counter() - start)
                        speeds.setdefault(name, []).append(speed)
            plain = {name: statistics.median(speeds[name]) for name in speeds if name.startswith("off")}
            for name in [name for name in speeds if name not in plain]:
                off = plain[name.replace("draft", "off") if str(DEEP) in name else "off"]
                ours = statistics.median(speeds[name])
                rows.append(
                    {
                        "name": f"{task}, temperature {temperature}, {name}",
                        "ours": ours,
                        "rival": off,
                        "rival_name": "without guessing",
                        "ratio": ours / off,
                        "unit": "tokens/s",
                        "runs": rounds,
                    }
                )
                print(rows[-1], flush=True)
    return rows


class Wrong:
    """A proposer of which every guess is a token that no answer has; where it finds nothing it may still guess that."""

    def __init__(self, proposer: Any, num_found: int):
        self._proposer, self.num_found = proposer, num_found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._proposer, name)

    def propose(self, request: Any, limit: int) -> list[int]:
        """Guess as many tokens as the proposer does."""
        return [ASK] * (len(self._proposer.propose(request, limit)) or min(limit, self.num_found))


def middle_range(values: list[float], num_draws: int = 2000) -> tuple[float, float]:
    """Return the bounds within which 95 % of the medians of resampled values lie."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(num_draws))
    return medians[num_draws // 40], medians[-num_draws // 40 - 1]


def pairs(folder: Path, rounds: int, cases: list[str], length: int = 64) -> list[dict[str, Any]]:
    """Return the speed with each way of guessing over that without, of requests in which guessing finds little."""
    rows = []
    for name, speculation in ways(folder, is_timed=True).items():
        for case in cases if speculation is not None else ():
            off, on = open_llm(folder, None), open_llm(folder, speculation)
            if case == "always wrong":
                on.engine.scheduler.proposer = Wrong(on.engine.scheduler.proposer, 4 if name == "ngram" else 0)
            found: dict[str, list[float]] = {"off": [], "on": []}
            rng = random.Random(7)
            for number in range(rounds + 3):
                prompt = [rng.randrange(9, VOCAB_SIZE) for _ in range(20)]
                params = SamplingParams(temperature=1.0, seed=number, max_tokens=length, ignore_eos=True)
                turns = [("off", off), ("on", on)]
                for side, llm in turns if number % 2 else reversed(turns):
                    start = time.process_time()
                    llm.generate(prompt, params)
                    found[side].append(time.process_time() - start)
            warm = {side: times[3:] for side, times in found.items()}  # oneDNN makes its kernels in the first turns
            ratios = [a / b for a, b in zip(warm["off"], warm["on"], strict=True)]
            low, high = middle_range(ratios)
            stats = on.stats()
            rows.append(
                {
                    "name": f"free, {case}, {name}: median of {rounds} pairs, 95 % within {low:.3f} to {high:.3f}",
                    "ours": length * rounds / sum(warm["on"]),
                    "rival": length * rounds / sum(warm["off"]),
                    "rival_name": "without guessing, in turns, CPU time",
                    "ratio": statistics.median(ratios),
                    "unit": "tokens/s of CPU time",
                    "runs": rounds,
                    "drafted": stats.num_drafted,
                    "accepted": stats.num_accepted,
                }
            )
            print(rows[-1], flush=True)
    return rows


def differing(same: dict[str, Any]) -> list[dict[str, Any]]:
    """Return for each way of guessing how many answers, at all temperatures, differ from those without."""
    found: dict[str, list[int]] = {}
    for name, told in same.items():
        if isinstance(told, dict) and not name.startswith("off"):
            found.setdefault(name.partition(",")[0], []).append(told["differing"])
    return [
        {
            "name": f"{way}: answers that differ at {len(counts)} temperatures",
            "ours": sum(counts),
            "rival": 0,
            "rival_name": "none of them",
            "ratio": None,
            "unit": "answers",
            "runs": len(counts),
        }
        for way, counts in found.items()
    ]


def main() -> None:
    """Train the pair, run the comparison, or join its parts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("train", "run", "pairs", "join"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop training after so long; call it again")
    parser.add_argument("--only", nargs="*", choices=MADE, default=list(MADE))
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--rounds", type=int, help="of `run`: 3; pairs of `pairs`: 60")
    parser.add_argument("--temperatures", type=float, nargs="*", default=list(TEMPERATURES))
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="of `pairs`")
    parser.add_argument("--parts", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "train":
        train(arguments.folder, arguments.steps, arguments.only, arguments.seconds)
        return
    rows: list[dict[str, Any]] = []
    same: dict[str, Any] = {}
    if arguments.what == "join":
        for part in arguments.parts:
            found = json.loads(part.read_text())
            rows, same = rows + found["rows"], same | found["same"]
    elif arguments.what == "pairs":
        torch.set_num_threads(1)
        rows = pairs(arguments.folder, arguments.rounds or 60, arguments.cases)
    else:
        torch.set_num_threads(1)
        rows = measure(arguments.folder, arguments.rounds or 3, arguments.tasks)
        same = compare(arguments.folder, arguments.prompts, arguments.temperatures)
    rows = [row for row in rows if row["unit"] != "answers"] + differing(same)
    print(json.dumps(same, indent=1))
    if arguments.json:
        write_result(arguments.json, {"rows": rows, "same": same})


if __name__ == "__main__":
    main()
