"""llama2.c checkpoints (``.bin``): a short header of sizes and the Llama weights one after another.

The version-0 file has seven int32 (a negative vocabulary size says that the output matrix is its own) and float32
weights, tensor kind by tensor kind; version 1 is the same with a magic word, a padded header of 256 bytes and the
norms first. Rotary pairs stand side by side in a head there; rows of q and k are reordered into halves.

Source: karpathy/llama2.c, export.py (``legacy_export``, ``version1_export``) and run.c.
Not done: version 2 (8-bit groups). Sizes are checked against the file's length before anything is made.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelwright.base.errors import CheckpointError
from modelwright.models.assemble import assemble
from modelwright.nn.rope import half_split_order

MAGIC = 0x616B3432
_V0_HEADER, _V1_HEADER = 28, 256
_FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")


@dataclass(frozen=True)
class _Header:
    """What stands at the front of a file."""

    sizes: dict[str, int]
    is_shared: bool  # the output matrix is the embedding
    is_norms_first: bool  # version 1
    start: int  # of the numbers, in bytes

    @property
    def head_dim(self) -> int:
        return self.sizes["dim"] // self.sizes["n_heads"]

    def plan(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return the published name (``*`` for all layers, one after the other) and shape of each part, in order.

        An empty name is passed over: the tables of cosines and sines of the old format.
        """
        s = self.sizes
        width, inner, layers, length = s["dim"], s["hidden_dim"], s["n_layers"], s["seq_len"]
        keys = self.head_dim * s["n_kv_heads"]
        block = "model.layers.*."
        embed = ("model.embed_tokens", (s["vocab_size"], width))
        norms: list[tuple[str, tuple[int, ...]]] = [
            (block + "input_layernorm", (layers, width)),
            (block + "post_attention_layernorm", (layers, width)),
            ("model.norm", (width,)),
        ]
        attention: list[tuple[str, tuple[int, ...]]] = [
            (block + "self_attn.q_proj", (layers, width, width)),
            (block + "self_attn.k_proj", (layers, keys, width)),
            (block + "self_attn.v_proj", (layers, keys, width)),
            (block + "self_attn.o_proj", (layers, width, width)),
        ]
        mlp: list[tuple[str, tuple[int, ...]]] = [
            (block + "mlp.gate_proj", (layers, inner, width)),
            (block + "mlp.down_proj", (layers, width, inner)),
            (block + "mlp.up_proj", (layers, inner, width)),
        ]
        head = [] if self.is_shared else [("lm_head", (s["vocab_size"], width))]
        if self.is_norms_first:
            return [*norms, embed, *attention, *mlp, *head]
        tables = ("", (length, self.head_dim))
        return [embed, norms[0], *attention, norms[1], *mlp, norms[2], tables, *head]


def read_llama2c(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> nn.Module:
    """Load a llama2.c checkpoint, in evaluation mode.

    Args:
        path: The file.
        dtype: Of the weights; None: float32, as stored.
        device: Where the weights go; None: the CPU.

    Raises:
        CheckpointError: The file is none, its sizes contradict each other, or it has another length than they ask for.
    """
    path = Path(path)
    try:
        num_bytes = path.stat().st_size
        with open(path, "rb") as handle:
            head = handle.read(_V1_HEADER)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    header = _read_header(path, head)
    expected = header.start + 4 * sum(int(np.prod(shape, dtype=object)) for _, shape in header.plan())
    if num_bytes != expected:
        raise CheckpointError(
            f"{path} has {num_bytes:,} bytes; its header ({header.sizes}) asks for {expected:,}. It is cut short, or "
            "no llama2.c checkpoint. Fetch it again."
        )
    sizes = header.sizes
    values: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["dim"],
        "intermediate_size": sizes["hidden_dim"],
        "num_hidden_layers": sizes["n_layers"],
        "num_attention_heads": sizes["n_heads"],
        "num_key_value_heads": sizes["n_kv_heads"],
        "max_position_embeddings": sizes["seq_len"],
        "rms_norm_eps": 1e-5,  # fixed in run.c
        "rope_theta": 10000.0,
        "tie_word_embeddings": header.is_shared,
        "bos_token_id": 1,
        "eos_token_id": 2 if sizes["vocab_size"] > 2 else None,
    }
    return assemble(path, values, _tensors(path, header), dtype=dtype, device=device)


def _read_header(path: Path, head: bytes) -> _Header:
    if len(head) < _V0_HEADER:
        raise CheckpointError(f"{path} has {len(head)} bytes; a llama2.c checkpoint starts with {_V0_HEADER}.")
    magic, version = struct.unpack_from("<Ii", head)
    is_versioned = magic == MAGIC
    if is_versioned and version != 1:
        raise CheckpointError(f"{path} is a llama2.c checkpoint of version {version}; versions 0 and 1 are read.")
    if is_versioned and len(head) < _V1_HEADER:
        raise CheckpointError(f"{path} is cut short: {len(head)} bytes of a header of {_V1_HEADER}. Fetch it again.")
    sizes = dict(zip(_FIELDS, struct.unpack_from("<7i", head, 8 if is_versioned else 0), strict=True))
    is_shared = bool(head[36]) if is_versioned else sizes["vocab_size"] > 0
    sizes["vocab_size"] = abs(sizes["vocab_size"])
    for name, value in sizes.items():
        if not 1 <= value <= (1 << 22 if name == "seq_len" else 1 << 24):
            raise CheckpointError(
                f"{path} is no llama2.c checkpoint: its header gives {name} as {value}. Check the path."
            )
    if sizes["dim"] % sizes["n_heads"] or sizes["n_heads"] % sizes["n_kv_heads"]:
        raise CheckpointError(
            f"{path}: its header gives dim {sizes['dim']}, {sizes['n_heads']} heads and {sizes['n_kv_heads']} "
            "key/value heads, which do not divide. It is damaged, or no llama2.c checkpoint."
        )
    return _Header(sizes, is_shared, is_versioned, _V1_HEADER if is_versioned else _V0_HEADER)


def _tensors(path: Path, header: _Header) -> Iterator[tuple[str, Tensor]]:
    order = half_split_order(header.head_dim)
    numbers = np.memmap(path, np.dtype("<f4"), mode="r", offset=header.start)
    at = 0
    for name, shape in header.plan():
        size = int(np.prod(shape))
        whole = torch.from_numpy(np.array(numbers[at : at + size])).reshape(shape)
        at += size
        if "*" not in name:
            if name:
                yield f"{name}.weight", whole
            continue
        for layer, tensor in enumerate(whole):
            if name.endswith(("q_proj", "k_proj")):
                tensor = tensor.reshape(-1, len(order), tensor.shape[-1])[:, order].reshape(tensor.shape)
            yield f"{name.replace('*', str(layer))}.weight", tensor.clone()
