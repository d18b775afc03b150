"""Safetensors files: read them mapped into memory, one shard at a time; write them whole or not at all.

A file is 8 bytes of header length (little-endian), a JSON header of names, dtypes, shapes and byte ranges, and the
raw numbers. The writer streams tensor by tensor, so saving needs no second copy of the weights, and pads the header
so that the numbers start on a 64-byte boundary.
Source: https://github.com/huggingface/safetensors (format).
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modelwright.base.errors import CheckpointError, DataError
from modelwright.base.files import atomic_file, read_json, write_json
from modelwright.models.layout import Stacked

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
ALIGNMENT = 64
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def read_folder(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """Yield (file, published name, tensor) for everything in a model folder; tensors are views of the mapped file.

    Raises:
        CheckpointError: No safetensors (a pickled checkpoint is named), a shard that is missing, damaged, outside the
            folder or without a tensor that the index promises.
    """
    for file, promised in _shards(folder).items():
        try:
            with safe_open(file, framework="pt", device="cpu") as handle:
                names = list(handle.keys())
                lacking = sorted(promised - set(names))
                if lacking:
                    raise CheckpointError(
                        f"{file} lacks the tensor {lacking[0]}, which {INDEX} says is there. Fetch or save both again."
                    )
                for name in names:
                    yield file, name, handle.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{file} ({file.stat().st_size:,} bytes) is not a whole safetensors file: {error}. "
                "It may be cut short or damaged; fetch or save it again."
            ) from error
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}. Check its permissions.") from error


def _shards(folder: Path) -> dict[Path, set[str]]:
    """Return the weight files of a folder, each with the tensors that the index promises in it."""
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: set()}
    index = folder / INDEX
    if not index.is_file():
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{folder} holds pickled weights ({pickles[0]}) and no safetensors. Unpickling can run any code, so it "
                "is not done. Convert to safetensors first: in transformers, from_pretrained then save_pretrained."
            )
        raise CheckpointError(f"{folder} holds neither {WEIGHTS} nor {INDEX}. Give the folder of a whole model.")
    try:
        weight_map = read_json(index)["weight_map"].items()
    except (DataError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not a safetensors index ({error}); expected JSON with weight_map. Fetch it again."
        ) from error
    shards: dict[Path, set[str]] = {}
    for name, file in weight_map:
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{index} places {name} in {file!r}; expected the name of a file in the same folder. "
                "Nothing outside the model's folder is read."
            )
        shards.setdefault(folder / file, set()).add(name)
    for file, names in shards.items():
        if not file.is_file():
            raise CheckpointError(
                f"The shard {file} is missing; {index.name} places {len(names)} tensors in it, for instance "
                f"{min(names)}. Fetch the whole model."
            )
    return shards


def write_folder(folder: Path, tensors: Mapping[str, Tensor | Stacked], max_shard_bytes: int) -> None:
    """Write the weights of a folder, in several files beyond ``max_shard_bytes``, and remove those of before."""
    shards: list[dict[str, Tensor | Stacked]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        files = [WEIGHTS]
    else:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_tensors(folder / file, shard)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(t.nbytes for t in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        files.append(INDEX)
    for stale in (*folder.glob("model-*-of-*.safetensors"), folder / WEIGHTS, folder / INDEX):
        if stale.name not in files:
            stale.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Stacked]) -> None:
    """Write one safetensors file, atomically.

    Raises:
        CheckpointError: A tensor has no storage or a dtype that the format does not have here.
        DeviceError: The disk is full.
    """
    assert sys.byteorder == "little", "safetensors are little-endian"
    # Wide dtypes first, as the reference writer does: then every tensor starts on a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        if tensor.is_meta or tensor.dtype not in DTYPE_NAMES:
            what = "has no storage (meta device)" if tensor.is_meta else f"has dtype {tensor.dtype}"
            raise CheckpointError(f"Tensor {name} {what}; it cannot be saved. Load or cast the model first.")
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with atomic_file(path, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little"))
        handle.write(text)
        for _, tensor in ordered:
            whole = tensor.make() if isinstance(tensor, Stacked) else tensor.detach().to("cpu").contiguous()
            flat = whole.reshape(-1)
            handle.write(flat.view(torch.uint8).numpy().data)
