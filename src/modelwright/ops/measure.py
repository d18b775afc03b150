"""The steps of a life that measure: compression with its cost, the index, retrieval and citations, the report."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from modelwright.base.artifact import new_artifact
from modelwright.base.config import to_dict
from modelwright.base.files import write_json
from modelwright.base.progress import bar, console, human_bytes, track
from modelwright.compress.report import compare
from modelwright.compress.rtn import quantize_model, save_quantized
from modelwright.data.pack import stream_rows
from modelwright.data.synthetic import Question, make_questions
from modelwright.evaluate.report import save_report
from modelwright.models.scoring import context_len
from modelwright.models.weights import load_model
from modelwright.ops.life import Life, LifeConfig, Step
from modelwright.ops.tune import held_out_ids, prepared_texts, source_documents, training_losses
from modelwright.rag.answer import ask
from modelwright.rag.index import Hit, Index, Mode
from modelwright.rag.metrics import check_citations, retrieval_scores
from modelwright.tokenizer.formats import load_tokenizer

MAX_COMPARED_TOKENS = 16_384
NUM_CITED_ANSWERS = 60  # answers whose citations are checked span by span
MODES: tuple[Mode, ...] = ("bm25", "dense", "fused")


def compress_steps(config: LifeConfig) -> list[Step]:
    """Quantize the fine-tuned model to 8 and to 4 bits."""
    return [_compress_step(config, 8), _compress_step(config, 4)]


def _compress_step(config: LifeConfig, bits: int) -> Step:
    name = f"int{bits}"

    def make() -> dict[str, Any]:
        original = load_model(config.out / "chat")
        tokenizer = load_tokenizer(config.out / "chat")
        with bar(f"quantize to {name}", 2) as shown:
            quantized = quantize_model(original, bits)
            shown.advance()
            figures = compare(original, quantized, held_out_rows(config))
            shown.advance()
        with new_artifact(
            config.out / name,
            "model",
            settings={"bits": bits},
            parents=[config.out / "chat"],
        ) as (folder, measured):
            save_quantized(quantized, folder)
            tokenizer.save(folder)
            figures["original_size_bytes"] = weight_bytes(config.out / "chat")
            figures["size_bytes"] = weight_bytes(folder)
            measured.update(figures)
        return figures

    def tell(figures: Mapping[str, Any]) -> str:
        return (
            f"{human_bytes(figures['original_size_bytes'])} -> {human_bytes(figures['size_bytes'])}, perplexity x "
            f"{figures['perplexity_ratio']:.4f}, KL divergence {figures['kl_divergence']:.5f} nats a token"
        )

    return Step(f"compress to {name}", name, {"bits": bits}, ("chat", "data"), make, tell)


def weight_bytes(folder: Any) -> int:
    """Return the size of the weight files in a model folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def held_out_rows(config: LifeConfig) -> torch.Tensor:
    """Return rows of held-out tokens, (B, T)."""
    tokenizer = load_tokenizer(config.out / "chat")
    documents = [
        np.array(ids) for ids in tokenizer.encode_batch([d.text for d in prepared_texts(config, "validation")])
    ]
    context = context_len(load_model(config.out / "chat"))
    total = sum(map(len, documents))
    rows = stream_rows(documents, max(2, min(context, 512, total)), tokenizer.eos_id, seed=0)
    return torch.from_numpy(rows.input_ids[: max(1, MAX_COMPARED_TOKENS // rows.input_ids.shape[1])])


def index_step(config: LifeConfig) -> Step:
    """Index the documents as they were read."""

    def make() -> dict[str, Any]:
        index = Index.build(config.out / "documents", config.out / "index", embedder=config.embedder)
        return {"num_chunks": len(index.chunks), "num_documents": len(index.documents)}

    def tell(figures: Mapping[str, Any]) -> str:
        return f"{figures['num_chunks']:,} passages of {figures['num_documents']:,} documents, BM25 and dense vectors"

    return Step("index", "index", {"embedder": config.embedder}, ("documents",), make, tell)


def evaluate_step(config: LifeConfig) -> Step:
    """Measure retrieval on questions from held-out documents, and check citations span by span."""

    def make() -> dict[str, Any]:
        index = Index.open(config.out / "index", embedder=config.embedder)
        questions = held_out_questions(config)
        hits: dict[str, list[list[Hit]]] = {mode: [] for mode in MODES}
        for question in track(questions, "search"):
            scores = index.scores(question.text)
            for mode in MODES:
                hits[mode].append(index.hits(getattr(scores, mode), 10))
        found = {mode: retrieval_scores(questions, hits[mode]) for mode in MODES}
        answers = [ask(index, q.text) for q in track(questions[:NUM_CITED_ANSWERS], "check citations")]
        figures = {
            "retrieval": found,
            "citations": check_citations(index, answers),
            "num_supported": sum(answer.is_supported for answer in answers),
        }
        with new_artifact(
            config.out / "evaluation",
            "report",
            settings={"num_questions": len(questions)},
            parents=[config.out / "index"],
        ) as (folder, measured):
            write_json(folder / "evaluation.json", figures)
            write_json(folder / "questions.json", [to_dict(question) for question in questions])
            measured.update(figures)
        return figures

    def tell(figures: Mapping[str, Any]) -> str:
        scores, cited = figures["retrieval"], figures["citations"]
        parts = [f"{mode} {scores[mode]['recall_at_5']:.3f}" for mode in MODES]
        return (
            f"recall@5 on {scores['fused']['num_questions']} questions: {', '.join(parts)}; "
            f"{cited['exact']} of {cited['checked']} citations exact"
        )

    settings = {"num_questions": config.num_questions, "seed": config.seed}
    return Step("evaluate", "evaluation", settings, ("index", "data"), make, tell)


def held_out_questions(config: LifeConfig) -> list[Question]:
    """Return questions about the documents that no weight was trained on; about all, where too few can be made."""
    documents, held_out = source_documents(config), held_out_ids(config)
    kept = [d for d in documents if d.id in held_out]
    questions = make_questions(kept, config.num_questions, seed=config.seed, corpus=documents)
    if len(questions) < 10:
        console.print("  the held-out documents give fewer than ten questions; all documents are asked about")
        questions = make_questions(documents, config.num_questions, seed=config.seed)
    return questions


def write_report(life: Life, config: LifeConfig, *, is_new: bool) -> dict[str, Any]:
    """Collect the figures of all steps, write ``report.json``, ``report.md`` and the plots, and return the report."""
    pretrain = life.rows.get("pre-train", {}).get("figures")
    evaluation = life.figures("evaluate")
    report = {
        **life.summary(),
        "settings": to_dict(config),
        "documents": life.figures("documents"),
        "prepare": life.figures("prepare"),
        "tokenizer": life.rows.get("tokenizer", {}).get("figures"),
        "pretrain": pretrain,
        "finetune": life.figures("fine-tune"),
        "compress": {name: life.figures(f"compress to {name}") for name in ("int8", "int4")},
        "index": life.figures("index"),
        "retrieval": evaluation["retrieval"],
        "citations": evaluation["citations"],
    }
    if is_new or not (config.out / "report.md").is_file():
        losses = {"pre-train": training_losses(config.out / "base"), "fine-tune": training_losses(config.out / "chat")}
        save_report(config.out, report, losses)
    return report
