"""Pickled checkpoints (``pytorch_model.bin``), read only where that can run no code.

A pickle is a program, and unpickling runs it. torch's restricted reader knows tensors and plain containers and refuses
everything else; what it refuses is refused here, and nothing else ever unpickles. Files of the zip form are mapped
into memory like safetensors; the form before torch 1.6 is read shard by shard.
Source: torch.load with weights_only (https://docs.pytorch.org/docs/stable/notes/serialization.html).
"""

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from modelwright.base.errors import CheckpointError

WEIGHTS, INDEX, SUFFIX = "pytorch_model.bin", "pytorch_model.bin.index.json", ".bin"
ZIP_MAGIC, PICKLE_MAGIC = b"PK\x03\x04", b"\x80"


def is_pickled(file: Path) -> bool:
    """Tell by its first bytes whether a file is a pickled checkpoint, of the zip form or the one before."""
    with open(file, "rb") as handle:
        magic = handle.read(4)
    # A llama2.c checkpoint may begin with the same byte: its width as an int32, as in 80 00 00 00 for 128 and
    # 80 02 00 00 for 640. A pickle's protocol is 2 to 5, and no instruction is 0.
    is_stream = magic.startswith(PICKLE_MAGIC) and len(magic) > 2 and 2 <= magic[1] <= 5 and magic[2] != 0
    return magic == ZIP_MAGIC or is_stream


def read_pickle(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one pickled checkpoint.

    Raises:
        CheckpointError: The file cannot be read without running code, is damaged, or holds something other than
            tensors by name.
    """
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        why = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0] or str(error).partition("\n")[0]
        raise CheckpointError(
            f"{file} is a pickle that cannot be read without running the code in it ({why.strip()}), so it was not "
            "read. Convert it to safetensors where you trust it: in transformers, from_pretrained then save_pretrained."
        ) from None
    except Exception as error:  # a damaged pickle fails in as many ways as there are instructions
        raise CheckpointError(
            f"{file} ({file.stat().st_size:,} bytes) is not a whole pickled checkpoint "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}). It may be cut short; fetch it again."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds a {type(found).__name__}; expected tensors by name. Save its state_dict.")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{file} holds a {type(tensor).__name__} under {name!r}; expected tensors alone. If the weights stand "
                "one level deeper (state_dict, model), save that alone."
            )
        yield name, tensor
