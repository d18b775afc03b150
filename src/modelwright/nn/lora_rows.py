"""Many low-rank adapters over one model at once: each row of a product gets the change of its own adapter, or none.

    y[r] = W x[r] + s_a B_a (A_a x[r])       for the rows r of adapter a

`LoraRows` watches the linear layers by hooks that are there only while a step runs with adapters, so the model's
modules, names and weights stay as they are and whoever else holds the model sees nothing. Rows are taken adapter by
adapter; what is computed for a row is `modelwright.nn.lora.LoraLinear`'s own sequence of operations.

A product of few multiply-adds leaves oneDNN for another kernel (see `modelwright.engine.runner`), so the rows of an
adapter are filled up beyond that: a row's bits then do not depend on how many rows its adapter has in the step.
Source: the idea of Chen et al. 2023 (Punica) and Sheng et al. 2023 (S-LoRA), in plain PyTorch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.nn.linear import linears

SMALL_PRODUCT = 16**3  # multiply-adds up to which torch computes a bf16 product outside oneDNN


@dataclass(frozen=True)
class LowRank:
    """The change of one layer: s B A."""

    a: Tensor  # (R, in)
    b: Tensor  # (out, R)
    scaling: float

    @property
    def num_bytes(self) -> int:
        """Memory of both matrices."""
        return self.a.nbytes + self.b.nbytes

    def change(self, x: Tensor) -> Tensor:
        """Map rows (T, in) to what is added to their products (T, out)."""
        return self.scaling * F.linear(F.linear(x, self.a), self.b)


@dataclass(frozen=True)
class RowGroup:
    """The rows of a step that belong to one adapter."""

    layers: Mapping[str, LowRank]  # by the layer's name
    rows: Tensor  # (rows,) indices into the step's tokens
    padded: Tensor = field(init=False)  # the same, filled up so that no product is small

    def __post_init__(self) -> None:
        smallest = min((min(change.a.numel(), change.b.numel()) for change in self.layers.values()), default=1)
        missing = SMALL_PRODUCT // smallest + 1 - len(self.rows)
        filler = self.rows[:1].expand(max(0, missing))
        object.__setattr__(self, "padded", torch.cat((self.rows, filler)) if missing > 0 else self.rows)


class LoraRows:
    """Adds adapters' changes to the products of a model's linear layers."""

    def __init__(self, model: nn.Module):
        self._layers = dict(linears(model))
        self._groups: Sequence[RowGroup] = ()

    @contextmanager
    def over(self, groups: Sequence[RowGroup]) -> Iterator[None]:
        """Apply the groups' adapters to every pass of (1, T, ...) through the model meanwhile."""
        self._groups = groups
        names = {name for group in groups for name in group.layers}
        handles = [self._layers[name].register_forward_hook(self._hook(name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._groups = ()

    def _hook(self, name: str) -> Any:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0][0]  # (T, in)
            for group in self._groups:
                change = group.layers.get(name)
                if change is not None:
                    part = change.change(x.index_select(0, group.padded))[: len(group.rows)]  # (rows, out)
                    output[0].index_add_(0, group.rows, part)
            return output

        return add
