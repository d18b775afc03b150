"""The whole step of a Llama-shaped model in one call of compiled code, on a CPU.

Where PyTorch dispatches a thousand small operations a token, this hands ids, positions and block tables to
nn/kernels/cpu_step.cpp and gets logits back. The numbers differ slightly from the PyTorch path's: the residual stream
is float32, and activations that meet 4- or 8-bit weights are rounded to 8 bits in groups of 32. They do not depend on
anything else: the tokens of a request are computed to the same bits alone and in any company, chunking, prefix hit or
number of threads, because every row walks the same path through every product (cpu_linear.h) and the same stretches of
keys (cpu_attention.h). Requests whose block tables begin alike read those keys once for all.

Which models: the Llama family with linear layers of 4, 8 or 16 bits; `refusal` says what stands in the way of others.
"""

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.engine.scheduler import Chunk
from modelwright.models.llama import Llama
from modelwright.nn.kernels.packed import BLOCK, Arena, CMatrix, PackedMatrix, allocate, bits_of, commit
from modelwright.nn.kernels.packed_lora import PackedAdapter

TILE = 16  # positions in a tile of the cache
TILES_TOGETHER = 4  # a query looks at stretches of so many tiles


class CLayer(ctypes.Structure):
    """`Layer` of cpu_step.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attention_norm", "q_norm", "k_norm", "mlp_norm")),
        *((name, CMatrix) for name in ("qkv", "o", "gate_up", "down")),
        ("window", ctypes.c_int64),
        ("cache", ctypes.c_void_p),
    )


class CModel(ctypes.Structure):
    """`Model` of cpu_step.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "num_layers")
        ),
        ("norm_eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "embed", "norm")),
        ("layers", ctypes.POINTER(CLayer)),
        ("head", CMatrix),
    )


