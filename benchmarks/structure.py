"""Output that keeps to a form: how long a mask takes, whether outputs are valid, and the steps that jumping saves.

    python benchmarks/structure.py [--parts masks suite jump] --tokenizer FILE [--suite FOLDER] [--tools FILE]
        [--model FILE --model-tokenizer FILE] [--json FILE]
    python benchmarks/structure.py --join PART.json PART.json --json FILE

*masks*: random walks through the schemas of real tools (TOOLS: a JSON list whose items have "tools"), a token drawn
from what each mask allows; timed is `Grammar.allowed`, which computes the mask and unpacks it, over TOKENIZER's whole
vocabulary. *suite*: SUITE is tests/draft2020-12 of json-schema-org/JSON-Schema-Test-Suite. Each schema is refused by
name or compiled; a compiled one must take no instance that the suite calls invalid, and every whole output of random
walks is checked with the package jsonschema_rs, which takes patterns as JavaScript writes them (a letter as in Unicode,
which Python's `re` cannot) and is itself held to the suite's verdicts. Instances are written without spaces, as the
grammar wants them; valid ones that it does not take (another order of keys, another spelling of a number) are counted,
not held against it.
*jump*: MODEL fills in tool schemas, greedy and drawn, with jump-forward and without: equal tokens, fewer steps.
"""

import argparse
import gzip
import json
import random
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from modelwright.base.errors import RequestError
from modelwright.base.measured import write_result
from modelwright.base.types import SamplingParams
from modelwright.engine.engine import EngineConfig
from modelwright.engine.grammar import Grammar, GrammarCompiler
from modelwright.engine.llm import LLM
from modelwright.models.weights import load_model
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.formats import load_tokenizer

LONGEST = 300  # tokens of a walk
CLOSERS = ('"', '"}', '",', "}", "]", "},", '":', ",")


def read_schemas(path: Path) -> list[dict[str, Any]]:
    """Return the distinct parameter schemas of all tools."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as handle:
        items = json.load(handle)
    found: dict[str, dict[str, Any]] = {}
    for item in items:
        tools = item.get("tools") or "[]"
        for tool in json.loads(tools) if isinstance(tools, str) else tools:
            schema = tool.get("parameters") or {}
            if schema.get("properties"):
                found[json.dumps(schema, sort_keys=True)] = schema
    return list(found.values())


class Walker:
    """Draws tokens that a grammar allows, those that close something more often, so that walks end."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, seed: int):
        self.tokenizer, self.rng = tokenizer, random.Random(seed)
        self.stop_ids = list(tokenizer.stop_ids)
        self.closers = [i for i in range(vocab_size) if bytes(tokenizer.token_bytes(i)).decode("latin1") in CLOSERS]
        self.compiler = GrammarCompiler(tokenizer, vocab_size, tokenizer.stop_ids)
        self.seconds: list[float] = []

    def start(self, schema: Any) -> Grammar:
        """Return the grammar of a schema; raises `RequestError` where it is refused."""
        grammar = self.compiler.start(SamplingParams(json_schema=schema if isinstance(schema, str) else dict(schema)))
        assert grammar is not None
        return grammar

    def walk(self, grammar: Grammar) -> str | None:
        """Return a whole output, or None where it grew too long."""
        data = b""
        for _ in range(LONGEST):
            begun = time.perf_counter()
            mask = grammar.allowed()
            self.seconds.append(time.perf_counter() - begun)
            marks = mask.numpy().copy()
            may_end = bool(marks[self.stop_ids].any())
            marks[self.stop_ids] = False
            allowed = np.flatnonzero(marks)
            if may_end and (len(allowed) == 0 or self.rng.random() < 0.5):
                return data.decode("utf-8")
            closing = [i for i in self.closers if marks[i]]
            chosen = closing if closing and self.rng.random() < 0.35 else allowed
            token = int(chosen[self.rng.randrange(len(chosen))])
            assert grammar.accept(token), "a token that the mask allows is not taken"
            data += bytes(self.tokenizer.token_bytes(token))
            if grammar.is_complete:
                return data.decode("utf-8")
        return None


