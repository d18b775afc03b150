"""Task heads over an encoder: masked language model, sequence and token labels, extractive answers.

Every published head is one shape: take the first token or all of them, perhaps one dense layer with an activation and
a norm, then the output matrix. `HeadShape` says which, and under which names a family publishes it; `task_models`
makes the classes of a family from that. A cross-encoder reranker is a sequence classifier with one label: its logit is
the score of the pair (B, 1).

`modelwright.models.weights.load_model` can be asked for another task than the folder's: the encoder is read, the head
begins anew, and ``model.fresh_tensors`` and ``model.dropped_tensors`` name what was made and what was left.

Source: Devlin et al. 2019, arXiv 1810.04805, sections 3.1 and 4; Nogueira and Cho 2019, arXiv 1901.04085 (reranking).
Not here: next-sentence prediction, multiple choice, dropout, losses (the training loop has those).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.nn.mlp import activation

Task = Literal["encoder", "masked_lm", "sequence_classification", "token_classification", "question_answering"]
SUFFIXES: dict[str, str] = {
    "encoder": "Model",
    "masked_lm": "ForMaskedLM",
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
Pool = Literal["none", "first", "mean", "pooler"]


@dataclass(frozen=True)
class Labels:
    """What the outputs of a classifier mean; part of each encoder's config."""

    names: tuple[str, ...] = ("LABEL_0", "LABEL_1")  # one: a regression, or a reranker's score
    problem_type: str | None = None  # regression, single_label_classification, ...; None: not said

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise ConfigError(f"label names are {self.names}; there must be at least one, and no two alike.")

    @classmethod
    def numbered(cls, count: int) -> "Labels":
        """Return ``count`` labels named by their numbers."""
        return cls(tuple(f"LABEL_{i}" for i in range(count)))

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "Labels":
        """Read ``id2label`` (or ``num_labels``) of a published config.

        Raises:
            ConfigError: The ids are not 0 .. n - 1.
        """
        problem_type = values.get("problem_type")
        by_id = values.get("id2label")
        if not by_id:
            return replace(cls.numbered(values.get("num_labels") or 2), problem_type=problem_type)
        ids = sorted(int(i) for i in by_id)
        if ids != list(range(len(ids))):
            raise ConfigError(f"id2label has the ids {ids[:8]}; expected 0 to {len(ids) - 1}. Number them so.")
        return cls(tuple(str({int(i): name for i, name in by_id.items()}[i]) for i in ids), problem_type)

    def to_hf(self) -> dict[str, Any]:
        """Return ``id2label``, ``label2id`` and ``problem_type`` as a published config spells them."""
        values: dict[str, Any] = {
            "id2label": {str(i): name for i, name in enumerate(self.names)},
            "label2id": {name: i for i, name in enumerate(self.names)},
        }
        return values if self.problem_type is None else values | {"problem_type": self.problem_type}


class LogitsOutput(NamedTuple):
    """What a masked language model (B, T, V), a sequence classifier (B, C) or a token classifier (B, T, C) returns."""

    logits: Tensor


class SpanOutput(NamedTuple):
    """What an extractive answerer returns: scores of each token as the first and as the last of the answer."""

    start_logits: Tensor  # (B, T)
    end_logits: Tensor  # (B, T)


@dataclass(frozen=True)
class HeadShape:
    """How a family makes, and where it publishes, the head for one task."""

    out: str  # published path of the output matrix
    out_bias: str | None = None  # published name of its bias where that stands elsewhere
    dense: str | None = None  # published path of a dense layer before it; None: there is none
    norm: str | None = None  # published path of the norm after the activation; None: there is none
    act: str = "gelu"
    pool: Pool = "none"  # which states the head reads: all, the first, their mean, or what the pooler made
    has_pooler: bool = False  # the encoder under it carries a pooler, whether it is read or not
    dense_bias: bool = True
    norm_bias: bool = True
    has_out_bias: bool = True
    width: int | None = None  # of the dense layer's output; None: the hidden size

    @property
    def names(self) -> dict[str, str]:
        """Our paths in the task model -> published ones."""
        names = {"head.out": self.out}
        if self.out_bias is not None:
            names = {"head.out.weight": f"{self.out}.weight", "head.out.bias": self.out_bias}
        for ours, theirs in (("head.dense", self.dense), ("head.norm", self.norm)):
            if theirs is not None:
                names[ours] = theirs
        return names

    @property
    def first_parts(self) -> set[str]:
        """What the published names of the head begin with."""
        return {name.partition(".")[0] for name in self.names.values()}


