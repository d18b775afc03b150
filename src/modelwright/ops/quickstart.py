"""From a folder of documents to a specialist that cites them: the steps of `mw quickstart`.

documents -> prepare -> tokenizer -> pre-train -> fine-tune -> compress -> index -> evaluate -> report. With a base
model the tokenizer and pre-training are that model's, and the answers are generated instead of quoted.

The index holds the documents as they were read, so that every citation is exact; redaction is for what a model is
trained on, because a model may tell anyone what it has learned, while an index only quotes what its owner gave it.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modelwright.base.config import to_dict
from modelwright.base.progress import human_bytes, human_count
from modelwright.base.types import ChatModel
from modelwright.data.pipeline import PrepareConfig, prepare_artifact
from modelwright.data.read import load_documents, read_documents, write_documents
from modelwright.data.reference import write_reference
from modelwright.data.synthetic import make_questions
from modelwright.ops import measure, tune
from modelwright.ops.life import Life, LifeConfig, Step
from modelwright.rag.answer import Answer, ask
from modelwright.rag.index import Index

REFERENCE_QUESTIONS = (
    "What does textwrap.dedent do?",
    "How do I measure the execution time of small bits of code?",
    "Which function returns the factorial of a number?",
)


def run_quickstart(config: LifeConfig) -> dict[str, Any]:
    """Do every step that is not done yet, write the report, and return it.

    Raises:
        DataError: No document can be read, or none is left after preparation.
    """
    life = Life(config.out)
    steps = plan_steps(config, life)
    was_changed = False
    for number, step in enumerate(steps, start=1):
        was_changed |= life.do(number, len(steps), step)
    return measure.write_report(life, config, is_new=was_changed)


def plan_steps(config: LifeConfig, life: Life) -> list[Step]:
    """Return the steps in order."""
    steps = [_documents(config), _prepare(config)]
    if config.base is None:
        steps += [tune.tokenizer_step(config), tune.pretrain_step(config)]
    else:
        steps.append(tune.fetch_step(config))
    steps += [tune.finetune_step(config), *measure.compress_steps(config)]
    return [*steps, measure.index_step(config), measure.evaluate_step(config)]


def _documents(config: LifeConfig) -> Step:
    folder = config.out / "documents"

    def make() -> dict[str, Any]:
        source = config.docs
        if source is None:
            source = config.out / "reference"
            write_reference(source)
        result = read_documents(source)
        write_documents(result, folder, settings={"source": str(source)})
        return {
            "num_documents": len(result.documents),
            "bytes": sum(len(d.text.encode()) for d in result.documents),
            "failures": [asdict(failure) for failure in result.failures],
        }

    def tell(figures: Mapping[str, Any]) -> str:
        line = f"{figures['num_documents']:,} documents, {human_bytes(figures['bytes'])}"
        failures = figures["failures"]
        if failures:
            line += f"; {len(failures)} unreadable"
            line += "".join(f"\n    {f['path']}: {f['reason']}" for f in failures[:10])
            line += f"\n    and {len(failures) - 10} more" if len(failures) > 10 else ""
        return line

    return Step("documents", "documents", _source_settings(config.docs), (), make, tell)


def _source_settings(docs: Path | None) -> dict[str, Any]:
    """Name the source and the state of its files, so that changed documents are read again."""
    if docs is None:
        return {"docs": "reference", "python": sys.version}
    files = [docs] if docs.is_file() else sorted(p for p in docs.rglob("*") if p.is_file())
    state = [(p.relative_to(docs).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return {"docs": str(docs.resolve()), "files": state}


def _prepare(config: LifeConfig) -> Step:
    def make() -> dict[str, Any]:
        prepared = prepare_artifact(config.out / "documents", config.out / "data", PrepareConfig())
        return {
            "num_train": len(prepared.train),
            "num_validation": len(prepared.validation),
            "train_bytes": sum(len(d.text.encode()) for d in prepared.train),
            "validation_bytes": sum(len(d.text.encode()) for d in prepared.validation),
            "num_removed": len(prepared.removed),
            "funnel": [asdict(row) for row in prepared.funnel],
        }

    def tell(figures: Mapping[str, Any]) -> str:
        return (
            f"{figures['num_train']:,} to train on ({human_bytes(figures['train_bytes'])}), "
            f"{figures['num_validation']:,} held out ({human_bytes(figures['validation_bytes'])}), "
            f"{human_count(figures['num_removed'])} pieces removed, each with its reason"
        )

    return Step("prepare", "data", to_dict(PrepareConfig()), ("documents",), make, tell)


def example_questions(config: LifeConfig) -> tuple[str, ...]:
    """Return three questions that the documents answer."""
    if config.docs is None:
        return REFERENCE_QUESTIONS
    made = make_questions(load_documents(config.out / "documents"), 3, seed=config.seed)
    return tuple(question.text for question in made)


def ask_examples(config: LifeConfig, model: ChatModel | None) -> list[tuple[str, Answer]]:
    """Ask three questions of the finished specialist."""
    index = Index.open(config.out / "index", embedder=config.embedder)
    return [(question, ask(index, question, model=model)) for question in example_questions(config)]