def masks(tokenizer: Tokenizer, schemas: list[dict[str, Any]], num_walks: int = 2) -> dict[str, Any]:
    """Return how long masks take, and how long a schema's first use."""
    walker, compiling, num_whole = Walker(tokenizer, tokenizer.vocab_size, 0), [], 0
    walker.start(schemas[0])  # the table of the tokenizer is made once
    refused = 0
    for schema in schemas:
        begun = time.perf_counter()
        try:
            walker.start(schema)
        except RequestError:
            refused += 1
            continue
        compiling.append(time.perf_counter() - begun)
        num_whole += sum(walker.walk(walker.start(schema)) is not None for _ in range(num_walks))
    p50, p99 = (float(np.percentile(walker.seconds, q)) * 1e6 for q in (50, 99))
    return {
        "masks": {
            "schemas": len(schemas),
            "refused": refused,
            "whole outputs": num_whole,
            "masks": len(walker.seconds),
            "vocabulary": tokenizer.vocab_size,
            "longest_us": max(walker.seconds) * 1e6,
            "compile_p50_ms": float(np.percentile(compiling, 50)) * 1e3,
            "compile_longest_ms": max(compiling) * 1e3,
        },
        "rows": [
            _row("time of a mask, median", p50, 100.0, "at most, wanted", "us", len(walker.seconds)),
            _row("time of a mask, 99th percentile", p99, 5000.0, "at most, wanted", "us", len(walker.seconds)),
        ],
    }


