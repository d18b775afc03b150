"""Ask a folder for another task than it was made for: the encoder is kept, the head begins anew, and both are said.

Fine-tuning starts here: ``load_model(folder, task="sequence_classification", num_labels=3)`` on a folder of a masked
language model reads the encoder, drops the old head and draws a new one. Nothing of the encoder may be missing or left
over; only heads are made or dropped.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.base.logs import get_logger
from modelwright.models.heads import SUFFIXES, Labels, find_task_class
from modelwright.models.layout import tied_names, to_published
from modelwright.nn.init import init_weights

logger = get_logger(__name__)
FRESH_PREFIXES = ("head.", "encoder.pooler.")  # parts of a task model that may begin anew


def ask_for(
    values: dict[str, Any], classes: dict[str, Any], task: str | None, num_labels: int | None
) -> dict[str, Any]:
    """Return a published config changed to what is asked for.

    Args:
        values: The folder's config.
        classes: The family's table from architectures to classes.
        task: A key of `heads.SUFFIXES`; None: the folder's own.
        num_labels: None: as the config says.

    Raises:
        ConfigError: The family has no such head, or labels are asked of a task that has none.
    """
    named = (values.get("architectures") or [next(iter(classes))])[0]
    if task is None:
        task = next((t for t, suffix in SUFFIXES.items() if named.endswith(suffix)), "encoder")
    changed = values | {"architectures": [find_task_class(classes, task, like=named)]}
    if num_labels is None or num_labels == len(Labels.from_hf(values).names):
        return changed
    if not task.endswith("classification"):
        raise ConfigError(f"num_labels is {num_labels} for the task {task!r}; only classification has labels.")
    return changed | Labels.numbered(num_labels).to_hf()


def is_replaceable(name: str) -> bool:
    """Tell whether one of our parameters belongs to a head, so that a stored one of another shape may be dropped."""
    return name.startswith(FRESH_PREFIXES)


def begin_head(
    model: nn.Module, found: dict[str, Tensor], unexpected: Sequence[str], dtype: torch.dtype | None, seed: int = 0
) -> list[str]:
    """Draw what ``found`` lacks of the head, into ``found``; return what is unexpected beyond heads.

    Sets ``model.fresh_tensors`` and ``model.dropped_tensors`` (published names) and says both in the log.
    """
    kinds = [t.dtype for t in found.values() if t.is_floating_point()]
    place = next((t.device for t in found.values()), torch.device("cpu"))
    dtype = dtype or (max(set(kinds), key=kinds.count) if kinds else torch.float32)
    missing = [n for n in model.state_dict() if n not in found and n not in tied_names(model) and is_replaceable(n)]
    for number, name in enumerate(missing):
        path, _, leaf = name.rpartition(".")
        module = copy.deepcopy(model.get_submodule(path)).to_empty(device="cpu")
        fresh = init_weights(module, seed + number).get_parameter(leaf).detach()
        found[name] = fresh.to(device=place, dtype=dtype)
    dropped = sorted(name for name in unexpected if not _is_of_encoder(model, name))
    model.fresh_tensors = tuple(to_published(model, n) for n in missing)  # type: ignore[assignment]
    model.dropped_tensors = tuple(dropped)  # type: ignore[assignment]
    if missing or dropped:
        logger.warning(
            "%s: begun anew: %s; dropped: %s",
            type(model).__name__,
            ", ".join(model.fresh_tensors) or "nothing",  # type: ignore[arg-type]
            ", ".join(dropped) or "nothing",
        )
    return [name for name in unexpected if name not in dropped]


def _is_of_encoder(model: Any, published: str) -> bool:
    encoder = getattr(model, "encoder", model)
    tables = (*encoder.published_names.values(), *getattr(encoder, "published_fused", ()))
    return published.removeprefix(encoder.optional_prefix).partition(".")[0] in {p.partition(".")[0] for p in tables}
