"""An adapter's matrices as the compiled step reads them: A of joined layers under each other, B by blocks of outputs.

Per layer four products are computed (queries, keys and values; output; gate and up; down), and each block of 32 outputs
takes those of the numbers A x that belong to its layer. Weights stay bfloat16, sums are float32; the twin in PyTorch is
`modelwright.nn.lora_rows`, whose activations and sums are rounded to the model's dtype on the way.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelwright.nn.kernels.packed import BLOCK, allocate
from modelwright.nn.lora_rows import LowRank

PRODUCTS = (("attention.q", "attention.k", "attention.v"), ("attention.o",), ("mlp.gate", "mlp.up"), ("mlp.down",))
GATE_UP = 2  # blocks of gate and up stand in turns


class CLowRank(ctypes.Structure):
    """`LowRank` of cpu_step.cpp."""

    _fields_ = (
        ("rank", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("a", "scale", "b", "first", "count", "at")),
    )


class PackedAdapter:
    """One adapter's tables for a model of the Llama family; `address` is where they begin.

    Args:
        model: Whose layers are changed.
        layers: The changes by layer name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, LowRank]):
        blocks: Any = model.layers
        self._kept: list[Any] = []  # what the tables point into
        self._tables = (CLowRank * (len(blocks) * len(PRODUCTS)))()
        # Large pages, and matrices in the order in which a step reads them: what is fetched ahead is used.
        self._memory = allocate(
            sum(64 + -(-x.nbytes // 64) * 64 for change in layers.values() for x in (change.a, change.b))
        )
        self._num_used = 0
        for i, block in enumerate(blocks):
            for product, names in enumerate(PRODUCTS):
                sizes = [block.get_submodule(name).out_features // BLOCK for name in names]
                changes = [layers.get(f"layers.{i}.{name}") for name in names]
                table = self._describe(changes, sizes, is_alternating=product == GATE_UP)
                self._tables[i * len(PRODUCTS) + product] = table
        self.address = ctypes.addressof(self._tables)

    def _describe(self, changes: Sequence[LowRank | None], sizes: Sequence[int], *, is_alternating: bool) -> CLowRank:
        """Return one product's table; `sizes`: blocks of outputs of each joined layer."""
        if not any(changes):
            return CLowRank(rank=0)
        first, count, at = (np.zeros(sum(sizes), dtype=kind) for kind in (np.int32, np.int32, np.int64))
        parts: list[Tensor] = []
        rank = start = offset = 0
        for index, (change, size) in enumerate(zip(changes, sizes, strict=True)):
            places = slice(index, None, len(sizes)) if is_alternating else slice(start, start + size)
            start += size
            if change is None:
                continue
            num = change.a.shape[0]
            first[places], count[places] = rank, num
            at[places] = offset + np.arange(size) * num * BLOCK
            parts.append(change.b.view(size, BLOCK, num).transpose(1, 2).flatten())
            rank, offset = rank + num, offset + change.b.numel()
        here = [change for change in changes if change is not None]
        a = torch.cat([change.a for change in here])
        scale = torch.cat([torch.full((change.a.shape[0],), change.scaling) for change in here])
        addresses = [self._place(a), self._keep(scale), self._place(torch.cat(parts))]
        for table in (first, count, at):
            self._kept.append(table)
            addresses.append(table.ctypes.data)
        return CLowRank(rank, *addresses)

    def _place(self, tensor: Tensor) -> int:
        """Copy a matrix behind the last one, to a multiple of 64 bytes; return where."""
        place = self._memory[self._num_used : self._num_used + tensor.nbytes]
        place.view(tensor.dtype).copy_(tensor.flatten())
        self._num_used += -(-tensor.nbytes // 64) * 64
        return place.data_ptr()

    def _keep(self, tensor: Tensor) -> int:
        kept = tensor.contiguous()
        self._kept.append(kept)
        return kept.data_ptr()
