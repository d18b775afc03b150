"""GGUF matrices that stay in 4 or 8 bits: Q4_0 and Q8_0 have the groups of 32 that `modelwright.nn.lowbit` has.

    Q4_0: 2 bytes of scale d (float16), 16 bytes of 32 numbers, low halves first;  w = d (q - 8)
    Q8_0: 2 bytes of scale d (float16), 32 signed bytes;                            w = d q

The numbers are kept bit by bit, the scales are rounded to the model's dtype. One type of a file is kept, the one that
holds most; matrices of other types are multiplied out. Source: ggml-common.h of llama.cpp.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelwright.base.gguf_file import GgufFile
from modelwright.nn.lowbit import pack, quantization_config

KEPT = {"Q4_0": 4, "Q8_0": 8}
GROUP = 32
EMBEDDINGS = ("token_embd.weight", "position_embd.weight")


def kept_type(file: GgufFile, family: str) -> str | None:
    """Return the type whose matrices stay as they are; None: no matrix has one, or they are stored transposed."""
    sizes = dict.fromkeys(KEPT, 0)
    for tensor in file.tensors.values():
        if tensor.type in KEPT and tensor.name not in EMBEDDINGS and len(tensor.shape) == 2:
            sizes[tensor.type] += tensor.num_bytes
    most = max(sizes, key=sizes.__getitem__)
    return most if sizes[most] and family == "llama" else None


def is_kept(file: GgufFile, name: str, type_name: str | None) -> bool:
    """Tell whether a tensor stays in its bits."""
    tensor = file.tensors[name]
    return type_name is not None and tensor.type == type_name and name not in EMBEDDINGS and len(tensor.shape) == 2


def split_blocks(data: np.ndarray, type_name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the numbers (out, in) int8 and the scales (out, in / 32) float16 of a matrix."""
    bits = KEPT[type_name]
    blocks = data.reshape(-1, 2 + GROUP * bits // 8)
    scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16).reshape(shape[0], -1)
    rest = blocks[:, 2:]
    numbers = rest.view(np.int8) if bits == 8 else np.concatenate((rest & 15, rest >> 4), axis=1).view(np.int8) - 8
    return torch.from_numpy(np.ascontiguousarray(numbers).reshape(shape)), torch.from_numpy(scale.copy())


def packed_tensors(q: Tensor, scale: Tensor, type_name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the three tensors that a low-bit layer is made of, by the ends of their names."""
    return {
        "weight_packed": pack(q, KEPT[type_name]),
        "weight_scale": scale.to(dtype),
        "weight_shape": torch.tensor(q.shape),
    }


def packed_config(values: Mapping[str, Any], type_name: str, dense: list[str]) -> dict[str, Any]:
    """Return the config.json of a model whose layers but ``dense`` (published names) are kept."""
    return {**values, "quantization_config": quantization_config(KEPT[type_name], GROUP, dense)}
