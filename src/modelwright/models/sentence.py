"""Sentence encoders: an encoder, a pooling, and perhaps a normalisation, as sentence-transformers publishes them.

A folder of theirs has a ``modules.json`` that lists the encoder, ``1_Pooling`` and ``2_Normalize``; both ways are
here. `modelwright.rag.embed` is what turns texts into vectors with one.

Source: Reimers and Gurevych 2019, arXiv 1908.10084, section 3. Not here: learned projections behind the pooling
(``2_Dense``), which are refused, and several poolings side by side.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.base.files import read_json, write_json
from modelwright.models.assemble import find_class
from modelwright.models.heads import pool_states
from modelwright.models.weights import load_model, read_config, save_model

MODULES = "modules.json"
TYPES = "sentence_transformers.models"
# Published name of a pooling -> ours.
POOLINGS = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}


class SentenceOutput(NamedTuple):
    """What a sentence encoder returns."""

    embeddings: Tensor  # (B, D)


class SentenceEncoder(nn.Module):
    """An encoder whose states are pooled into one vector a row, of length 1 if ``is_normalized``."""

    def __init__(self, encoder: nn.Module, pooling: str = "mean", is_normalized: bool = True):
        super().__init__()
        if pooling not in POOLINGS.values():
            raise ConfigError(f"pooling is {pooling!r}; known: {', '.join(POOLINGS.values())}. Use one of these.")
        if not hasattr(encoder, "is_encoder") or hasattr(encoder, "head"):
            raise ConfigError(f"{type(encoder).__name__} is no bare encoder; load it with task='encoder'.")
        self.encoder, self.pooling, self.is_normalized = encoder, pooling, is_normalized

    def forward(self, input_ids: Tensor, *, attention_mask: Tensor | None = None, **inputs: Any) -> SentenceOutput:
        """Embed ``input_ids`` (B, T); padding does not count."""
        states = self.encoder(input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        pooled = pool_states(states, attention_mask, self.pooling)  # (B, D)
        return SentenceOutput(F.normalize(pooled, dim=-1) if self.is_normalized else pooled)


def load_sentence_encoder(
    directory: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> SentenceEncoder:
    """Load a folder of sentence-transformers, or a plain encoder's: that one is pooled by mean, not normalised.

    Raises:
        CheckpointError: The folder has a module or a pooling that is not computed here, or is no encoder's.
    """
    folder = Path(directory)
    kinds = _read_modules(folder)
    unknown = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise CheckpointError(
            f"{folder / MODULES} lists {', '.join(unknown)}; expected Transformer, Pooling and Normalize alone. Use an "
            "encoder without a projection behind its pooling."
        )
    encoder = load_model(folder / kinds.get("Transformer", ""), dtype=dtype, device=device, task="encoder")
    pooling = _read_pooling(folder / kinds["Pooling"] / "config.json") if "Pooling" in kinds else "mean"
    return SentenceEncoder(encoder, pooling, "Normalize" in kinds).eval()


def encoder_kind(path: str | Path) -> Literal["encoder", "reranker"] | None:
    """Say what sort of encoder a model's folder holds; None: no encoder, but a model that writes text."""
    folder = Path(path)
    if folder.is_file():
        return None
    found = find_class(read_config(folder))
    if not hasattr(found, "is_encoder"):
        return None
    return "reranker" if getattr(found, "task", None) == "sequence_classification" else "encoder"


def save_sentence_encoder(model: SentenceEncoder, directory: str | Path) -> None:
    """Save a folder that `load_sentence_encoder` and sentence-transformers read; the tokenizer's files stay."""
    folder = Path(directory)
    save_model(model.encoder, folder)
    width = model.encoder.config.hidden_size  # type: ignore[union-attr]
    modes = {f"pooling_mode_{theirs}": ours == model.pooling for theirs, ours in POOLINGS.items()}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes})
    kinds = {"Transformer": "", "Pooling": "1_Pooling"}
    if model.is_normalized:
        kinds["Normalize"] = "2_Normalize"
        (folder / "2_Normalize").mkdir(exist_ok=True)
    write_json(
        folder / MODULES,
        [{"idx": i, "name": str(i), "path": p, "type": f"{TYPES}.{k}"} for i, (k, p) in enumerate(kinds.items())],
    )


def _read_modules(folder: Path) -> dict[str, str]:
    """Return {kind: path} of the modules that a folder lists, in their order."""
    file = folder / MODULES
    if not file.is_file():  # then the folders say it
        parts = sorted(found.parent.name for found in folder.glob("[0-9]_*/config.json"))
        return {part.partition("_")[2]: part for part in parts}
    listed = read_json(file)
    try:
        kinds = {str(entry["type"]).rpartition(".")[2]: str(entry["path"]) for entry in listed}
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{file} is no list of modules with type and path ({error!r}). Fetch it again.") from None
    for path in kinds.values():
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise CheckpointError(f"{file} names the path {path!r}; expected one inside the folder. Do not trust it.")
    return kinds


def _read_pooling(file: Path) -> str:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing, but {MODULES} lists a pooling. Copy the folder with all its parts.")
    values = read_json(file)
    named = values.get("pooling_mode")  # the newest spelling
    if named in POOLINGS.values():
        return str(named)
    on = sorted(n.removeprefix("pooling_mode_") for n, v in values.items() if n.startswith("pooling_mode_") and v)
    if len(on) != 1 or on[0] not in POOLINGS:
        raise CheckpointError(f"{file} asks for {named or ' + '.join(on)}; expected one of {', '.join(POOLINGS)}.")
    return POOLINGS[on[0]]