class CStep(ctypes.Structure):
    """`Step` of cpu_step.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_rows", "num_threads")),
        *((name, ctypes.c_void_p) for name in ("ids", "positions", "starts", "tiles", "order", "rows", "logits")),
        ("adapters", ctypes.c_void_p),
    )


def refusal(model: nn.Module, block_size: int) -> str | None:
    """Return why this model is not computed by the compiled step; None when it is."""
    if type(model) is not Llama:
        return f"a {type(model).__name__} is not of the Llama family"
    c: Any = model.config
    if block_size % TILE:
        return f"blocks of {block_size} positions are not whole tiles of {TILE}"
    if c.head_dim % TILE or c.head_dim > 512 or any(n * c.head_dim % BLOCK for n in (c.num_heads, c.num_kv_heads)):
        return f"{c.num_heads} heads of {c.head_dim}, {c.num_kv_heads} of them for keys, do not fill blocks of {BLOCK}"
    if c.hidden_size % BLOCK or c.intermediate_size % BLOCK:
        return f"widths of {c.hidden_size} and {c.intermediate_size} are not multiples of {BLOCK}"
    if c.rope_scaling is not None and c.rope_scaling.is_length_dependent:
        return f"the rotation ({c.rope_scaling.kind}) depends on the length"
    if model.embed.weight.device.type != "cpu" or model.embed.weight.dtype != torch.bfloat16:
        return f"its weights are {model.embed.weight.dtype} on {model.embed.weight.device}, not bfloat16 on the CPU"
    try:
        for layer in model.layers:
            _kinds(layer)
        bits_of(model.lm_head)
    except ConfigError as error:
        return str(error)
    return None


def is_low_bit(model: nn.Module) -> bool:
    """Tell whether a linear layer of a model that `refusal` lets pass has fewer than 16 bits."""
    return any(bits < 16 for layer in model.layers for bits in _kinds(layer))  # type: ignore[union-attr]


def _kinds(layer: Any) -> list[int]:
    """Return the bits of a block's four products.

    Raises:
        ConfigError: Layers that are computed together differ, or have no kernel.
    """
    a, f = layer.attention, layer.mlp
    kinds = [{bits_of(part) for part in parts} for parts in ((a.q, a.k, a.v), (a.o,), (f.gate, f.up), (f.down,))]
    if any(len(kind) > 1 for kind in kinds):
        raise ConfigError("Queries, keys and values, or gate and up, have weights of different bits.")
    return [kind.pop() for kind in kinds]


class NativeRunner:
    """Computes steps as `modelwright.engine.runner.Runner` does, by the compiled kernels.

    Args:
        model: One that `refusal` lets pass.
        library: From `modelwright.nn.kernels.build`.
        num_blocks: Of the cache, the null block included.
        block_size: Positions in a block.
    """

    takes_adapters = True

    def __init__(self, model: nn.Module, library: ctypes.CDLL, *, num_blocks: int, block_size: int):
        self.model: Any = model
        self.library = library
        self.tiles_per_block = block_size // TILE
        c: Any = self.model.config
        self.vocab_size = c.vocab_size
        shape = (num_blocks * block_size, c.num_kv_heads, 2 * c.head_dim)
        # The numbers of a block are laid out as cpu_attention.h says; the shape tells the size alone.
        num_bytes = 2 * num_blocks * block_size * c.num_kv_heads * 2 * c.head_dim
        self.pools = [allocate(num_bytes).view(torch.bfloat16).view(shape) for _ in range(c.num_layers)]
        for pool in self.pools:
            pool[:block_size] = 0  # the null block
        self._has_memory = False  # the cache is committed in the background, behind the first step
        self._arena = Arena()
        self._kept: list[Any] = []  # what the structures point into
        self._model = self._describe()

    def _describe(self) -> CModel:
        model, c = self.model, self.model.config
        layers = (CLayer * c.num_layers)()
        for i, layer in enumerate(model.layers):
            a, f = layer.attention, layer.mlp
            layers[i] = CLayer(
                attention_norm=self._floats(layer.attention_norm.weight),
                q_norm=self._floats(a.q_norm.weight) if a.q_norm is not None else None,
                k_norm=self._floats(a.k_norm.weight) if a.k_norm is not None else None,
                mlp_norm=self._floats(layer.mlp_norm.weight),
                qkv=self._pack(a.q, a.k, a.v),
                o=self._pack(a.o),
                gate_up=self._pack(f.gate, f.up, is_alternating=True),
                down=self._pack(f.down),
                window=c.window(i) or 0,
                cache=self.pools[i].data_ptr(),
            )
        return CModel(
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            num_layers=c.num_layers,
            norm_eps=c.norm_eps,
            scale=model.layers[0].attention.scale,
            cos=self._floats(model.rope.cos),
            sin=self._floats(model.rope.sin),
            embed=self._keep(model.embed.weight.detach().contiguous()),
            norm=self._floats(model.norm.weight),
            layers=layers,
            head=self._pack(model.lm_head),
        )

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _floats(self, tensor: Tensor) -> int:
        return self._keep(tensor.detach().float().contiguous())

    def _pack(self, *layers: nn.Module, is_alternating: bool = False) -> CMatrix:
        packed = PackedMatrix(self.library, layers, is_alternating=is_alternating, arena=self._arena)
        self._kept.append(packed)
        return packed.c

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute a step's tokens and store their keys and values.

        Returns:
            (R, V) logits, float32: of each chunk in order, as many rows as it wants (`Chunk.num_rows`), its last ones.
        """
        ids: list[int] = []
        rows: list[int] = []
        positions, starts, tiles, spans = [], [], [], []
        num_tiles = 0
        for chunk in chunks:
            table = self._tiles(chunk)
            spans.append(range(len(ids), len(ids) + chunk.computed_end - chunk.start))
            positions.append(np.arange(chunk.start, chunk.computed_end))
            starts.append(np.full(len(spans[-1]), num_tiles))
            tiles.append(table)
            num_tiles += len(table)
            ids += chunk.token_ids
            rows += range(len(ids) - chunk.num_rows, len(ids))
        logits = torch.empty(len(rows), self._model.head.num_outs)
        arrays = [
            np.array(ids, dtype=np.int64),
            np.concatenate(positions),
            np.concatenate(starts),
            np.concatenate(tiles).astype(np.int32),
            np.array(_neighbours(chunks, spans), dtype=np.int64),
            np.array(rows, dtype=np.int64),
        ]
        addresses = [array.ctypes.data for array in arrays]
        changes = self._changes(chunks, spans)
        of_tokens = None if changes is None else changes.ctypes.data
        step = CStep(len(ids), len(rows), torch.get_num_threads(), *addresses, logits.data_ptr(), of_tokens)
        self.library.mw_step(ctypes.byref(self._model), ctypes.byref(step))
        if not self._has_memory:
            self._has_memory = True
            threading.Thread(target=commit, args=(self.pools,), name="commit-cache", daemon=True).start()
        return logits[:, : self.vocab_size]

    def _changes(self, chunks: Sequence[Chunk], spans: Sequence[range]) -> np.ndarray | None:
        """Return of each token where its adapter's tables are, 0 for none; None when no token has one."""
        if all(chunk.request.adapter is None for chunk in chunks):
            return None
        found = np.zeros(spans[-1].stop, dtype=np.uint64)
        for chunk, span in zip(chunks, spans, strict=True):
            adapter = chunk.request.adapter
            if adapter is not None:
                if adapter.packed is None:
                    adapter.packed = PackedAdapter(self.model, adapter.layers)
                    adapter.layers = {}  # no second copy: whoever computes with packed weights never goes back
                found[span.start : span.stop] = adapter.packed.address
        return found

    def _tiles(self, chunk: Chunk) -> np.ndarray:
        """Return the tiles of a sequence, null tiles up to a whole stretch."""
        blocks = np.asarray(chunk.request.block_table, dtype=np.int64)
        if self.tiles_per_block > 1:
            blocks = (blocks[:, None] * self.tiles_per_block + np.arange(self.tiles_per_block)).ravel()
        num_used = (chunk.computed_end - 1) // TILE + 1
        table = np.zeros(-(-num_used // TILES_TOGETHER) * TILES_TOGETHER, dtype=np.int64)
        table[:num_used] = blocks[:num_used]
        return table


def _neighbours(chunks: Sequence[Chunk], spans: Sequence[range]) -> list[int]:
    """Return the tokens in an order in which those that share blocks stand together."""
    order = range(len(chunks))
    if len(chunks) > 1:
        order = sorted(order, key=lambda i: chunks[i].request.block_table)  # type: ignore[assignment]
    return [token for i in order for token in spans[i]]
