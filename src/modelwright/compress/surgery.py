"""Change a trained model's shape, and say what it cost.

A change is a new config and a new state for it; `rebuild` puts the two together, and `measure_cost` compares before and
after on given rows: the largest difference of a logit, and the perplexity. Fewer key/value heads, more layers and more
tokens are each a file beside this one. The model that is given is left as it was; the new one shares nothing with it.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, DataError

M = TypeVar("M", bound=nn.Module)
MAX_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Cost:
    """What a change did to a model."""

    parameters_before: int
    parameters_after: int
    cache_before: int  # numbers that one more token adds to the cache
    cache_after: int
    max_logit_difference: float | None = None  # over the tokens both have; None: no rows were given
    perplexity_before: float | None = None
    perplexity_after: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return asdict(self)


def rebuild(model: M, config: Any, state: dict[str, Tensor]) -> M:
    """Return a model of another config of the same class, filled with ``state`` (our names; tied ones may stand twice).

    Raises:
        ConfigError: The config does not build, or names and shapes do not fit it.
    """
    with torch.device("meta"):
        made = type(model)(config)
    tied = made.tied_names() if hasattr(made, "tied_names") else {}  # type: ignore[operator]
    own = {name: tensor.detach().clone() for name, tensor in state.items() if name not in tied}
    try:
        missing, unexpected = made.load_state_dict(own, strict=False, assign=True)
    except RuntimeError as error:  # a shape
        raise ConfigError(f"The changed {type(model).__name__} does not fit its config: {error}") from error
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise ConfigError(
            f"The changed {type(model).__name__} lacks {missing[:3]} and has no place for {unexpected[:3]}. "
            "This family cannot be changed so."
        )
    device = next(iter(own.values())).device
    for module in made.modules():
        if hasattr(module, "reset_buffers"):
            module.reset_buffers(device)  # type: ignore[operator]
    if hasattr(made, "tie_weights"):
        made.tie_weights()  # type: ignore[operator]
    if hasattr(model, "generation_config"):
        made.generation_config = copy.deepcopy(model.generation_config)  # type: ignore[assignment]
    return made.train(model.training)


def dense_state(model: nn.Module, what: str) -> dict[str, Tensor]:
    """Return the state of a model whose weights are dense.

    Raises:
        ConfigError: They are quantized, or the model is no decoder.
    """
    if getattr(model, "quantization_config", None) is not None:
        raise ConfigError(f"The model is quantized; {what} needs the dense weights. Change it first, then quantize.")
    if not hasattr(model, "cache_layout"):
        raise ConfigError(f"A {type(model).__name__} is no decoder; {what} is for decoder language models.")
    return model.state_dict()


@torch.no_grad()
def measure_cost(before: nn.Module, after: nn.Module, rows: Tensor | Sequence[Sequence[int]] | None = None) -> Cost:
    """Compare a model before and after a change.

    Args:
        before: The model as it was.
        after: The changed one; where it has more tokens, those of ``before`` are compared.
        rows: (B, T) token ids on which both are scored; None: sizes alone.

    Raises:
        DataError: No row has two tokens.
    """
    sizes = {}
    for name, model in (("before", before), ("after", after)):
        layers: Any = model.cache_layout()  # type: ignore[operator]
        sizes[f"parameters_{name}"] = sum(p.numel() for p in model.parameters())
        sizes[f"cache_{name}"] = sum(layer.size(1) - layer.size(0) for layer in layers)
    if rows is None:
        return Cost(**sizes)
    ids = rows if isinstance(rows, Tensor) else torch.tensor(rows)
    if ids.dim() != 2 or ids.shape[1] < 2 or not len(ids):
        raise DataError(f"The rows are of shape {tuple(ids.shape)}; expected (B, T) with two tokens a row at least.")
    was_training = before.training, after.training
    before.eval(), after.eval()
    nats, worst = [0.0, 0.0], 0.0
    for batch in ids.long().split(max(1, MAX_BATCH_TOKENS // ids.shape[1])):
        pair = [model(batch).logits.float() for model in (before, after)]
        width = min(logits.shape[-1] for logits in pair)
        worst = max(worst, float((pair[0][..., :width] - pair[1][..., :width]).abs().max()))
        for index, logits in enumerate(pair):
            scores = logits[:, :-1].log_softmax(-1).gather(2, batch[:, 1:, None])
            nats[index] -= float(scores.double().sum())
    before.train(was_training[0]), after.train(was_training[1])
    count = ids.shape[0] * (ids.shape[1] - 1)
    return Cost(
        **sizes,
        max_logit_difference=worst,
        perplexity_before=math.exp(nats[0] / count),
        perplexity_after=math.exp(nats[1] / count),
    )
