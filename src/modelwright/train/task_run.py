"""What runs with a head of their own share: steps from epochs, training, scores before and after, the model's folder.

A method prepares a model, an objective and a loader, and says how the model is scored; the loop is the one of
`modelwright.train.loop`. Unfinished runs are kept in ``OUT.run`` and taken up again.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelwright.base.artifact import MANIFEST, new_artifact
from modelwright.base.config import to_dict
from modelwright.base.errors import ConfigError
from modelwright.base.files import write_json
from modelwright.base.progress import Stopwatch
from modelwright.data.examples import ExampleLoader
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.optim.schedule import ScheduleConfig
from modelwright.train.dropout import dropout
from modelwright.train.loop import Hook, LoopConfig, train
from modelwright.train.objective import Objective

Collate = Callable[[Sequence[int], int], Any]
Score = Callable[[nn.Module], Mapping[str, float]]
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "sentence_bert_config.json",
)


@dataclass(frozen=True)
class TaskParts:
    """What a method prepares."""

    model: nn.Module
    objective: Objective
    loader: ExampleLoader
    score: Score  # from the model to figures, on held-out data
    save: Callable[[Any, Path], None]


@dataclass(frozen=True)
class TaskResult:
    """What a run made."""

    out: Path
    figures: dict[str, Any]
    losses: list[tuple[int, float]]


def task_loop(rate: float = 1e-4) -> LoopConfig:
    """Return the loop that fine-tuning an encoder begins with: AdamW, a linear fall, batches of 32."""
    optimizer = OptimizerConfig(
        name="adamw", adamw=AdamWConfig(learning_rate=rate, betas=(0.9, 0.98), weight_decay=0.01)
    )
    return LoopConfig(micro_batch_size=32, optimizer=optimizer, schedule=ScheduleConfig("linear", 10))


def with_steps(loop: LoopConfig, epochs: float | None, num_examples: int) -> LoopConfig:
    """Return the loop with its number of steps, from the epochs where it gives none.

    Raises:
        ConfigError: Neither is given.
    """
    if loop.num_steps is not None:
        return loop
    if epochs is None or not epochs > 0:
        raise ConfigError(f"epochs is {epochs} and loop.num_steps is not given; set one of them, epochs above 0.")
    batch = loop.micro_batch_size * loop.grad_accum_steps
    return replace(loop, num_steps=max(1, round(epochs * num_examples / batch)))


def held_out_loss(objective: Objective, num: int, collate: Collate, most: int) -> Score:
    """Return a score: the mean loss of a trained token, in nats, over the first ``most`` of ``num`` held-out examples.

    Args:
        collate: From numbers of examples and an epoch to a batch.
    """

    @torch.inference_mode()
    def score(model: nn.Module) -> dict[str, float]:
        total, count, end = 0.0, 0, min(num, most)
        for start in range(0, end, 16):
            batch = collate(range(start, min(start + 16, end)), 0)
            total += float(objective.loss(model, batch))
            count += objective.count_trained(batch)
        return {"validation_loss": total / max(1, count)}

    return score


def run_parts(config: Any, parts: TaskParts, hooks: Sequence[Hook], *, name: str, rate: float = 0.0) -> TaskResult:
    """Train what a method prepared, score it before and after, and write its folder.

    Args:
        config: Settings with data, base, out, epochs and loop.
        parts: Model, objective, data and score.
        hooks: For the loop.
        name: Shown beside the progress bar.
        rate: Of dropout while training.
    """
    watch = Stopwatch()
    loop = with_steps(config.loop, config.epochs, parts.loader.num_examples)
    before = {f"{key}_before": value for key, value in parts.score(parts.model.eval()).items()}
    work = config.out.with_name(config.out.name + ".run")
    with dropout(parts.model, rate):
        run = train(parts.model, parts.objective, parts.loader, loop, folder=work, hooks=hooks, name=name)
    figures = {
        "num_steps": run.step,
        "num_examples": parts.loader.num_examples,
        "parameters": sum(p.numel() for p in parts.model.parameters()),
        **before,
        **parts.score(parts.model.eval()),
        "seconds": watch.seconds,
    }
    # Folders and files of others have no manifest; what is known of them is in the settings.
    parents = [path for path in (config.base, config.data) if path is not None and (path / MANIFEST).is_file()]
    with new_artifact(config.out, "model", settings=to_dict(config), parents=parents, seed=loop.seed) as (
        folder,
        measured,
    ):
        parts.save(parts.model, folder)
        for file in COPIED:
            if config.base is not None and (config.base / file).is_file():
                shutil.copy(config.base / file, folder / file)
        write_json(folder / "training.json", {"figures": figures, "losses": run.losses, "loop": to_dict(loop)})
        measured.update(figures)
    shutil.rmtree(work, ignore_errors=True)
    return TaskResult(config.out, figures, run.losses)
