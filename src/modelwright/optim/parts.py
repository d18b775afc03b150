"""Tensors that lie in parts on several ranks: the part that is here, and lists that one call can take together."""

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing its memory; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def by_mesh(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Split a list by the ranks that its tensors lie on: calls on many tensors at once take one kind only."""
    found: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
        found.setdefault(mesh, []).append(tensor)
    return list(found.values())
