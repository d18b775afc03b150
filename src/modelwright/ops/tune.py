"""The steps of a life that make and change weights: tokenizer, pre-training or a fetched base, fine-tuning."""

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from modelwright.base.artifact import new_artifact
from modelwright.base.device import has_fast_bf16, pick_device
from modelwright.base.files import read_json, read_jsonl
from modelwright.base.progress import human_count
from modelwright.base.types import Document
from modelwright.data.chat import write_conversations
from modelwright.data.read import load_documents
from modelwright.data.synthetic import make_pairs
from modelwright.evaluate.baselines import ngram_bits_per_byte
from modelwright.evaluate.perplexity import evaluate_text
from modelwright.models.hub import fetch
from modelwright.models.scoring import context_len
from modelwright.models.weights import load_model
from modelwright.ops.life import LifeConfig, Step
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.tokenizer.train import train_bpe
from modelwright.train.checkpoint import CheckpointConfig
from modelwright.train.finetune import FinetuneConfig, run_finetune
from modelwright.train.loop import LoopConfig
from modelwright.train.pretrain import PretrainConfig, run_pretrain

# Share of the time budget that pre-training gets; a LoRA over a small model needs little.
PRETRAIN_FRACTION = 0.85
CHECKPOINT_STEPS = 50
# More pairs than the minute of fine-tuning can read would only be rendered and thrown away.
MAX_PAIRS = {"train": 6000, "validation": 400}


def prepared_texts(config: LifeConfig, part: str) -> list[Document]:
    """Return the prepared documents of one part, ``train`` or ``validation``."""
    return [Document(row["id"], row["text"]) for row in read_jsonl(config.out / "data" / f"{part}.jsonl")]


def tokenizer_step(config: LifeConfig) -> Step:
    """Train byte-level BPE on the training part."""

    def make() -> dict[str, Any]:
        texts = [document.text for document in prepared_texts(config, "train")]
        tokenizer = train_bpe(texts, config.vocab_size)
        held_out = [document.text for document in prepared_texts(config, "validation")]
        num_tokens = sum(map(len, tokenizer.encode_batch(held_out)))
        num_bytes = sum(len(text.encode()) for text in held_out)
        figures = {"vocab_size": tokenizer.vocab_size, "bytes_per_token": num_bytes / max(num_tokens, 1)}
        with new_artifact(
            config.out / "tokenizer",
            "tokenizer",
            settings={"vocab_size": config.vocab_size},
            parents=[config.out / "data"],
        ) as (folder, measured):
            tokenizer.save(folder)
            measured.update(figures)
        return figures

    def tell(figures: Mapping[str, Any]) -> str:
        each = figures["bytes_per_token"]
        return f"{figures['vocab_size']:,} tokens, {each:.2f} bytes each on held-out text (raw bytes: 1)"

    return Step("tokenizer", "tokenizer", {"vocab_size": config.vocab_size}, ("data",), make, tell)


def pretrain_step(config: LifeConfig) -> Step:
    """Pre-train a decoder within the budget and compare it with n-gram models of the same tokens."""

    def make() -> dict[str, Any]:
        recipe = PretrainConfig(
            data=config.out / "data",
            tokenizer=config.out / "tokenizer",
            out=config.out / "base",
            minutes=config.minutes * PRETRAIN_FRACTION,
            loop=LoopConfig(seed=config.seed, checkpoint=CheckpointConfig(every=CHECKPOINT_STEPS)),
        )
        result = run_pretrain(recipe)
        return {**result.figures, **_score_base(config)}

    def tell(figures: Mapping[str, Any]) -> str:
        verdict = "beats" if figures["bits_per_byte"] < figures["ngram5_bits_per_byte"] else "does NOT beat"
        speed = f"{human_count(figures['tokens_per_second'])}/s ({figures['mfu_fraction']:.0%} of the matrix rate)"
        return (
            f"{human_count(figures['parameters'])} parameters, {human_count(figures['tokens'])} tokens at "
            f"{speed}; held-out bits per byte {figures['bits_per_byte']:.3f}, {verdict} 5-gram "
            f"{figures['ngram5_bits_per_byte']:.3f} (unigram {figures['unigram_bits_per_byte']:.3f})"
        )

    settings = {"minutes": config.minutes, "seed": config.seed}
    return Step("pre-train", "base", settings, ("data", "tokenizer"), make, tell)