class Head(nn.Module):
    """``out(norm(act(dense(x))))``; dense and norm are left out where the family has none."""

    def __init__(self, shape: HeadShape, hidden_size: int, num_outputs: int, norm_eps: float):
        super().__init__()
        width = shape.width or hidden_size
        self.dense = None if shape.dense is None else nn.Linear(hidden_size, width, bias=shape.dense_bias)
        self.norm = None if shape.norm is None else nn.LayerNorm(width, norm_eps, bias=shape.norm_bias)
        self.out = nn.Linear(width, num_outputs, bias=shape.has_out_bias)
        self.act = activation(shape.act)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., C)."""
        if self.dense is not None:
            x = self.act(self.dense(x))
        if self.norm is not None:
            x = self.norm(x)
        return self.out(x)


class TaskModel(nn.Module):
    """An encoder with a head. Families get theirs from `task_models`; fresh weights come from `init_weights`."""

    is_encoder: ClassVar[bool] = True
    task: ClassVar[str]
    encoder_class: ClassVar[Any]
    architecture: ClassVar[str]  # published name
    prefix: ClassVar[str]  # in front of the encoder's published names
    config_class: ClassVar[Any]

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.shape: HeadShape = self.encoder_class.head_shape(self.task, config)
        self.encoder = self.encoder_class(config)
        self._name_tensors()
        if not self.shape.has_pooler and getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None
        self.head = self.make_head()
        self.tie_weights()

    def _name_tensors(self) -> None:
        """Set the tables that `modelwright.models.layout` reads; the head's names may depend on the config."""
        prefix, shape, encoder = self.prefix, self.shape, self.encoder_class
        fused: dict[str, tuple[str, ...]] = getattr(encoder, "published_fused", {})
        names = {f"encoder.{ours}": prefix + theirs for ours, theirs in encoder.published_names.items()}
        parts = dict.fromkeys(path.partition(".")[0] for path in (*encoder.published_names.values(), *fused))
        self.published_names = names | self.head_names()
        self.published_fused = {prefix + k: tuple(f"encoder.{part}" for part in v) for k, v in fused.items()}
        # Files of the encoder alone lack the prefix.
        self.other_prefixes = {f"{part}.": f"{prefix}{part}." for part in parts if part not in shape.first_parts}
        self.ignored_names = (
            *(prefix + ignored for ignored in encoder.ignored_names),
            # What exports of other heads leave behind: a pooler that is not read, next-sentence prediction, and the
            # output bias under its second name.
            *(() if shape.has_pooler else (f"{prefix}pooler.*",)),
            *(() if shape.out_bias is None else (f"{shape.out}.bias",)),
            "cls.seq_relationship.*",
        )
        self.optional_modules = ("encoder.pooler",) if shape.has_pooler and shape.pool != "pooler" else ()

    def head_names(self) -> dict[str, str]:
        """Return our paths in the head -> published ones."""
        return self.shape.names

    def make_head(self) -> nn.Module:
        """Return the head for the task."""
        counts = {"masked_lm": self.config.vocab_size, "question_answering": 2}
        num_outputs = counts.get(self.task, len(self.config.labels.names))
        return Head(self.shape, self.config.hidden_size, num_outputs, self.config.norm_eps)

    def tied_names(self) -> dict[str, str]:
        """Return which parameter is another one under a second name: {second: first}."""
        is_tied = self.task == "masked_lm" and self.config.tie_embeddings
        return {"head.out.weight": "encoder.embed.weight"} if is_tied else {}

    def tie_weights(self) -> None:
        """Make the output matrix of a masked language model the embedding itself, where the config says so."""
        if self.tied_names():
            self.head.out.weight = self.encoder.embed.weight  # type: ignore[union-attr]

    def _apply(self, fn: Any, recurse: bool = True) -> "TaskModel":
        super()._apply(fn, recurse)
        self.tie_weights()  # moving off the meta device makes a new parameter per module
        return self

    def forward(
        self, input_ids: Tensor, *, attention_mask: Tensor | None = None, **inputs: Any
    ) -> LogitsOutput | SpanOutput:
        """Return the logits of the task.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T), 1 for tokens and 0 for padding. Pad on the right: heads that read the first token
                read the first position, as the published ones do.
            inputs: What else the encoder takes.
        """
        inputs = self.complete(input_ids, inputs)
        states, pooled = self.encoder(input_ids, attention_mask=attention_mask, **inputs)  # (B, T, D), (B, D)
        if self.shape.pool == "pooler":
            states = pooled
        elif self.shape.pool != "none":
            states = pool_states(states, attention_mask, self.shape.pool)
        logits = self.head(states)  # (B, T, C) or (B, C)
        if self.task != "question_answering":
            return LogitsOutput(logits)
        return SpanOutput(*self.finish_spans(input_ids, logits).unbind(-1))

    def complete(self, input_ids: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the encoder's further arguments, with what this family's task adds to them."""
        return inputs

    def finish_spans(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Return the logits (B, T, 2) of answers, after what this family's task does to them."""
        return logits


def pool_states(states: Tensor, attention_mask: Tensor | None, pool: str) -> Tensor:
    """Make one vector of each row's states (B, T, D): (B, D). Padding does not count in mean and max.

    >>> pool_states(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]), "mean")
    tensor([[2.]])
    """
    if pool in ("first", "cls"):
        return states[:, 0]
    if attention_mask is None:
        attention_mask = torch.ones(states.shape[:2], device=states.device)
    is_token = attention_mask[..., None].to(torch.bool)  # (B, T, 1)
    if pool == "max":
        return states.masked_fill(~is_token, float("-inf")).amax(1)
    if pool != "mean":
        raise ConfigError(f"pooling is {pool!r}; known: mean, cls, max. Use one of these.")
    return (states * is_token).sum(1) / is_token.sum(1).clamp(min=1)


def task_models(
    encoder_class: Any, name: str, prefix: str, bases: Mapping[str, type[TaskModel]] | None = None
) -> dict[str, Any]:
    """Return {published architecture: class} of a family: the encoder first, then a class for each task.

    Args:
        encoder_class: The encoder; ``head_shape(task, config)`` gives its heads.
        name: How its published architectures begin, for instance ``Bert``.
        prefix: What stands in front of the encoder's names in a file with a head.
        bases: Task -> class to make the task's class from, where `TaskModel` does not do.
    """
    classes: dict[str, Any] = {name + SUFFIXES["encoder"]: encoder_class}
    for task in SUFFIXES:
        if task == "encoder":
            continue
        architecture = name + SUFFIXES[task]
        attributes = {
            "__doc__": f"{architecture}: {encoder_class.__name__} with a head for {task.replace('_', ' ')}.",
            "__module__": encoder_class.__module__,
            "task": task,
            "encoder_class": encoder_class,
            "architecture": architecture,
            "prefix": prefix,
            "config_class": encoder_class.config_class,
        }
        classes[architecture] = type(architecture, ((bases or {}).get(task, TaskModel),), attributes)
    return classes


def find_task_class(classes: Mapping[str, Any], task: str, like: str = "") -> str:
    """Return the architecture, of a family's table, that does a task; of several, the one named as ``like``.

    Raises:
        ConfigError: The task is not known, or the family has none for it.
    """
    if task not in SUFFIXES:
        raise ConfigError(f"task is {task!r}; known: {', '.join(SUFFIXES)}. Use one of these.")
    found = [name for name in classes if name.endswith(SUFFIXES[task])]
    if not found or not all(hasattr(classes[name], "is_encoder") for name in found):
        raise ConfigError(f"task is {task!r}; this family has {', '.join(classes)} only. Use an encoder's folder.")
    return max(found, key=lambda name: _shared(name, like))


def _shared(first: str, second: str) -> int:
    """Count the letters that two names begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(second))
