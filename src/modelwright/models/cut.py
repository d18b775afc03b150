"""How the layers of a decoder are cut between processes that compute each of them together.

Columns of q, k, v, gate and up (so whole heads, and a part of the hidden layer), rows of o and down: between a pair of
them nothing is exchanged, and the parts of its result are added up. Training and serving cut by the same plan.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3. Not here: adapters, experts, recurrent and low-bit layers.
"""

from typing import Literal

from torch import nn

from modelwright.base.errors import ConfigError
from modelwright.models.decoder import Decoder
from modelwright.nn.attention import Attention
from modelwright.nn.mlp import GatedMlp, Mlp
from modelwright.nn.norm import RMSNorm
from modelwright.nn.positions import LearnedPositions

Cut = Literal["columns", "rows"]
WHOLE = (RMSNorm, nn.LayerNorm, LearnedPositions)  # modules with weights that every rank keeps


def layer_cuts(model: nn.Module, num_ranks: int, *, setting: str, advice: str) -> dict[str, Cut]:
    """Return how each layer of attention and of the feed-forward halves is cut, by name.

    Args:
        model: A decoder. Its embedding and output matrix are the caller's to cut or to keep.
        num_ranks: Into so many parts.
        setting: What asks for it, for the errors.
        advice: What to do where it cannot be, for the errors.

    Raises:
        ConfigError: The model is no decoder of known layers, or its heads do not divide.
    """
    asked = f"{setting} is {num_ranks}"
    if not isinstance(model, Decoder):
        raise ConfigError(f"{asked}; {type(model).__name__} is no decoder. {advice}")
    cuts: dict[str, Cut] = {}
    ends, whole = {"embed", "lm_head"}, set[str]()
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            _check_heads(name, module, num_ranks, asked)
            cuts |= dict.fromkeys((f"{name}.{part}" for part in "qkv"), "columns")
            cuts[f"{name}.o"] = "rows"
        elif isinstance(module, GatedMlp):
            cuts |= {f"{name}.gate": "columns", f"{name}.up": "columns", f"{name}.down": "rows"}
        elif isinstance(module, Mlp):
            cuts |= {f"{name}.up": "columns", f"{name}.down": "rows"}
        elif isinstance(module, WHOLE):
            whole.add(name)
    for name, module in model.named_modules():
        has_own = next(iter(module.parameters(recurse=False)), None) is not None
        is_known = _is_plain(module) if name in ends | cuts.keys() else name in whole or not has_own
        if not is_known:
            raise ConfigError(f"{asked}, and {name} is a {type(module).__name__}, which is not cut here. {advice}")
    return cuts


def _is_plain(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, nn.Embedding) or hasattr(module, "cap")


def _check_heads(name: str, layer: Attention, num_ranks: int, asked: str) -> None:
    if layer.options.context_size is not None or layer.sinks is not None:
        raise ConfigError(f"{asked}, and {name} has sinks or looks at another sequence.")
    for part, kind in ((layer.q, "query"), (layer.k, "key/value")):
        width: int = part.out_features  # type: ignore[assignment]
        if (width // layer.head_dim) % num_ranks:
            raise ConfigError(
                f"{asked}, and {name} has {width // layer.head_dim} {kind} heads, which it does not divide. Choose a "
                "degree that divides the heads."
            )
