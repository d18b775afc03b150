"""Give a model folder another tokenizer, and say what it cost in bits per byte, which both vocabularies share."""

from pathlib import Path
from typing import Any

from modelwright.base.artifact import new_artifact
from modelwright.base.errors import ConfigError
from modelwright.compress.transplant import transplant
from modelwright.evaluate.perplexity import evaluate_text
from modelwright.models.scoring import context_len
from modelwright.models.weights import load_model, save_model
from modelwright.ops.make import MAX_COMPARED_ROW, read_texts
from modelwright.tokenizer.formats import load_tokenizer


def transplant_model(
    source: Path, to: Path, out: Path, *, way: str = "adapt", data: Path | None = None
) -> dict[str, Any]:
    """Make the model of ``source`` with another tokenizer at ``out``, and return the figures of its manifest.

    Args:
        source: Model folder with its tokenizer.
        to: The other tokenizer, in any format that `load_tokenizer` reads; saved beside the model as tokenizer.json.
        out: Folder to make.
        way: How tokens begin that the old tokenizer does not have: a name in `TRANSPLANT_WAYS`.
        data: Data set (its held-out part), file or folder on which bits per byte are measured before and after.

    Raises:
        ConfigError: ``out`` is the source, or the model or a tokenizer cannot be changed so.
    """
    if out.resolve() == source.resolve():
        raise ConfigError(f"--out is {out}, the model itself, which would be lost. Give another folder.")
    model, old, new = load_model(source), load_tokenizer(source), load_tokenizer(to)
    texts = None if data is None else read_texts(data)
    changed, overlap = transplant(model, old, new, way=way)
    figures: dict[str, Any] = {
        "vocab_size_before": old.vocab_size,
        "vocab_size_after": new.vocab_size,
        "num_shared": len(overlap.shared),
        "num_composed": len(overlap.spelled),
        "num_strange": len(overlap.strange),
        "bits_per_byte_before": None,
        "bits_per_byte_after": None,
    }
    if texts is not None:
        window = min(context_len(model), MAX_COMPARED_ROW)
        for name, one, tokenizer in (("before", model, old), ("after", changed, new)):
            figures[f"bits_per_byte_{name}"] = evaluate_text(one, tokenizer, texts, max_seq_len=window).bits_per_byte
    parents = [path for path in (source, to, data) if path is not None and (path / "manifest.json").is_file()]
    with new_artifact(out, "model", settings={"way": way, "to": to.name}, parents=parents) as (folder, measured):
        save_model(changed, folder)
        new.save(folder)
        measured.update(figures)
    return figures
