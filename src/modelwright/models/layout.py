"""Between our parameters and the tensors that a published checkpoint holds: names, fusing, transposing, tying.

A model class says where its weights stand, in a few tables that `modelwright.models.weights` reads through this file:

- ``published_names``: our dotted path -> the published one, ``*`` for a number (a layer's, an expert's). The path is
  that of a module, whose ``weight`` and ``bias`` follow, or of a single parameter.
- ``published_fused``: published path -> our paths whose tensors it holds one under the other (q, k and v in one).
- ``transposed_names``: published paths whose matrix is stored as (in, out).
- ``optional_prefix``: may stand in front of every published name. ``other_prefixes``: {prefix that some exports write:
  the one in the table}, the first that fits. ``optional_modules``: left out when the file has none of their tensors.
  ``ignored_names``: tensors that old exports carry along.
- ``tied_names()``: {second name: first name} of one and the same parameter.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.errors import CheckpointError

OLD_LEAVES = {"gamma": "weight", "beta": "bias"}  # names of the first BERT release


@dataclass(frozen=True)
class Stacked:
    """A published tensor that is made of ours when it is written, so that no second copy of a model is held."""

    parts: tuple[Tensor, ...]  # one under the other along axis 0
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that `make` returns."""
        shape = (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])
        return shape[::-1] if self.is_transposed else shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor that `make` returns."""
        return sum(part.nbytes for part in self.parts)

    @property
    def is_meta(self) -> bool:
        """Whether a part has no storage."""
        return any(part.is_meta for part in self.parts)

    def make(self) -> Tensor:
        """Return the published tensor, on the CPU and contiguous."""
        parts = [part.detach().to("cpu") for part in self.parts]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return (whole.t() if self.is_transposed and whole.dim() == 2 else whole).contiguous()


def to_published(model: nn.Module, name: str) -> str:
    """Return the published name of one of our parameters; of a fused one, the name of the whole.

    Raises:
        CheckpointError: It has none, for instance because an adapter wraps its layer.
    """
    names: Mapping[str, str] = model.published_names  # type: ignore[assignment]
    path, leaf = _split(name)
    alone = translate(name, names)
    published = translate(path, names)
    if alone is None and published is None:
        for whole, parts in _fused(model).items():
            for part in parts:
                published = published or translate(path, {part: whole})
    if alone is None and published is None:
        raise CheckpointError(
            f"Parameter {name} has no published name in {type(model).__name__}, so it cannot be saved. "
            "If an adapter is attached, merge it (merge_lora) or save it on its own."
        )
    return alone or f"{published}.{leaf}"


def from_published(model: nn.Module, published: str) -> str | None:
    """Return our name of a published tensor, or None where the model has no place for it alone."""
    bare = _bare(model, published)
    names: Mapping[str, str] = model.published_names  # type: ignore[assignment]
    back = {theirs: mine for mine, theirs in names.items()}
    alone = translate(bare, back)
    if alone is not None:
        return alone
    path, leaf = _split(bare)
    ours = translate(path, back)
    return None if ours is None else f"{ours}.{OLD_LEAVES.get(leaf, leaf)}"


def unpack(
    model: nn.Module, published: str, tensor: Tensor, shapes: Mapping[str, Tensor]
) -> list[tuple[str | None, Tensor]]:
    """Return (our name, tensor) for each of our parameters that a published tensor holds; views, not copies.

    Args:
        model: Its tables.
        published: Name in the file.
        tensor: What stands there.
        shapes: Our state, of which only the shapes are used.

    Returns:
        One pair with the name None when the model has no place for the tensor.
    """
    bare = _bare(model, published)
    path, _, leaf = bare.rpartition(".")
    if tensor.dim() == 2 and any(_matches(path, pattern) for pattern in getattr(model, "transposed_names", ())):
        tensor = tensor.t()
    for whole, parts in _fused(model).items():
        names = [translate(path, {whole: part}) for part in parts]
        if None in names:
            continue
        ours = [f"{name}.{leaf}" for name in names]
        sizes = [shapes[name].shape[0] if name in shapes else -1 for name in ours]
        if min(sizes) < 0:
            return [(None, tensor)]
        if sum(sizes) != tensor.shape[0]:
            raise CheckpointError(
                f"tensor {published} has {tensor.shape[0]} rows; it should hold {', '.join(ours)} with "
                f"{' + '.join(map(str, sizes))} = {sum(sizes)}. The config and the weights belong to different models."
            )
        return list(zip(ours, tensor.split(sizes), strict=True))
    return [(from_published(model, published), tensor)]


def pack(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor | Stacked]:
    """Return the tensors of a published checkpoint, in the order of the model; a tied tensor stands there once.

    Raises:
        CheckpointError: A parameter has no published name, or a tie is broken.
    """
    tied = tied_names(model)
    for second, first in tied.items():
        if state[second].data_ptr() != state[first].data_ptr():
            raise CheckpointError(
                f"{second} should be {first} (tie_embeddings), but the two have parted. Call model.tie_weights(), "
                "or build the model with tie_embeddings=False."
            )
    wholes: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        if name not in tied:
            wholes.setdefault(to_published(model, name), []).append(tensor)
    packed: dict[str, Tensor | Stacked] = {}
    for published, parts in wholes.items():
        path = published.rpartition(".")[0]
        is_transposed = any(_matches(path, pattern) for pattern in getattr(model, "transposed_names", ()))
        is_plain = len(parts) == 1 and not (is_transposed and parts[0].dim() == 2)
        packed[published] = parts[0] if is_plain else Stacked(tuple(parts), is_transposed and parts[0].dim() == 2)
    return packed


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return which parameter is another one under a second name: {second: first}."""
    return model.tied_names() if hasattr(model, "tied_names") else {}  # type: ignore[operator]


