"""Make one artifact from its parents: what the verbs do one at a time, and the steps of a life in a row.

Every function reads its parents from their folders, writes one artifact with its manifest, and returns its figures.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelwright.base.artifact import new_artifact
from modelwright.base.device import has_fast_bf16, pick_device
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.registry import lookup
from modelwright.base.types import Document
from modelwright.compress.report import compare
from modelwright.compress.rtn import quantize_model, save_quantized
from modelwright.data.chat import write_conversations
from modelwright.data.pack import stream_rows
from modelwright.data.pipeline import PrepareConfig, Prepared, load_dataset, prepare_artifact
from modelwright.data.read import Failure, read_documents, write_documents
from modelwright.data.reference import write_reference
from modelwright.data.source import ReadConfig
from modelwright.data.synthetic import make_pairs
from modelwright.data.text_lines import SetAside
from modelwright.evaluate.baselines import ngram_bits_per_byte
from modelwright.evaluate.contamination import find_contamination, open_index
from modelwright.evaluate.perplexity import TextScore, evaluate_text
from modelwright.models.scoring import context_len
from modelwright.models.weights import load_model
from modelwright.ops.texts import stream_texts
from modelwright.tokenizer import ALGORITHMS
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.compare import bytes_per_token
from modelwright.tokenizer.formats import load_tokenizer

MAX_COMPARED_TOKENS = 16_384
MAX_COMPARED_ROW = 512
MAX_MEASURED_CHARS = 4_000_000  # of text on which a new tokenizer is measured
MAX_SCORED_CONTEXT = 2048  # tokens; longer windows cost memory and change bits per byte little


@dataclass(frozen=True)
class DataMade:
    """What became of a folder of documents."""

    documents: Path  # artifact of the documents as they were read
    num_documents: int
    failures: Sequence[Failure]
    prepared: Prepared
    pairs: Path | None  # data set of conversations; None: none could be made
    num_pairs: int


def make_data(
    docs: Path | None, out: Path, config: PrepareConfig, seed: int = 0, *, is_strict: bool = False
) -> DataMade:
    """Read documents, prepare a data set at ``out``, and make instruction pairs beside it.

    Args:
        docs: Folder or file; None: the reference documentation of the running interpreter.
        out: The data set; ``out-documents`` and ``out-pairs`` are made beside it.
        config: Of the preparation.
        seed: For the choice of pairs.
        is_strict: Stop at the first document that cannot be read.

    Raises:
        DataError: No document can be read, or none is left after preparation; strict: one cannot be read.
    """
    out = Path(out)
    documents, pairs = out.with_name(out.name + "-documents"), out.with_name(out.name + "-pairs")
    if docs is None:
        docs = out.with_name(out.name + "-reference")
        write_reference(docs)
    result = read_documents(ReadConfig(str(docs), strict=is_strict))
    write_documents(result, documents, settings={"source": str(docs)})
    prepared = prepare_artifact(documents, out, config)
    num_pairs = make_pair_set(out, pairs, seed)
    return DataMade(
        documents, len(result.documents), result.failures, prepared, pairs if num_pairs else None, num_pairs
    )


def make_pair_set(data: Path, out: Path, seed: int = 0) -> int:
    """Write instruction pairs from a data set and return how many; none makes no artifact."""
    parts = dict(zip(("train", "validation"), load_dataset(data), strict=True))
    pairs = {part: make_pairs(documents, seed=seed) for part, documents in parts.items()}
    if not pairs["train"]:
        return 0
    with new_artifact(out, "dataset", settings={"seed": seed}, parents=[data], seed=seed) as (folder, measured):
        for part, made in pairs.items():
            measured[f"num_{part}"] = write_conversations(folder / f"{part}.jsonl", [pair.messages for pair in made])
    return sum(map(len, pairs.values()))


def make_tokenizer(
    sources: Path | Sequence[Path],
    out: Path,
    vocab_size: int,
    algorithm: str = "bpe",
    set_aside: SetAside | None = None,
) -> dict[str, Any]:
    """Train a tokenizer and measure it on the held-out part of its data sets, else on what it was trained on.

    The text is streamed, so memory follows the number of different words and not its length.

    Args:
        sources: Data sets that ``mw data`` made, and files or folders of documents (JSON lines too) as they are.
        out: Folder of the artifact.
        vocab_size: Pieces in all.
        algorithm: A name in `modelwright.tokenizer.ALGORITHMS`.
        set_aside: Gets the lines and files that are damaged; None: the first damaged line is an error.

    Raises:
        ConfigError: There is no such algorithm, or the size has no room.
        DataError: A source is missing, is another kind of artifact, holds no text, or (see ``set_aside``) is damaged.
    """
    paths = [sources] if isinstance(sources, Path) else list(sources)
    train_on: Callable[..., Tokenizer] = lookup(ALGORITHMS, algorithm, "algorithm")
    tokenizer = train_on(stream_texts(paths, set_aside=set_aside), vocab_size)
    forget = None if set_aside is None else lambda place, reason: None  # told by the first reading
    held_out = _first_texts(stream_texts(paths, held_out=True, set_aside=set_aside))
    seen = held_out or _first_texts(stream_texts(paths, set_aside=forget))
    figures = {
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": bytes_per_token(tokenizer, seen),
        "measured_on": "held-out" if held_out else "training",
    }
    settings = {"vocab_size": vocab_size, "algorithm": algorithm, "sources": [path.name for path in paths]}
    parents = [path for path in paths if _is_artifact(path)]
    with new_artifact(out, "tokenizer", settings=settings, parents=parents) as (folder, measured):
        tokenizer.save(folder)
        measured.update(figures)
    return figures


def read_texts(path: Path) -> list[str]:
    """Return the texts of a data set (its held-out part where it has one), a file, or a folder of documents."""
    return list(stream_texts([path], held_out=True)) or list(stream_texts([path]))


def _first_texts(texts: Iterator[str]) -> list[str]:
    """Return texts up to ``MAX_MEASURED_CHARS``."""
    found: list[str] = []
    room = MAX_MEASURED_CHARS
    while room > 0 and (text := next(texts, None)) is not None:
        found.append(text[:room])
        room -= len(text)
    return found


def _is_artifact(path: Path) -> bool:
    return (path / "manifest.json").is_file()


def make_quantized(
    model: Path, out: Path, bits: int, group_size: int | None = None, data: Path | None = None
) -> dict[str, Any]:
    """Quantize a model's weights; with a data set, measure what was lost on its held-out part.

    Raises:
        ConfigError: ``out`` is the model itself, or the model cannot be stored in so many bits.
    """
    if out.resolve() == model.resolve():
        raise ConfigError(f"--out is {out}, the model itself, which would be lost. Give another folder.")
    original, tokenizer = load_model(model), load_tokenizer(model)
    rows = None if data is None else held_out_rows(data, tokenizer, context_len(original))
    quantized = quantize_model(original, bits, group_size)
    settings = {"bits": bits, "group_size": group_size}
    parents = [parent for parent in (model, data) if parent is not None and (parent / "manifest.json").is_file()]
    with new_artifact(out, "model", settings=settings, parents=parents) as (folder, measured):
        save_quantized(quantized, folder)
        tokenizer.save(folder)
        if rows is not None:
            measured.update(compare(original, quantized, rows))
        measured.update(original_size_bytes=weight_bytes(model), size_bytes=weight_bytes(folder))
        return dict(measured)


def weight_bytes(folder: Path) -> int:
    """Return the size of the weight files in a model folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def held_out_rows(data: Path, tokenizer: Tokenizer, max_seq_len: int) -> torch.Tensor:
    """Return rows of held-out tokens, (B, T), ``MAX_COMPARED_TOKENS`` at most."""
    _, held_out = load_dataset(data)
    if not held_out:
        raise DataError(f"{data} has no held-out documents. Make it again with --validation_fraction above 0.")
    ids = [np.array(row) for row in tokenizer.encode_batch(_texts(held_out), add_special_tokens=False)]
    row_len = max(2, min(max_seq_len, MAX_COMPARED_ROW, sum(map(len, ids))))
    rows = stream_rows(ids, row_len, tokenizer.eos_id, seed=0)
    return torch.from_numpy(rows.input_ids[: max(1, MAX_COMPARED_TOKENS // row_len)])


def score_model(
    model: Path, data: Path, *, trained_on: Sequence[Path] | None = None, index: Path | None = None
) -> dict[str, Any]:
    """Return bits per byte of a model on the held-out part of a data set, beside unigram and 5-gram models of the rest.

    Args:
        model: Model folder.
        data: Data set.
        trained_on: Look for the held-out part in the training part of the data set, and in these data sets and files;
            None: do not look.
        index: Folder of the index that is looked with; made there where there is none. None: in memory.

    Raises:
        DataError: The data set has no held-out part, or the index is of other documents.
    """
    train, held_out = load_dataset(data)
    if not held_out:
        raise DataError(f"{data} has no held-out documents. Make it again with --validation_fraction above 0.")
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    window = min(context_len(loaded), MAX_SCORED_CONTEXT)
    dtype = torch.bfloat16 if has_fast_bf16(pick_device()) else None

    def measure(documents: Sequence[Document]) -> TextScore:
        return evaluate_text(loaded, tokenizer, documents, max_seq_len=window, dtype=dtype)

    score, seen = measure(held_out), {}
    if trained_on is not None:
        others = (Document(f"{n}", text) for n, text in enumerate(stream_texts(trained_on)))
        found = find_contamination(open_index(held_out, index), chain(train, others))
        clean = [document for document in held_out if document.id not in found.seen]
        seen = {
            "num_items": found.num_items,
            "num_items_too_short": found.num_too_short,
            "num_items_seen": len(found.seen),
            "bits_per_byte_of_unseen": measure(clean).bits_per_byte if clean else None,
            "items": [asdict(row) for row in found.items],
        }
    return {
        **({"contamination": seen} if seen else {}),
        "bits_per_byte": score.bits_per_byte,
        "perplexity": score.perplexity,
        "num_tokens": score.tokens,
        "num_bytes": score.bytes,
        "window_len": window,
        "unigram_bits_per_byte": ngram_bits_per_byte(train, held_out, tokenizer, order=1),
        "ngram5_bits_per_byte": ngram_bits_per_byte(train, held_out, tokenizer, order=5),
    }


def _texts(documents: Sequence[Document]) -> list[str]:
    return [document.text for document in documents]
