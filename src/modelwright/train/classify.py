"""Fine-tune an encoder to tell texts or pairs of texts apart, or to give each a number.

Data is a folder with ``train.jsonl`` and ``validation.jsonl`` of ``{"text", "label"}`` rows, ``"pair"`` for a second
text (`modelwright.data.encode`). A pair with one number is a cross-encoder's score.
Source: Devlin et al. 2019, arXiv:1810.04805, section 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelwright.base.errors import ConfigError
from modelwright.data.encode import Labelled, TextEncoder, read_labelled
from modelwright.data.examples import ExampleLoader
from modelwright.models.heads import Labels
from modelwright.models.weights import load_model, save_model
from modelwright.train.heads import SequenceClassification, TextRegression
from modelwright.train.loop import Hook, LoopConfig
from modelwright.train.objective import Objective
from modelwright.train.task_run import TaskParts, TaskResult, run_parts, task_loop


@dataclass(frozen=True)
class ClassifyConfig:
    """A run from an encoder's folder and labelled texts to a classifier's folder."""

    data: Path  # folder with train.jsonl and validation.jsonl
    base: Path  # folder of an encoder, whatever its head
    out: Path  # model folder to make
    kind: str = "classes"  # classes, or values: one number a text
    labels: tuple[str, ...] | None = None  # names of the classes in their order; None: those of the training data
    epochs: float | None = 3.0  # passes over the data; None: give loop.num_steps
    max_seq_len: int | None = None  # tokens a text; None: the encoder's context, 512 at most
    dropout: float = 0.1  # while training
    label_smoothing: float = 0.0
    loop: LoopConfig = field(default_factory=task_loop)

    def __post_init__(self) -> None:
        if self.kind not in ("classes", "values"):
            raise ConfigError(f"kind is {self.kind!r}; known: classes, values.")
        if self.kind == "values" and (self.labels is not None or self.label_smoothing):
            raise ConfigError("kind is 'values', which has no labels and no label_smoothing. Leave them out.")


def run_classify(config: ClassifyConfig, hooks: Sequence[Hook] = ()) -> TaskResult:
    """Fine-tune, score on the validation part before and after, and save.

    Raises:
        DataError: A row cannot be used.
    """
    return run_parts(config, prepare_classify(config), hooks, name="classify", rate=config.dropout)


def prepare_classify(config: ClassifyConfig, device: str | None = None) -> TaskParts:
    """Return model, objective, data and score; with the device "meta" the model has no numbers."""
    is_value = config.kind == "values"
    rows = read_labelled(config.data / "train.jsonl", config.labels, is_value=is_value)
    held_out = read_labelled(config.data / "validation.jsonl", rows.names or None, is_value=is_value)
    num, task = max(1, len(rows.names)), "sequence_classification"
    model: Any = load_model(config.base, dtype=torch.float32, device=device, task=task, num_labels=num)
    if rows.names:
        object.__setattr__(model.config, "labels", Labels(rows.names))
    encoder = text_encoder(config.base, model, config.max_seq_len)
    loader = ExampleLoader(
        len(rows.texts), _collate(encoder, rows), config.loop.micro_batch_size, seed=config.loop.seed
    )
    objective: Objective = TextRegression() if is_value else SequenceClassification(smoothing=config.label_smoothing)
    scorer = _collate(encoder, held_out)
    return TaskParts(model, objective, loader, lambda m: _score(m, scorer, held_out), save_model)


def text_encoder(folder: Path, model: Any, max_seq_len: int | None) -> TextEncoder:
    """Return the tokenizer of an encoder's folder with the room of its context.

    Raises:
        ConfigError: More is asked for than the encoder reads.
    """
    longest = int(model.config.max_seq_len)
    if max_seq_len is not None and max_seq_len > longest:
        raise ConfigError(f"max_seq_len is {max_seq_len}; the encoder reads at most {longest} tokens. Lower it.")
    return TextEncoder(folder, max_seq_len or min(longest, 512), getattr(model.config, "num_token_types", 1) > 1)


def _collate(encoder: TextEncoder, rows: Labelled) -> Any:
    encodings = encoder.encode(rows.texts)
    labels = torch.from_numpy(rows.labels)
    labels = labels if rows.names else labels[:, None]

    def collate(numbers: Sequence[int], epoch: int) -> Any:
        return encoder.batch([encodings[i] for i in numbers], labels[list(numbers)])

    return collate


@torch.inference_mode()
def _score(model: nn.Module, collate: Any, rows: Labelled) -> dict[str, float]:
    """Return accuracy and macro F1, or the root of the mean squared error, on held-out rows."""
    found = []
    for start in range(0, len(rows.texts), 64):
        batch = collate(range(start, min(start + 64, len(rows.texts))), 0)
        found.append(model(batch.input_ids, **batch.inputs()).logits.float())
    logits, labels = torch.cat(found), torch.from_numpy(rows.labels)
    if not rows.names:
        return {"rmse": float((logits[:, 0] - labels).square().mean().sqrt())}
    guesses = logits.argmax(-1)
    scores = []
    for kind in range(len(rows.names)):
        hits = int(((guesses == kind) & (labels == kind)).sum())
        scores.append(2 * hits / max(1, int((guesses == kind).sum()) + int((labels == kind).sum())))
    return {"accuracy": float((guesses == labels).float().mean()), "macro_f1": sum(scores) / len(scores)}