def takes(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Tell whether a grammar takes a whole text."""
    spelled = grammar_tokens(tokenizer, text)
    if not all(grammar.accept(token) for token in spelled):
        return False
    return grammar.is_complete or bool(grammar.allowed()[list(tokenizer.stop_ids)].any())


def grammar_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return tokens of exactly this text, byte by byte where there is no better way."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if b"".join(bytes(tokenizer.token_bytes(i)) for i in ids) == text.encode():
        return ids
    single = {bytes(tokenizer.token_bytes(i)): i for i in range(tokenizer.vocab_size)}
    return [single[bytes([byte])] for byte in text.encode()]


def suite(tokenizer: Tokenizer, folder: Path, num_walks: int = 6) -> dict[str, Any]:
    """Return what became of every schema of the test-suite."""
    import jsonschema_rs

    walker = Walker(tokenizer, tokenizer.vocab_size, 1)
    counts: dict[str, int] = dict.fromkeys(
        ("compiled", "refused", "invalid taken", "invalid not taken", "valid taken", "valid not taken", "outputs",
         "outputs invalid", "walks too long", "instances", "checker wrong"), 0
    )  # fmt: skip
    reasons: dict[str, list[str]] = {}
    wrong: list[Any] = []
    for path in sorted(folder.glob("*.json")):
        for case in json.loads(path.read_text(encoding="utf-8")):
            schema = case["schema"] if isinstance(case["schema"], dict) else json.dumps(case["schema"])
            try:
                walker.start(schema)
            except RequestError as error:
                counts["refused"] += 1
                reasons.setdefault(str(error).split(": ", 1)[-1][:100], []).append(path.stem)
                continue
            counts["compiled"] += 1
            check = jsonschema_rs.Draft202012Validator(case["schema"])
            for test in case["tests"]:
                counts["instances"] += 1
                counts["checker wrong"] += check.is_valid(test["data"]) != test["valid"]
                text = json.dumps(test["data"], separators=(",", ":"), ensure_ascii=False)
                is_taken = takes(walker.start(schema), tokenizer, text)
                counts[f"{'valid' if test['valid'] else 'invalid'} {'taken' if is_taken else 'not taken'}"] += 1
                if is_taken and not test["valid"]:
                    wrong.append([path.stem, case["description"], text])
            for _ in range(num_walks):
                text = walker.walk(walker.start(schema))
                counts["walks too long"] += text is None
                if text is not None:
                    counts["outputs"] += 1
                    if not check.is_valid(json.loads(text, parse_float=Decimal)):  # -4E07476 is a number too
                        counts["outputs invalid"] += 1
                        wrong.append([path.stem, case["description"], text[:200]])
    print(json.dumps(wrong, indent=1))
    most = sorted(reasons.items(), key=lambda item: -len(item[1]))
    refusals = {reason: {"schemas": len(files), "files": sorted(set(files))} for reason, files in most}
    total, kept = counts["compiled"] + counts["refused"], counts["outputs"] - counts["outputs invalid"]
    invalid, valid = (counts[f"{kind} taken"] + counts[f"{kind} not taken"] for kind in ("invalid", "valid"))
    return {
        "suite": {**counts, "refusals": refusals, "wrong": wrong},
        "rows": [
            _row("schemas compiled, the others refused by name", counts["compiled"], total, "all", "schemas", 1),
            _row("whole outputs that are valid", kept, counts["outputs"], "all", "outputs", 1),
            _row("invalid instances not taken", counts["invalid not taken"], invalid, "all", "instances", 1),
            _row("valid instances taken", counts["valid taken"], valid, "all", "instances", 1),
        ],
    }


def jump(model_path: Path, tokenizer_path: Path, schemas: list[dict[str, Any]], count: int = 8) -> dict[str, Any]:
    """Return the steps and the speed with jump-forward and without, and whether the answers are the same."""
    model, tokenizer = load_model(model_path), load_tokenizer(tokenizer_path)
    chosen = [s for s in schemas if len(json.dumps(s)) < 700][:count]
    params = [
        SamplingParams(temperature=t, seed=i, max_tokens=120, json_schema=schema)
        for i, schema in enumerate(chosen)
        for t in (0.0, 0.7)
    ]
    found: dict[bool, Any] = {}
    for has_jump in (False, True):
        llm = LLM(model, tokenizer=tokenizer, config=EngineConfig(has_jump_forward=has_jump, dtype="bfloat16"))
        llm.generate("Once", params[0])  # warms up
        begun = time.perf_counter()
        done = [llm.generate("Once upon a time", one)[0] for one in params]
        seconds = time.perf_counter() - begun
        answers = [(c.token_ids, c.logprobs) for c in done]
        found[has_jump] = (answers, llm.stats(), seconds)
    (slow, plain, slow_seconds), (fast, stats, seconds) = found[False], found[True]
    num_tokens = sum(len(ids) for ids, _ in fast)
    return {
        "jump": {
            "answers": len(params),
            "differing": sum(a != b for a, b in zip(slow, fast, strict=True)),
            "tokens": num_tokens,
            "drafted": stats.num_drafted,
            "accepted": stats.num_accepted,
        },
        "rows": [
            _row("steps for tool calls, jumping", stats.num_steps, plain.num_steps, "without", "steps", 1),
            _row("tool calls, one user", num_tokens / seconds, num_tokens / slow_seconds, "without", "tokens/s", 1),
        ],
    }


def _row(name: str, ours: float, rival: float, rival_name: str, unit: str, runs: int) -> dict[str, Any]:
    return {"name": name, "ours": ours, "rival": rival, "rival_name": rival_name, "ratio": ours / rival, "unit": unit,
            "runs": runs}  # fmt: skip


def join(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of several parts as one."""
    joined: dict[str, Any] = {"rows": []}
    for result in results:
        joined["rows"] += result.pop("rows", [])
        joined |= {name: result[name] for name in ("masks", "suite", "jump") if name in result}
    return joined


def main() -> None:
    """Run the parts that were asked for, or join them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="*", choices=("masks", "suite", "jump"), default=["masks", "suite", "jump"])
    for name in ("tokenizer", "suite", "tools", "model", "model-tokenizer", "json"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--join", type=Path, nargs="+")
    arguments = parser.parse_args()
    results = [json.loads(part.read_text()) for part in arguments.join or ()]
    if not results:
        tokenizer = load_tokenizer(arguments.tokenizer)
        if "masks" in arguments.parts:
            results.append(masks(tokenizer, read_schemas(arguments.tools)))
        if "suite" in arguments.parts:
            results.append(suite(tokenizer, arguments.suite))
        if "jump" in arguments.parts:
            results.append(jump(arguments.model, arguments.model_tokenizer, read_schemas(arguments.tools)))
    joined = join(results)
    print(json.dumps(joined, indent=1))
    if arguments.json:
        write_result(arguments.json, joined, ("torch", "llguidance", "jsonschema_rs"))


if __name__ == "__main__":
    main()