def is_ignored(model: nn.Module, published: str) -> bool:
    """Tell whether a tensor that the model has no place for may be passed over."""
    bare = _bare(model, published)
    return any(fnmatch.fnmatchcase(bare, pattern) for pattern in getattr(model, "ignored_names", ()))


def translate(path: str, table: Mapping[str, str]) -> str | None:
    """Look a dotted path up in a table whose keys and values write ``*`` for a number, or the number itself.

    >>> translate("h.3.attn", {"h.*.attn": "layers.*.attention"})
    'layers.3.attention'
    >>> translate("layers.3.norm", {"layers.*.norm": "block.*.layer.0.norm"})
    'block.3.layer.0.norm'
    >>> translate("block.3.layer.0.norm", {"block.*.layer.0.norm": "layers.*.norm"})
    'layers.3.norm'
    """
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    for num_kept in range(len(numbers) + 1):
        for kept in combinations(numbers, num_kept):
            wild = [i for i in numbers if i not in kept]
            target = table.get(".".join("*" if i in wild else part for i, part in enumerate(parts)))
            if target is not None:
                for i in wild:
                    target = target.replace("*", parts[i], 1)
                return target
    return None


def _split(name: str) -> tuple[str, str]:
    """Return the module and the leaf of a parameter's name; what describes a 4-bit weight stands below it.

    >>> _split("a.q.weight"), _split("a.q.weight.absmax")
    (('a.q', 'weight'), ('a.q', 'weight.absmax'))
    """
    path, mark, below = name.partition(".weight.")
    if mark:
        return path, f"weight.{below}"
    path, _, leaf = name.rpartition(".")
    return path, leaf


def _bare(model: Any, published: str) -> str:
    """Return a published name as the table writes it."""
    name = published.removeprefix(getattr(model, "optional_prefix", ""))
    for other, ours in getattr(model, "other_prefixes", {}).items():
        if name.startswith(other):
            return ours + name.removeprefix(other)
    return name


def _matches(path: str, pattern: str) -> bool:
    return translate(path, {pattern: pattern}) is not None


def _fused(model: Any) -> Mapping[str, tuple[str, ...]]:
    return getattr(model, "published_fused", {})