def _score_base(config: LifeConfig) -> dict[str, Any]:
    tokenizer = load_tokenizer(config.out / "base")
    train, held_out = prepared_texts(config, "train"), prepared_texts(config, "validation")
    model = load_model(config.out / "base")
    score = evaluate_text(model, tokenizer, held_out, max_seq_len=context_len(model), dtype=scoring_dtype())
    return {
        "bits_per_byte": score.bits_per_byte,
        "perplexity": score.perplexity,
        "unigram_bits_per_byte": ngram_bits_per_byte(train, held_out, tokenizer, order=1),
        "ngram5_bits_per_byte": ngram_bits_per_byte(train, held_out, tokenizer, order=5),
    }


def scoring_dtype() -> torch.dtype | None:
    """Return bfloat16 where the machine computes it fast."""
    return torch.bfloat16 if has_fast_bf16(pick_device()) else None


def fetch_step(config: LifeConfig) -> Step:
    """Bring a base model into the run folder instead of training one."""
    assert config.base is not None

    def make() -> dict[str, Any]:
        source = fetch(str(config.base))
        model = load_model(source)
        with new_artifact(config.out / "base", "model", settings={"base": config.base}) as (folder, measured):
            for file in sorted(Path(source).iterdir()):
                if (
                    file.is_file()
                    and file.suffix in (".json", ".safetensors", ".jinja", ".txt")
                    and file.name != "manifest.json"
                ):
                    shutil.copy2(file, folder / file.name)
            measured["parameters"] = sum(p.numel() for p in model.parameters())
        return {"parameters": sum(p.numel() for p in model.parameters())}

    def tell(figures: Mapping[str, Any]) -> str:
        return f"{human_count(figures['parameters'])} parameters from {config.base}"

    return Step("base model", "base", {"base": config.base}, (), make, tell)


def finetune_step(config: LifeConfig) -> Step:
    """Make instruction pairs from the documents and fine-tune an adapter on them."""

    def make() -> dict[str, Any]:
        _write_pairs(config)
        share = 1.0 - PRETRAIN_FRACTION if config.base is None else 1.0
        recipe = FinetuneConfig(
            data=config.out / "pairs",
            base=config.out / "base",
            out=config.out / "chat",
            adapter=config.out / "adapter",
            minutes=config.minutes * share,
        )
        return run_finetune(recipe).figures

    def tell(figures: Mapping[str, Any]) -> str:
        return (
            f"{figures['num_conversations']:,} pairs, {human_count(figures['trained_parameters'])} adapter parameters, "
            f"{figures['num_steps']} steps; loss on held-out answers "
            f"{figures['validation_loss_before']:.3f} -> {figures['validation_loss']:.3f} nats a token"
        )

    settings = {"minutes": config.minutes, "seed": config.seed}
    return Step("fine-tune", "chat", settings, ("data", "base"), make, tell)


def _write_pairs(config: LifeConfig) -> None:
    with new_artifact(
        config.out / "pairs", "dataset", settings={"seed": config.seed}, parents=[config.out / "data"]
    ) as (
        folder,
        measured,
    ):
        for part in ("train", "validation"):
            pairs = make_pairs(prepared_texts(config, part), seed=config.seed)
            measured[f"num_made_{part}"] = len(pairs)
            pairs = random.Random(config.seed).sample(pairs, min(len(pairs), MAX_PAIRS[part]))
            measured[f"num_{part}"] = write_conversations(folder / f"{part}.jsonl", [pair.messages for pair in pairs])


def source_documents(config: LifeConfig) -> list[Document]:
    """Return the documents as they were read."""
    return load_documents(config.out / "documents")


def held_out_ids(config: LifeConfig) -> set[str]:
    """Return the ids of the documents that no weight was trained on."""
    return {document.id for document in prepared_texts(config, "validation")}


def training_losses(folder: Path) -> list[tuple[int, float]]:
    """Return the loss of each step that a trained model folder keeps."""
    file = folder / "training.json"
    return [(int(step), float(loss)) for step, loss in read_json(file)["losses"]] if file.is_file() else []
